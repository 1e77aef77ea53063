"""Verdicts on native runtimes: for which machine and libraries they hold, and the precision that was measured."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

import steps as rooms
from steps.frame import hardware
from steps.frame.hardware import fast_dtype
from steps.runtime import verdicts
from steps.runtime.processor import Processor, read_processor, this_processor
from steps.runtime.proof import Proof, Verdict, all_proofs, prove
from steps.runtime.verdicts import kept_choice, last_verdict, prove_and_keep
from tests.broken import ABORT, LLAMA_CPP, module_with


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """llama.cpp's libraries in a folder of the test's own, from which they are loaded."""
    copy = tmp_path / "lib"
    shutil.copytree(LLAMA_CPP, copy)
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(copy))
    return copy


def test_a_verdict_holds_for_the_libraries_that_were_called(own_verdicts: Path, folder: Path) -> None:
    assert last_verdict("llama.cpp") is None
    prove_and_keep(["llama.cpp"])
    found = last_verdict("llama.cpp")
    assert found and found.status == "works"
    (folder / "libdangling.so").symlink_to("/nowhere/lib.so")
    assert last_verdict("llama.cpp") == found, "a link to nowhere is no library"
    os.utime(next(path for path in folder.glob("*.so") if path.exists()))
    assert last_verdict("llama.cpp") is None, "a library was replaced since"


@pytest.mark.parametrize("changed", ["runtime/proofs/llama_cpp.py", "lm/llama_cpp.py", "runtime/death.py"])
def test_a_verdict_holds_for_the_code_that_called_them(
    changed: str, own_verdicts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proof that was repaired, or made stricter, is called again."""
    copy = shutil.copytree(rooms.__path__[0], tmp_path / "steps")
    monkeypatch.setattr(rooms, "__path__", [str(copy)])
    proof = all_proofs()["llama.cpp"]
    said = Verdict(
        runtime=proof.runtime, distribution=proof.distribution, status="broken", version="1", identity=proof.identity()
    )
    assert verdicts._keep(proof, said) == last_verdict("llama.cpp")
    file = copy / changed
    text = file.read_text(encoding="utf-8")
    file.write_text(f"# A comment is no code.\n{text}", encoding="utf-8")
    assert last_verdict("llama.cpp") == said
    file.write_text(f"{text}\nSTRICTER = True\n", encoding="utf-8")
    assert last_verdict("llama.cpp") is None
    file.write_text(f"{text}\nnot Python\n", encoding="utf-8")
    assert last_verdict("llama.cpp") is None
    file.write_text(text, encoding="utf-8")
    assert last_verdict("llama.cpp") == said


def test_how_steps_are_run_is_no_part_of_a_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copytree(rooms.__path__[0], tmp_path / "steps")
    monkeypatch.setattr(rooms, "__path__", [str(copy)])
    before = {proof.identity() for proof in all_proofs().values()}
    (copy / "frame" / "runner.py").write_text("CHANGED = True\n", encoding="utf-8")
    assert {proof.identity() for proof in all_proofs().values()} == before


@pytest.mark.parametrize("harm", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_verdict_is_none(own_verdicts: Path, harm: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    prove_and_keep(["vLLM"])
    (path,) = own_verdicts.rglob("vllm-*.json")
    path.write_bytes(harm)
    monkeypatch.setattr(verdicts, "_of_this_process", {})
    assert last_verdict("vLLM") is None


def test_another_processor_has_verdicts_of_its_own(own_verdicts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prove_and_keep(["vLLM"])
    other = Processor("x86_64", "another", frozenset({"avx2"}))
    monkeypatch.setattr(verdicts, "this_processor", lambda: other)
    assert last_verdict("vLLM") is None


def test_another_number_of_gpus_has_verdicts_of_its_own(own_verdicts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver may be there before its GPUs are."""
    prove_and_keep(["CUDA"])
    before = last_verdict("CUDA")
    assert before
    monkeypatch.setattr(verdicts, "device_files", lambda: 99)
    assert last_verdict("CUDA") is None


@pytest.mark.parametrize("value", [",".join(f"GPU-{n:036d}" for n in range(8)), "", "/dev/null"])
def test_the_names_of_many_gpus_are_no_folder(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.so").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    seen = {proof.identity() for proof in all_proofs().values()}
    (tmp_path / "own.so").unlink()
    assert {proof.identity() for proof in all_proofs().values()} == seen, "the working directory has no part in it"


def test_a_verdict_is_kept_for_the_libraries_that_were_called(
    own_verdicts: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is replaced while its proof runs is unproven."""

    def prove_and_replace(proof: Proof, environment: Mapping[str, str]) -> Verdict:
        verdict = prove(proof, environment)
        os.utime(folder / "libllama.so")
        return verdict

    monkeypatch.setattr(verdicts, "prove", prove_and_replace)
    prove_and_keep(["llama.cpp"])
    assert last_verdict("llama.cpp") is None


def test_the_native_code_that_a_runtime_calls_in_other_packages_is_part_of_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = all_proofs()["GPTQModel"].identity()
    monkeypatch.syspath_prepend(str(module_with("pcre_ext_c", ABORT, tmp_path)))
    assert all_proofs()["GPTQModel"].identity() != before


@pytest.mark.parametrize(
    ("timed", "choice"),
    [
        ([(400.0, 200.0)] * 12, "bfloat16"),
        ([(210.0, 200.0)] * 12, "float32"),
        ([(400.0, 200.0)] * 10 + [(60.0, 200.0)] * 2, "bfloat16"),
        ([(400.0, 200.0)] * 8 + [(60.0, 200.0)] * 4, ""),
    ],
)
def test_measurements_that_contradict_each_other_choose_nothing(timed: list[tuple[float, float]], choice: str) -> None:
    from steps.runtime.torch_checks import fast_dtype_of

    assert fast_dtype_of(timed) == choice


@pytest.mark.parametrize("harm", [b"", b"\xff\xfe\x00", b"float16"])
def test_a_damaged_choice_is_made_anew(harm: bytes, own_verdicts: Path) -> None:
    verdicts._keep_choice(all_proofs()["torch"], "float32")
    (choice,) = own_verdicts.rglob("torch_cpu-fast-dtype-*.txt")
    choice.write_bytes(harm)
    assert kept_choice("torch") == ""
    assert verdicts._keep_choice(all_proofs()["torch"], "bfloat16") == "bfloat16"
    assert verdicts._keep_choice(all_proofs()["torch"], "float32") == "bfloat16"
    assert [path.name for path in choice.parent.iterdir()] == [choice.name]


def test_plan_and_run_compute_in_the_same_precision(own_verdicts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice outlives the verdict, of whose libraries only the times have changed."""
    monkeypatch.setattr(hardware, "gpus", list)
    for choice in ("float32", "bfloat16"):
        for path in own_verdicts.rglob("*.txt"):
            path.unlink()
        verdicts._keep_choice(all_proofs()["torch"], choice)
        assert last_verdict("torch") is None
        assert fast_dtype() == choice


def test_the_fast_precision_is_measured_once(own_verdicts: Path) -> None:
    (first,) = prove_and_keep(["torch"])
    (choice,) = own_verdicts.rglob("torch_cpu-fast-dtype-*.txt")
    assert choice.read_text() == first.facts["fast_dtype"]
    assert "faster_this_time" not in first.facts
    other = {"bfloat16": "float32", "float32": "bfloat16"}[str(first.facts["fast_dtype"])]
    choice.write_text(other)
    for path in own_verdicts.rglob("torch_cpu-*.json"):
        path.unlink()
    (second,) = prove_and_keep(["torch"])
    assert second.facts["fast_dtype"] == other, "a second measurement changed the keys of every training"
    assert second.facts["faster_this_time"] == first.facts["fast_dtype"]


@pytest.mark.parametrize("measured", ["bfloat16", "float32"])
def test_what_was_measured_is_what_steps_compute_in(measured: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict(
        runtime="torch", distribution="torch", status="works", version="1", identity="", facts={"fast_dtype": measured}
    )
    monkeypatch.setattr(hardware, "last_verdict", lambda _: verdict)
    assert fast_dtype() == measured


@pytest.mark.parametrize(
    ("model", "flags", "dtype"),
    [
        ("AMD EPYC", "avx2 avx512f avx512_bf16", "bfloat16"),
        ("AMD EPYC", "avx2", "float32"),
        ("Intel(R) Xeon(R)", "avx2 avx512f avx512_bf16", "float32"),
        ("Intel(R) Xeon(R)", "avx2 avx512f avx512_bf16 amx_tile amx_bf16", "bfloat16"),
    ],
)
def test_before_it_is_measured_the_processor_tells(
    model: str, flags: str, dtype: str, own_verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"processor\t: 0\nmodel name\t: {model}\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: none\n"
    monkeypatch.setattr(hardware, "last_verdict", lambda _: None)
    monkeypatch.setattr(hardware, "gpus", list)
    monkeypatch.setattr(hardware, "is_broken", lambda _: False)
    monkeypatch.setattr(hardware, "this_processor", lambda: read_processor(text, "x86_64"))
    assert fast_dtype() == dtype


def test_processors_differ_by_what_they_can_do() -> None:
    arm = read_processor(
        "processor : 0\nFeatures : fp asimd asimddp\nCPU implementer : 0x41\nCPU part : 0xd0c\n", "aarch64"
    )
    assert arm.features == {"fp", "asimd", "asimddp"}
    assert arm.model == "0x41 0xd0c"
    assert arm.level == "NEON"
    here = this_processor()
    assert here.identity == Processor(here.architecture, here.model, here.features).identity
    assert here.identity != Processor(here.architecture, here.model, here.features ^ {"amx_tile"}).identity
