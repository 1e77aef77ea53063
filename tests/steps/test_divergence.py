"""A training that diverged ends in a sentence, never in an artifact; dropout that was asked for is not turned off."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, TrainingArguments

from steps.artifacts import Model, Preferences, PreferencesFacts
from steps.frame import Job, load_kind
from steps.frame.errors import ProofFailed
from steps.lm.checkpoint import load_model
from steps.train._checkpoints import train
from steps.train._preference_rate import preference_rate
from steps.train._preference_tokens import Pair
from tests.conftest import Bench
from tests.steps.conftest import publish, sort_row
from tests.steps.untrained import untrained

WILD = {"max_steps": 12, "batch_size": 4, "warmup": 0, "schedule": "constant_with_warmup", "dtype": "float32"}
TRAINERS = ["train.sft", "train.dpo", "train.kto", "train.orpo", "train.reward"]


@pytest.fixture(scope="module")
def model(bench: Bench) -> Model:
    return untrained(bench, 31)


@pytest.fixture(scope="module")
def compared(bench: Bench) -> Preferences:
    """Which way digits are sorted."""
    rows = []
    for digits in itertools.islice(itertools.permutations(range(5), 3), 24):
        prompt, answer = sort_row(digits)["messages"]
        worse = sort_row(digits, upward=False)["messages"][1]["content"]
        pair = {"chosen": answer["content"], "rejected": worse, "source": "sorting"}
        rows.append({"id": str(digits), "prompt": [prompt], **pair})
    return publish(bench, Preferences, "few", rows, PreferencesFacts(rows=len(rows), paired=True))


def data_for(kind: str, sorting: Any, compared: Preferences) -> Any:
    return sorting["eval"] if kind == "train.sft" else compared


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_a_training_that_diverges_fails(
    bench: Bench, sorting: Any, compared: Preferences, model: Model, kind: str, adapter: str
) -> None:
    inputs = {"model": model, "data": data_for(kind, sorting, compared)}
    result = bench.attempt(kind, inputs, adapter={"kind": adapter}, learning_rate=1e30, max_grad_norm=1e30, **WILD)
    assert result.status == "failed", result
    assert "the training diverged" in result.message and "lower `learning_rate`" in result.message


def test_a_preference_that_is_no_number_is_no_figure(model: Model) -> None:
    broken: Any = load_model(model.path, "float32")
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ProofFailed, match="of 1 of 1 held-out pairs are no numbers"):
        preference_rate(broken, [Pair([1, 5], [6, 2], [7, 2])])


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_adapters_dropout_is_felt_by_every_trainer(
    bench: Bench, sorting: Any, compared: Preferences, model: Model, kind: str
) -> None:
    inputs = {"model": model, "data": data_for(kind, sorting, compared)}
    digests = set()
    for dropout in (0.0, 0.5):
        settings = {**WILD, "max_steps": 2, "learning_rate": 1e-3, "adapter": {"kind": "lora", "dropout": dropout}}
        digests.add(bench.run(kind, inputs, **settings)[""].manifest.tree)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "cispo", "epsilon": 0.2}, "epsilon: loss: cispo has no such bound"),
        ({"loss": "sapo", "epsilon_high": 0.2}, "epsilon_high: loss: sapo has no such bound"),
        ({"stop_when": [{"metric": "kl", "above": 1}]}, "`kl` is never logged here: there is no reference"),
        ({"stop_when": [{"metric": "ratio/p99", "above": 5}]}, "`ratio/p99` is never logged here: a batch of rollouts"),
        ({"stop_when": [{"metric": "cispo_clip_ratio", "above": 1}]}, "`cispo_clip_ratio` is never logged here"),
        ({"stop_when": [{"metric": "held_out", "above": 1}]}, "`held_out` is never logged here: it is measured on"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_kind("train.grpo").config.model_validate(
            {"model": "m", "data": "d", "rewards": [{"kind": "exact"}], **settings}
        )


class Seen(TrainerCallback):
    """Notes what is logged, as callbacks that report do."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.logs.append(dict(logs))


@pytest.fixture
def scaled(
    fresh: Callable[[], Bench], sorting: Any, model: Model, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Train some steps in float16, its gradients scaled as on GPUs; return what was logged and the last scale."""

    def run(steps: int, optimizer: str, backoff: float) -> Any:
        bench, seen = fresh(), Seen()
        spec = bench.spec("train.sft", {"model": model, "data": sorting["eval"]})
        spec.work.mkdir(parents=True)
        job = Job(spec)
        arguments = TrainingArguments(
            str(job.scratch),
            max_steps=steps,
            optim=optimizer,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
        )
        rows: Any = [{"input_ids": [1, 5, 6, 2], "labels": [1, 5, 6, 2]}] * 8
        trainer = Trainer(load_model(model.path, "float32"), arguments, train_dataset=rows, callbacks=[seen])
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=backoff)
        trainer.accelerator.native_amp = True
        monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
        train(trainer, job)
        return seen.logs, trainer.accelerator.scaler.get_scale()

    return run


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_a_scale_that_is_too_high_skips_steps_and_the_training_goes_on(scaled: Any, optimizer: str) -> None:
    logs, scale = scaled(8, optimizer, 2.0**-6)
    assert scale < 2.0**30
    losses = [each["loss"] for each in logs if "loss" in each]
    norms = [each["grad_norm"] for each in logs if "grad_norm" in each]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert 0 < len(norms) < 8 and all(norm < float("inf") for norm in norms)


def test_gradients_that_no_scale_helps_are_a_divergence(scaled: Any) -> None:
    with pytest.raises(ProofFailed, match="of 20 steps in a row do not fit float16, at step 20"):
        scaled(25, "adamw_torch_fused", 0.9999)


def test_rloo_refuses_a_condition_on_what_only_grpo_logs() -> None:
    settings = {"rewards": [{"kind": "exact"}], "stop_when": [{"metric": "cispo_clip_ratio", "above": 0.5}]}
    with pytest.raises(ValueError, match=r"`cispo_clip_ratio` is never logged here: only `train\.grpo`"):
        load_kind("train.rloo").config.model_validate({"model": "m", "data": "d", **settings})


@pytest.mark.parametrize("kind", ["train.grpo", "train.rloo"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adapter": {"kind": "pissa"}, "kl": 0.1}, "a pissa adapter changes its base"),
        ({"kl": 0.1, "sync_reference": {}}, "an adapter's reference is its base"),
    ],
)
def test_a_reference_that_would_be_another_is_refused(kind: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_kind(kind).config.model_validate({"model": "m", "data": "d", "rewards": [{"kind": "exact"}], **settings})
