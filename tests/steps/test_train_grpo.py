"""Reinforcement learning learns, says what it does, stops when it should, and resumes to the same bytes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steps.frame import Job, Resources
from steps.frame.spec import StepSpec
from steps.lm.tasks import Rollout, Task
from steps.train._audits import Audits, RewardsEqual, repeated_share
from steps.train._rl import rl_arguments, task_order, total_steps
from steps.train._stopping import LOGGED, MEASURED, StopCondition, Stopping
from steps.train.grpo import TrainGrpo, grpo_arguments
from steps.train.rewards import REWARDS, Scorer
from steps.train.rloo import TrainRloo
from tests.conftest import Bench
from tests.steps.conftest import better, curve, run_and_kill, solved
from tests.steps.untrained import untrained

# Advantages of a group sum to nothing, so where ratios are one and every answer counts alike the loss is zero.
FIRST_LOSSES = {
    "grpo": (0, -0.088561),
    "dr_grpo": (0, -0.018689),
    "dapo": (0, -0.094238),
    "bnpo": (0, -0.088561),
    "cispo": (0.007526, 0.462178),
    "sapo": (-0.037962, -0.134292),
    "gspo": (0, -0.000116),
    "rloo": (0, -0.037587),
}
_AT_NIGHT = ("cispo", "grpo", "dr_grpo", "bnpo", "sapo", "gspo")

SETTINGS = {
    "adapter": {"kind": "full"},
    "rewards": [{"kind": "exact"}],
    "group_size": 8,
    "batch_size": 128,
    "max_new_tokens": 6,
    "learning_rate": 6e-4,
    "schedule": "constant_with_warmup",
    "warmup": 0.0,
    "dtype": "float32",
    "seed": 3,
}


def short(**changes: Any) -> dict[str, Any]:
    return {**SETTINGS, "batch_size": 32, "max_steps": 6, "checkpoint_steps": 2, **changes}


@pytest.fixture(scope="session")
def before(bench: Bench, sorting: Any, sorting_model: Any) -> list[bool]:
    found = solved(bench, sorting_model, sorting["eval"])
    assert sum(found) / len(found) < 0.5
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    ["dapo", *(pytest.param(loss, marks=pytest.mark.recipes) for loss in _AT_NIGHT)],
)
def test_every_loss_learns(bench: Bench, sorting: Any, sorting_model: Any, before: list[bool], loss: str) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"]}
    model = bench.run("train.grpo", inputs, loss=loss, max_steps=60, **SETTINGS)[""]
    after = solved(bench, model, sorting["eval"])
    assert sum(after) / len(after) > 0.8
    assert better(before, after) < 0.01


@pytest.mark.slow
def test_rloo_learns(bench: Bench, sorting: Any, sorting_model: Any, before: list[bool]) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"]}
    model = bench.run("train.rloo", inputs, max_steps=60, kl=0.01, **SETTINGS)[""]
    after = solved(bench, model, sorting["eval"])
    assert sum(after) / len(after) > 0.8
    assert better(before, after) < 0.01


def test_same_seed_gives_the_same_bytes(
    bench: Bench, sorting: Any, sorting_model: Any, fresh: Callable[[], Bench]
) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"]}
    first, second = (each.run("train.grpo", inputs, **short())[""] for each in (bench, fresh()))
    assert first.digest == second.digest
    assert curve(bench, first, "reward/exact")[1] == pytest.approx(curve(bench, first, "reward/total")[1])


@pytest.mark.parametrize("kind", ["train.grpo", "train.rloo"])
def test_a_killed_training_resumes_to_the_same_bytes(
    sorting: Any, sorting_model: Any, fresh: Callable[[], Bench], tmp_path: Path, kind: str
) -> None:
    flag = tmp_path / "kill"
    inputs = {"model": sorting_model, "data": sorting["train"]}
    # Four tasks and batches of four: every step is an epoch of its own, so the resumed run is beyond the first.
    # The condition is met at step 5, for which the steps before the kill count too.
    settings = short(
        rewards=[{"kind": "user", "path": f"{reward_file(tmp_path, KILLER, flag)}:score"}],
        kl=0.02,
        stop_when=[{"metric": "reward/total", "above": -9, "steps": 5}],
    )
    undisturbed = fresh().run(kind, inputs, **settings)[""]
    flag.touch()
    disturbed = fresh()
    assert disturbed.attempt(kind, inputs, **settings).status == "failed"
    flag.unlink()
    resumed = disturbed.run(kind, inputs, **settings)[""]
    assert "resuming from checkpoint-4" in log_of(disturbed, resumed)
    assert resumed.digest == undisturbed.digest
    assert max(curve(disturbed, resumed, "reward/total")) == 5


def test_a_kill_after_the_condition_was_met_trains_no_step_more(
    sorting: Any, sorting_model: Any, fresh: Callable[[], Bench]
) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"], "eval": sorting["eval"]}
    settings = short(stop_when=[{"metric": "reward/total", "above": -9, "steps": 4}], eval_steps=3)
    undisturbed = fresh().run("train.grpo", inputs, **settings)[""]
    disturbed = fresh()
    assert "SIGKILL" in run_and_kill(disturbed, "train.grpo", inputs, settings, beyond=3).message
    resumed = disturbed.run("train.grpo", inputs, **settings)[""]
    assert "training ends early" in log_of(disturbed, resumed)
    assert resumed.digest == undisturbed.digest


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise RuntimeError('no verifier here')", "reward `mine` raised RuntimeError: no verifier here"),
        ("return [1.0]", "reward `mine` returned 1 values for 32 answers"),
        ("return [float('nan')] * len(rollouts)", "reward `mine` returned nan for the answer"),
    ],
)
def test_a_reward_that_fails_is_named_and_leaves_a_checkpoint(
    bench: Bench, sorting: Any, sorting_model: Any, tmp_path: Path, body: str, said: str
) -> None:
    source = "calls = 0\ndef score(rollouts):\n    global calls\n    calls += 1\n    if calls == 4:\n        "
    path = tmp_path / "mine.py"
    path.write_text(f"{source}{body}\n    return [float(len(r.text) % 3) for r in rollouts]\n")
    settings = short(rewards=[{"kind": "user", "path": f"{path}:score", "name": "mine"}], checkpoint_steps=100)
    result = bench.attempt("train.grpo", {"model": sorting_model, "data": sorting["train"]}, **settings)
    assert result.status == "refused"
    assert said in result.message
    assert any(bench.root.glob("work/*/scratch/checkpoints/checkpoint-3/trainer_state.json"))


def test_rewards_that_never_differ_end_the_training(bench: Bench, sorting: Any, sorting_model: Any) -> None:
    few = {"model": sorting_model, "data": sorting["eval"]}
    settings = short(rewards=[{"kind": "pattern", "expression": "nothing like it"}], batch_size=800, max_steps=9)
    result = bench.attempt("train.grpo", few, **settings)
    assert result.status == "refused"
    assert "for a whole epoch (2 steps) all answers to a task were rewarded alike" in result.message


def test_the_best_checkpoint_by_the_verifier_is_given_out(bench: Bench, sorting: Any, sorting_model: Any) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"], "eval": sorting["eval"]}
    # A rate at which the policy breaks: the last weights are worse than some before.
    settings = short(learning_rate=3e-3, max_steps=12, eval_steps=2, eval_rows=64)
    model = bench.run("train.grpo", inputs, **settings)[""]
    scores = curve(bench, model, "held_out")
    assert sorted(scores) == [0, 2, 4, 6, 8, 10, 12]
    right = solved(bench, model, sorting["eval"], new_tokens=6)[:64]
    assert sum(right) / 64 == pytest.approx(max(scores.values()))
    assert scores[12] < max(scores.values())


def test_a_training_that_only_does_harm_says_so(bench: Bench, sorting: Any, sorting_model: Any) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"], "eval": sorting["eval"]}
    model = bench.run("train.grpo", inputs, **short(learning_rate=0.3, max_steps=2, eval_steps=1, eval_rows=64))[""]
    assert (model.path / "model.safetensors").read_bytes() == (sorting_model.path / "model.safetensors").read_bytes()
    assert "no step answered held-out tasks better than the start" in log_of(bench, model)


def test_a_condition_ends_the_training(bench: Bench, sorting: Any, sorting_model: Any) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"]}
    condition = {"metric": "accuracy", "above": 0.0, "steps": 3}
    model = bench.run("train.grpo", inputs, **short(stop_when=[condition]))[""]
    assert max(curve(bench, model, "reward/total")) == 3
    failing = bench.attempt("train.grpo", inputs, **short(stop_when=[{**condition, "then": "fail"}]))
    assert failing.status == "failed"
    assert "accuracy above 0 3 times in a row" in failing.message


# Something of which an untrained model's answers have more or less.
EARLY_LETTERS = """
def score(rollouts):
    return [sum(letter < "n" for letter in rollout.answer) / 8 for rollout in rollouts]
"""


@pytest.fixture(scope="module")
def beginner(bench: Bench) -> Any:
    """A model that is the same on every processor, and was taught nothing."""
    return untrained(bench, seed=11)


@pytest.mark.parametrize("loss", FIRST_LOSSES)
def test_first_losses(bench: Bench, sorting: Any, beginner: Any, tmp_path: Path, loss: str) -> None:
    """The second step learns from the same answers again, so its ratios are no longer one."""
    inputs = {"model": beginner, "data": sorting["train"]}
    rewards = [{"kind": "user", "path": f"{reward_file(tmp_path, EARLY_LETTERS, tmp_path)}:score"}]
    settings = short(iterations=2, max_steps=2, learning_rate=1e-3, rewards=rewards)
    if loss == "rloo":
        model = bench.run("train.rloo", inputs, **settings)[""]
    else:
        model = bench.run("train.grpo", inputs, loss=loss, **settings)[""]
    losses = curve(bench, model, "loss")
    assert (losses[1], losses[2]) == pytest.approx(FIRST_LOSSES[loss], abs=1e-5)


def test_ratios_leave_one_when_rollouts_are_used_again(bench: Bench, sorting: Any, sorting_model: Any) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"]}
    model = bench.run("train.grpo", inputs, **short(iterations=2, learning_rate=1e-3))[""]
    ratios = curve(bench, model, "ratio/max")
    assert ratios[1] == pytest.approx(1, abs=1e-4)
    assert ratios[2] > 1.001
    assert (bench.root / "work" / model.manifest.key[:16] / "plots" / "audits.png").exists()


def test_a_lora_policy_is_an_adapter_on_its_base(bench: Bench, sorting: Any, sorting_model: Any) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"]}
    adapter = bench.run("train.grpo", inputs, **short(adapter={"kind": "lora", "rank": 4}, kl=0.01))[""]
    assert adapter.facts.base == sorting_model.digest
    assert sorted(path.name for path in adapter.path.iterdir() if path.suffix) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "artifact.json",
    ]


def test_stop_conditions_count_in_a_row() -> None:
    stopping = Stopping([StopCondition(metric="entropy", below=0.1, steps=2)])
    assert [bool(stopping.check({"entropy": value})) for value in (0.05, 0.2, 0.05, 0.01)] == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("entropie", "no metric is called `entropie`; did you mean `entropy`?"),
        ("reward/lenght", "no metric is called `reward/lenght`; did you mean `reward/length`?"),
        ("held_out", "`held_out` is never logged here: it is measured on held-out tasks; name them as `eval:`"),
    ],
)
def test_a_condition_on_what_is_never_measured_is_refused(metric: str, said: str) -> None:
    settings = {"model": "base", "data": "data", "rewards": [{"kind": "exact"}, {"kind": "length", "target": 3}]}
    TrainGrpo.model_validate({**settings, "stop_when": [{"metric": "reward/length", "above": 1}]})
    with pytest.raises(ValueError, match=re.escape(said)):
        TrainGrpo.model_validate({**settings, "stop_when": [{"metric": metric, "above": 1}]})


def rollout(text: str, tokens: int = 1) -> Rollout:
    return Rollout(Task("t", ({"role": "user", "content": "?"},), "42", "test"), text, tokens)


_TWO_REWARDS = (("exact", {"kind": "exact"}), ("length", {"kind": "length", "target": 12, "weight": 3}))

KILLER = """
import os, signal
from pathlib import Path
calls = 0
def score(rollouts):
    global calls
    calls += 1
    if calls == 5 and Path({flag!r}).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(r.answer == r.task.answer) - 0.1 * len(r.answer) for r in rollouts]
"""


def reward_file(folder: Path, source: str, flag: Path) -> Path:
    path = folder / "reward.py"
    path.write_text(source.format(flag=str(flag)))
    return path


def log_of(bench: Bench, artifact: Any) -> str:
    return (bench.root / "work" / artifact.manifest.key[:16] / "log.txt").read_text()


def test_audits_tell_length_bias_hacking_and_dead_groups(tmp_path: Path) -> None:
    spec = StepSpec(
        name="rl",
        kind="train.grpo",
        key="k",
        config={},
        inputs={},
        work=tmp_path,
        store=tmp_path,
        cache=tmp_path,
        resources=Resources(),
    )
    exact, length = (Scorer(REWARDS[kind].spec.model_validate(settings)) for kind, settings in _TWO_REWARDS)
    audits = Audits(Job(spec), [exact, length], exact, group_size=2, epoch=2, stop_when=[])
    answers = [rollout("42"), rollout("41 is so much longer", 6), rollout("7"), rollout("7")]
    sums = audits.saw_rollouts(answers)
    audits.log(1, {"entropy": 0.5, "unrelated": 1.0})
    (row,) = audits.history()
    assert {*row} <= {"step", *LOGGED, *MEASURED, "reward/exact", "reward/length"}
    assert row["accuracy"] == 0.25
    assert row["groups/zero_variance"] == 0.5
    assert row["groups/distinct"] == 0.75
    assert row["length/right"] == 1
    assert row["entropy"] == 0.5
    assert "unrelated" not in row
    # The second answer is wrong and longer, and earns more than the right one: both audits say so.
    assert sums[1] > sums[0]
    assert row["hacking/rewarded_wrong"] == 0.25
    assert row["length/reward_correlation"] > 0.8
    dead = [rollout("7"), rollout("7"), rollout("8"), rollout("8")]
    for step in (2, 3):
        audits.saw_rollouts(dead)
        if step == 3:
            with pytest.raises(RewardsEqual, match="for a whole epoch"):
                audits.log(step, {})
        else:
            audits.log(step, {})


def test_repeated_text_is_measured() -> None:
    assert repeated_share("one two three four five") == 0
    assert repeated_share("again and again and " * 8) > 0.8


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_asks_each_task_once_however_many_processes_share_it(processes: int) -> None:
    settings = {"model": "base", "data": "data", "rewards": [{"kind": "exact"}], "epochs": 2, "batch_size": 8}
    config = TrainGrpo.model_validate({**settings, "group_size": 4, "updates_per_rollout": 2})
    tasks = [Task(str(number), ({"role": "user", "content": str(number)},), "", "test") for number in range(32)]
    # Four tasks of each process in a batch of rollouts, which serves two steps.
    steps = total_steps(config, len(tasks), processes)
    assert steps == 2 * 32 // (4 * processes) * 2
    asked = list(task_order(config, tasks, steps, processes)["task"])
    assert sorted(asked[:32]) == sorted(asked[32:]) == list(range(32))
    assert asked[:32] != asked[32:]


def vllm_job(tmp_path: Path) -> Job:
    spec = {"name": "rl", "kind": "train.grpo", "key": "k", "config": {}, "inputs": {}}
    places = dict.fromkeys(("work", "store", "cache"), tmp_path)
    return Job(StepSpec.model_validate({**spec, **places, "resources": Resources(gpus=2)}))


def test_vllm_rollouts_are_what_trl_is_told(tmp_path: Path) -> None:
    """TRL's own configs take the arguments; what vLLM does with them needs a GPU."""
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.rloo_config import RLOOConfig

    rollouts = {"kind": "vllm", "tensor_parallel": 2, "gpu_memory": 0.4, "importance_cap": 1.5}
    settings = {"model": "base", "data": "data", "rewards": [{"kind": "exact"}], "max_new_tokens": 100}
    config = TrainGrpo.model_validate({**settings, "rollouts": rollouts})
    told = GRPOConfig(**rl_arguments(config, vllm_job(tmp_path), 10, 28), **grpo_arguments(config))
    assert (told.use_vllm, told.vllm_mode, told.vllm_tensor_parallel_size) == (True, "colocate", 2)
    assert (told.vllm_gpu_memory_utilization, told.vllm_max_model_length) == (0.4, 128)
    # A token's weight is capped; by TRL's default a long answer would be dropped for the product of its tokens'.
    assert told.vllm_importance_sampling_correction is True
    assert (told.vllm_importance_sampling_mode, told.vllm_importance_sampling_clip_max) == ("token_truncate", 1.5)
    uncorrected = TrainGrpo.model_validate({**settings, "rollouts": {"kind": "vllm", "importance_cap": None}})
    assert grpo_arguments(uncorrected)["vllm_importance_sampling_correction"] is False
    server = {"kind": "vllm", "mode": "server", "url": "http://localhost:8000"}
    rloo = TrainRloo.model_validate({**settings, "rollouts": server})
    told = RLOOConfig(**rl_arguments(rloo, vllm_job(tmp_path), 10, 28))
    assert (told.vllm_mode, told.vllm_server_base_url) == ("server", "http://localhost:8000")
    with pytest.raises(ValueError, match="RLOO does not weigh tokens by importance"):
        TrainRloo.model_validate({**settings, "rollouts": rollouts})
