"""Several processes share a step: the same losses as one, one voice, no orphans, and a plan that knows the machine."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from pydantic import ValidationError

from flows.execution import Slots
from flows.prepare import plan_recipe, prepare
from registry.home import Home
from steps.artifacts import Dataset, DatasetFacts
from steps.frame import Resources, UserError
from steps.frame.config import Launch
from steps.frame.scale import (
    DEEPSPEED,
    busy_cores,
    environment,
    join,
    lacking,
    launch_command,
    launcher_environment,
    stand_alone,
    threads,
)
from steps.lm.kept import Kept
from steps.runtime.gpus import gpus
from tests.conftest import Bench
from tests.steps.conftest import curve, publish

TWO = Resources(processes=2, cpus=2)
SETTINGS = {"adapter": {"kind": "full"}, "dtype": "float32", "epochs": 2, "learning_rate": 1e-3, "seed": 3}


def counts() -> Iterator[dict[str, Any]]:
    """Rows of very different lengths: in which batch one falls shows in the loss."""
    for number in range(88):
        numbers = " ".join(map(str, range(number, number + 1 + number % 13)))
        messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": numbers}]
        yield {"id": f"{number:02}", "messages": messages, "source": "counts"}


@pytest.fixture(scope="module")
def inputs(bench: Bench) -> dict[str, Any]:
    model = bench.run("model.pico", hidden=64, layers=2, vocabulary=320, context=128, pretrain_steps=0, seed=1)[""]
    return {"model": model, "data": publish(bench, Dataset, "counts", counts(), DatasetFacts(rows=88))}


@pytest.fixture(scope="module")
def shared(bench: Bench, inputs: dict[str, Any]) -> Any:
    """The model that two processes train with 4 rows each."""
    return bench.run("train.sft", inputs, batch_size=4, checkpoint_steps=5, resources=TWO, **SETTINGS)[""]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(
    bench: Bench, inputs: dict[str, Any], shared: Any
) -> None:
    alone = bench.run("train.sft", inputs, batch_size=8, checkpoint_steps=5, **SETTINGS)[""]
    one, two = curve(bench, alone, "loss"), curve(bench, shared, "loss")
    assert list(one) == list(two) == [1, 5, 10, 15, 20]
    assert two == pytest.approx(one, abs=1e-5)
    assert curve(bench, shared, "grad_norm") == pytest.approx(curve(bench, alone, "grad_norm"), abs=1e-4)


@pytest.mark.slow
def test_two_processes_ask_twice_the_tasks_in_a_step(bench: Bench, inputs: dict[str, Any]) -> None:
    """88 tasks, of which each process asks 11 in a step."""
    settings = {**SETTINGS, "epochs": 1, "batch_size": 44, "group_size": 4, "max_new_tokens": 6}
    rewards = [{"kind": "length", "target": 3}]
    policy = bench.run("train.grpo", inputs, rewards=rewards, resources=TWO, **settings)[""]
    assert list(curve(bench, policy, "loss")) == [1, 2, 3, 4]


@pytest.mark.slow
def test_audits_are_of_all_answers_and_a_condition_ends_all_processes(bench: Bench, inputs: dict[str, Any]) -> None:
    """The reward counts its calls in each process: 0, 2, 4, ... in the first, 1, 3, 5, ... in the second."""
    settings = {**SETTINGS, "epochs": 1, "batch_size": 8, "group_size": 4, "max_new_tokens": 6}
    source = """
import os
calls = 0
def score(rollouts):
    global calls
    calls += 1
    rank = int(os.environ["RANK"])
    if calls == 4 and {fails} == rank:
        raise ValueError("no idea")
    return [2.0 * calls + rank] * len(rollouts)
"""
    file = bench.root / "per_process.py"
    file.write_text(source.format(fails="-1"))
    reward = {"kind": "user", "path": f"{file}:score"}
    condition = {"metric": "reward/total", "above": 6.4}
    policy = bench.run("train.grpo", inputs, rewards=[reward], resources=TWO, **settings, stop_when=[condition])[""]
    assert curve(bench, policy, "reward/total") == {1: 2.5, 2: 4.5, 3: 6.5}
    work = bench.root / "work" / policy.manifest.key[:16]
    assert len((work / "scratch" / "audits.jsonl").read_text().splitlines()) == 3
    # Refused by the second process alone, at the fourth batch: both stop, with a checkpoint of the third step.
    file.write_text(source.format(fails="1"))
    spec = bench.spec("train.grpo", inputs, rewards=[reward], resources=TWO, **settings)
    result = bench.launcher.run(spec)
    assert result.status == "refused"
    assert "no idea" in result.message
    assert (spec.work / "scratch" / "checkpoints" / "checkpoint-3" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_main_process_speaks_for_all(bench: Bench, shared: Any) -> None:
    work = bench.root / "work" / shared.manifest.key[:16]
    assert (work / "log.txt").read_text().count("begins: sft (train.sft)") == 1
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line["values"]] == [1, 5, 10, 15, 20]
    # And rows, a summary, and the speed: four times and its mean.
    assert len(lines) == 12
    assert {path.name for path in work.iterdir()} == {
        "spec.json", "result.json", "progress.json", "metrics.jsonl", "log.txt", "scratch",
    }  # fmt: skip


@pytest.mark.slow
def test_killed_with_its_flow_it_leaves_no_process_and_goes_on_to_the_same_bytes(
    bench: Bench, inputs: dict[str, Any], shared: Any, fresh: Callable[[], Bench]
) -> None:
    other = fresh()
    spec = bench.spec("train.sft", inputs, batch_size=4, checkpoint_steps=5, resources=TWO, **SETTINGS)
    spec = spec.model_copy(update={"work": other.root / "work" / spec.work.name})
    code = (
        "import sys; from pathlib import Path; from steps.frame.launch import Launcher; "
        "from steps.frame.spec import StepSpec; "
        "Launcher([], Path(sys.argv[1])).run(StepSpec.model_validate_json(sys.argv[2]))"
    )
    flow = subprocess.Popen([sys.executable, "-c", code, str(other.root / "log.txt"), spec.model_dump_json()])
    deadline = time.monotonic() + 120
    while not list(spec.work.glob("scratch/checkpoints/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline and flow.poll() is None
        time.sleep(0.01)
    family = psutil.Process(flow.pid).children(recursive=True)
    # Fork server, launcher, and two processes of the step.
    assert len(family) >= 4
    flow.kill()
    flow.wait()
    assert not psutil.wait_procs(family, timeout=15)[1]
    result = bench.launcher.run(spec)
    assert "resuming from checkpoint-" in (spec.work / "log.txt").read_text()
    assert result.outputs == {"": shared.digest}


@pytest.mark.slow
def test_what_one_process_refuses_is_said_in_one_sentence(bench: Bench, inputs: dict[str, Any]) -> None:
    result = bench.attempt("train.sft", inputs, max_tokens=8, resources=TWO, **SETTINGS)
    assert result.status == "refused"
    assert "no row of `data` has an answer to learn within max_tokens: 8" in result.message
    assert "\n" not in result.message


@pytest.mark.slow
@pytest.mark.recipes
def test_two_nodes_give_what_two_processes_give(
    inputs: dict[str, Any], shared: Any, fresh: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both nodes are this machine; the second takes part by `posttrain join`."""
    bench = fresh()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29517")
    code = "from flows.cli import main; main()"
    second = {**os.environ, "NODE_RANK": "1", "POSTTRAIN_HOME": str(bench.root)}
    node = subprocess.Popen([sys.executable, "-c", code, "join"], env=second, stdout=subprocess.PIPE, text=True)
    try:
        nodes = Resources(nodes=2, processes=1, cpus=1)
        model = bench.run("train.sft", inputs, batch_size=4, checkpoint_steps=5, resources=nodes, **SETTINGS)[""]
        assert node.stdout is not None
        assert [node.stdout.readline() for _ in range(2)] == ["sft: joined\n", "sft: ended with code 0\n"]
    finally:
        node.kill()
        node.wait()
    assert model.digest == shared.digest


@pytest.mark.slow
@pytest.mark.recipes
def test_a_node_that_dies_while_sampling_ends_the_step(
    inputs: dict[str, Any], fresh: Callable[[], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first node has nothing but the shared folder to learn it from."""
    bench = fresh()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29518")
    code = "from flows.cli import main; main()"
    second = {**os.environ, "NODE_RANK": "1", "POSTTRAIN_HOME": str(bench.root)}
    node = subprocess.Popen([sys.executable, "-c", code, "join"], env=second)
    resources = Resources(nodes=2, processes=1, cpus=1)
    # One answer at a time: it must still be at work when it is killed.
    settings = {"samples": 40, "batch_size": 1, "max_new_tokens": 60, "dtype": "float32", "resources": resources}
    spec = bench.spec("data.sample", inputs, **settings)
    try:
        with ThreadPoolExecutor() as pool:
            running = pool.submit(bench.launcher.run, spec)
            deadline = time.monotonic() + 120
            while not list(spec.work.glob("scratch/**/1.jsonl")):
                assert time.monotonic() < deadline and not running.done()
                time.sleep(0.05)
            for each in psutil.Process(node.pid).children(recursive=True):
                if not each.children():
                    each.kill()
            result = running.result(timeout=240)
    finally:
        node.kill()
        node.wait()
    assert result.status == "failed"
    assert "its processes on node 1 ended with code" in result.message


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"launch": "fsdp2"}, "`launch: fsdp2` needs `gpus`"),
        ({"launch": "ddp-cpu", "gpus": 2}, "`launch: ddp-cpu` computes on processors"),
        ({"gpus": 4, "processes": 2}, "each GPU is driven by one process"),
        ({"launch": "fsdp3", "gpus": 2}, "Input should be"),
        ({"nodes": 0}, "greater than or equal to 1"),
    ],
)
def test_resources_that_contradict_each_other_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Resources.model_validate(values)


SAMPLING = """\
name: large
base: {uses: model.pico}
steps:
  data: {uses: data.prepare, source: python-stdlib-docs}
  one:
    uses: data.sample
    model: base
    data: data.train
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_a_package_that_settings_need_is_missed_by_the_plan(write: Callable[[str, str], Path], tmp_path: Path) -> None:
    path, home = write("large.yaml", SAMPLING + "    backend: vllm\n"), Home.at(tmp_path / "home")
    (step,) = plan_recipe(str(path), (), thorough=False, home=home).blocked
    assert step.reason.endswith("large.yaml:5: steps.one: its settings need vllm, which is not installed")


def test_more_gpus_than_there_are_is_refused_by_the_plan(write: Callable[[str, str], Path], tmp_path: Path) -> None:
    asked = len(gpus()) + 1
    path, home = write("large.yaml", SAMPLING + f"    resources: {{gpus: {asked}}}\n"), Home.at(tmp_path / "home")
    (step,) = plan_recipe(str(path), (), thorough=False, home=home).blocked
    assert f"large.yaml:9: steps.one.resources.gpus: {asked} GPU" in step.reason
    assert f"this machine has {len(gpus()) or 'none'}" in step.reason
    with pytest.raises(UserError, match=r"step `one` cannot run: .*asked for, this machine has"):
        prepare(str(path), (), home=home)


def test_several_nodes_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert lacking(Resources(nodes=2))[0] == "nodes"
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert lacking(Resources(nodes=2)) == ("", "")
    command = launch_command(Resources(nodes=2, processes=3), node=1)
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options["--num_processes"] == "6"
    assert options["--machine_rank"] == "1"
    assert options["--main_process_ip"] == "10.0.0.1"


def test_only_launchers_of_deepspeed_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "mine")
    assert (
        launcher_environment(Resources(gpus=2, launch="fsdp2"))
        == launcher_environment(Resources(gpus=1, launch="zero3"))
        == {}
    )
    found = launcher_environment(Resources(gpus=2, launch="zero3"))
    assert found["PYTHONPATH"].split(os.pathsep) == ["mine", str(DEEPSPEED)]
    assert (Path(found["PATH"].split(os.pathsep)[0]) / "ninja").exists()
    assert lacking(Resources(processes=2)) == ("", "")
    monkeypatch.setattr("steps.frame.scale.DEEPSPEED", tmp_path / "none")
    monkeypatch.setattr("steps.frame.scale.gpus", lambda: ("0", "1"))
    assert lacking(Resources(gpus=2, launch="zero2"))[1].endswith("not installed; run `make setup`")


def test_a_node_that_does_not_say_which_it_is_cannot_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for number in ("", "0", "first", "²", "01"):
        monkeypatch.setenv("NODE_RANK", number)
        with pytest.raises(UserError, match="set NODE_RANK to this node's number, from 1"):
            join(tmp_path)


OF_A_GROUP = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_NAME",
    "MASTER_ADDR",
    "TORCHELASTIC_USE_AGENT_STORE",
)


def test_what_a_cluster_says_of_ranks_does_not_reach_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OF_A_GROUP:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("RANKED", "kept")
    found = environment()
    assert not set(OF_A_GROUP) & set(found)
    assert found["RANKED"] == "kept"


def test_a_process_that_stands_alone_looks_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's own group would wait for the launcher's store, in which nobody answers."""
    for name in OF_A_GROUP:
        monkeypatch.setenv(name, "7")
    stand_alone(Resources(processes=8), 7)
    assert not set(OF_A_GROUP) & set(os.environ)
    stand_alone(Resources(processes=8), 7)


def test_a_process_does_not_wait_for_one_that_has_given_up(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="given up"):
        next(Kept(tmp_path, 0, 2, lambda: True).own(3))
    given_up = False
    kept = Kept(tmp_path, 0, 2, lambda: given_up)
    for index in kept.own(3):
        kept.add(index, [])
    assert [*kept.done] == [0, 2]
    given_up = True
    with pytest.raises(RuntimeError, match="given up"):
        kept.all(3)
    Kept(tmp_path, 1, 2).add(1, [])
    assert Kept(tmp_path, 0, 2, lambda: True).all(3) == [[], [], []]


@pytest.mark.parametrize("launch", get_args(Launch))
def test_accelerate_reads_every_profile(launch: Launch) -> None:
    resources = Resources(launch=launch, cpus=8, **({"processes": 4} if launch == "ddp-cpu" else {"gpus": 4}))
    words = [*launch_command(resources)[3:], "-m", "steps", "spec.json"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    chosen = [name for name in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(arguments, name)]
    assert chosen == [
        {"fsdp2": "use_fsdp", "zero2": "use_deepspeed", "zero3": "use_deepspeed"}.get(launch, "multi_gpu")
    ]
    assert (arguments.module, arguments.training_script, arguments.training_script_args) == (
        True,
        "steps",
        ["spec.json"],
    )
    assert (arguments.num_processes, arguments.num_machines, arguments.mixed_precision) == (4, 1, "no")
    assert arguments.num_cpu_threads_per_process == threads(resources) == 2
    if launch == "fsdp2":
        assert (arguments.fsdp_version, arguments.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")
    if launch.startswith("zero"):
        assert arguments.zero_stage == int(launch[-1])


def test_steps_that_run_at_once_get_gpus_of_their_own() -> None:
    slots = Slots(8, ["0", "1", "MIG-a"])
    with slots.taken(Resources(cpus=1, gpus=2)) as first, slots.taken(Resources(cpus=1, gpus=1)) as second:
        assert (first, second) == (("0", "1"), ("MIG-a",))
    with slots.taken(Resources(cpus=1)) as none:
        assert none == ()
    with slots.taken(Resources(gpus=3)) as all_three:
        assert all_three == ("0", "1", "MIG-a")


def test_threads_spin_less_where_others_need_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long they spin on an idle machine is not asked: the tests may share theirs."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    other = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        assert busy_cores() > 0.5
        assert environment()["GOMP_SPINCOUNT"] == "20000"
    finally:
        other.kill()
        other.wait()
