"""`posttrain doctor`: its verdicts, and what they keep `plan` and `run` from."""

import os
from pathlib import Path

import pytest

from flows.graph import Graph, build_graph
from flows.recipe import load_recipe
from flows.runtimes import needed
from steps.runtime import verdicts
from steps.runtime.proof import all_proofs
from tests.broken import ABORT, llama_cpp_with, module_with, package_with
from tests.flows.command import ROOT, Command


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """`posttrain` with a home of its own, and verdicts that no other test reads."""
    return Command(tmp_path / "home")


def broken_llama_cpp(command: Command, tmp_path: Path) -> None:
    command.environment["LLAMA_CPP_LIB_PATH"] = str(llama_cpp_with(ABORT, tmp_path / "lib", others=False))


def test_doctor_says_what_this_machine_is_and_what_works(command: Command) -> None:
    ended = command("doctor", "llama.cpp", "torch", "--json")
    assert ended.code == 0, ended.err
    told = ended.json
    assert [each["runtime"] for each in told["runtimes"]] == ["llama.cpp", "torch"]
    assert all(each["status"] == "works" and each["version"] for each in told["runtimes"])
    assert told["fast_dtype"] == told["runtimes"][1]["facts"]["fast_dtype"]
    assert told["machine"] == verdicts.machine()
    table = command("doctor", "llama.cpp")
    assert told["processor"] in table.out
    assert "works" in table.out


def test_an_unknown_runtime_is_refused(command: Command) -> None:
    ended = command("doctor", "lama.cpp")
    assert ended.code == 2
    assert ended.err == "error: doctor: unknown runtime `lama.cpp`; did you mean `llama.cpp`?\n"


def test_a_broken_runtime_blocks_just_the_steps_that_need_it(command: Command, tmp_path: Path) -> None:
    broken_llama_cpp(command, tmp_path)
    found = command("doctor", "llama.cpp", "--json")
    assert found.code == 1
    assert found.json["runtimes"][0]["reason"] == "it died of SIGABRT in llama_cpp"
    planned = command("plan", "pico", "--json")
    assert planned.code == 2
    statuses = {step["step"]: step["status"] for step in planned.json["steps"]}
    blocked = {name for name, status in statuses.items() if status == "blocked"}
    assert blocked == {"gguf[Q4_K_M]", "gguf[Q8_0]", "quality"}
    reasons = {step["reason"] for step in planned.json["steps"] if step["step"] in blocked}
    assert all("llama.cpp does not work on this machine: it died of SIGABRT" in reason for reason in reasons)
    assert set(statuses.values()) == {"blocked", "run"}


def test_a_run_proves_what_was_never_called_here_before_anything_runs(command: Command, tmp_path: Path) -> None:
    broken_llama_cpp(command, tmp_path)
    planned = command("plan", "pico", "--json")
    notes = {step["step"]: step["reason"] for step in planned.json["steps"]}
    assert notes["gguf[Q8_0]"] == "llama.cpp not proven on this machine yet"
    assert notes["sft"] == ""
    ended = command("run", "pico")
    assert ended.code == 2
    assert "on this machine, once" in ended.out
    assert "llama.cpp does not work on this machine: it died of SIGABRT in llama_cpp" in ended.err
    assert "`posttrain doctor llama.cpp` proves it again" in ended.err
    assert ended.err.count("\n") == 1
    assert not (command.home / "artifacts").exists()


def test_a_library_replaced_since_the_verdict_is_found(command: Command, tmp_path: Path) -> None:
    """bitsandbytes proven, then one of its libraries replaced by one that dies as it is loaded."""
    qlora = ("--set", "steps.sft.adapter.kind=qlora")
    assert command("doctor", "bitsandbytes").code == 0
    overlay = package_with("bitsandbytes", "libbitsandbytes_cpu.so", ABORT, tmp_path / "overlay")
    command.environment["PYTHONPATH"] = f"{overlay}{os.pathsep}{ROOT}"
    notes = {step["step"]: step["reason"] for step in command("plan", "pico", *qlora, "--json").json["steps"]}
    assert notes["sft"] == "bitsandbytes not proven on this machine yet"
    assert command("doctor", "bitsandbytes").code == 1
    steps = {step["step"]: step["status"] for step in command("plan", "pico", *qlora, "--json").json["steps"]}
    assert {name for name, status in steps.items() if status == "blocked"} == {"sft", "merged"}
    assert {step["status"] for step in command("plan", "pico", "--json").json["steps"]} == {"run"}


@pytest.mark.slow
def test_what_only_imports_a_broken_library_does_without_it(command: Command, tmp_path: Path) -> None:
    """peft imports bitsandbytes and GPTQModel, that PyPcre, where they are there, and dies with it: LoRA needs none."""
    overlay = package_with("bitsandbytes", "libbitsandbytes_cpu.so", ABORT, tmp_path / "overlay")
    module_with("pcre_ext_c", ABORT, tmp_path / "overlay")
    command.environment["PYTHONPATH"] = f"{overlay}{os.pathsep}{ROOT}"
    recipe = tmp_path / "lora.yaml"
    recipe.write_text(
        "name: lora\nbase: {uses: model.pico, pretrain_steps: 2}\nsteps:\n"
        "  data: {uses: data.prepare, source: python-stdlib-docs, limit: 30, max_tokens: 200}\n"
        "  sft: {uses: train.sft, model: base, data: data.train, adapter: {kind: lora, rank: 2}, max_steps: 1}\n",
        encoding="utf-8",
    )
    ended = command("run", str(recipe))
    assert ended.code == 0, ended.out + ended.err
    assert "proving bitsandbytes on this machine, once" in ended.out
    assert "proving GPTQModel on this machine, once" in ended.out
    told = {each["runtime"]: each for each in command("doctor", "GPTQModel", "bitsandbytes", "--json").json["runtimes"]}
    assert told["bitsandbytes"]["reason"] == "it died of SIGABRT in bitsandbytes"
    assert told["GPTQModel"]["reason"] == "it died of SIGABRT in pcre"


RECIPE = """
name: needs
base: {uses: model.pico, pretrain_steps: 0}
steps:
  data: {uses: data.prepare, source: python-stdlib-docs, limit: 60, eval_fraction: 0.2}
  sft: {uses: train.sft, model: base, data: data.train, adapter: {kind: qlora}}
  merged: {uses: merge.adapter, adapter: sft}
  gguf: {uses: quantize.gguf, model: merged}
  gptq: {uses: quantize.gptq, model: merged, calibration: data.train}
  quality: {uses: evaluate.compare, reference: merged, candidates: [gguf, gptq], data: data.eval}
  best: {uses: evaluate.best, candidates: [sft], report: quality, metric: kl}
  again: {uses: merge.adapter, adapter: best}
  eight: {uses: train.sft, model: base, data: data.train, optimizer: adamw_8bit}
  bundle: {uses: package.bundle, members: [gguf], title: X}
"""


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    path = tmp_path / "needs.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return build_graph(load_recipe(path, ()))


@pytest.mark.parametrize(
    ("step", "runtimes"),
    [
        ("data", set()),
        ("sft", {"torch", "bitsandbytes"}),
        ("merged", {"torch", "bitsandbytes"}),
        ("gguf", {"torch", "llama.cpp"}),
        ("gptq", {"torch", "GPTQModel"}),
        ("quality", {"torch", "llama.cpp"}),
        ("best", set()),
        ("again", {"torch", "bitsandbytes"}),
        ("eight", {"torch", "bitsandbytes"}),
        ("bundle", set()),
    ],
)
def test_a_step_needs_what_it_calls_and_what_opens_its_inputs(graph: Graph, step: str, runtimes: set[str]) -> None:
    found = set(needed(graph, graph.nodes[step])) - {"CUDA"}
    assert found == runtimes
    assert found <= all_proofs().keys()


def test_a_gguf_as_source_needs_llama_cpp(tmp_path: Path) -> None:
    path = tmp_path / "source.yaml"
    path.write_text("name: s\nbase: file:///nowhere/model.gguf\nsteps:\n  pico: {uses: model.pico}\n", encoding="utf-8")
    graph = build_graph(load_recipe(path, ()))
    assert set(needed(graph, graph.nodes["base"])) - {"CUDA"} == {"llama.cpp", "torch"}
