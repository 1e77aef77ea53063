"""Preferences: read from any layout; and DPO, ORPO and KTO, which learn from them, literally and resumably."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from steps.artifacts import Preferences
from steps.frame.kinds import load_kind
from steps.lm.rows import read_jsonl
from tests.steps import comparisons
from tests.steps.comparisons import comparison_rows, facts, margins
from tests.steps.conftest import better, curve, publish, run_and_kill

Write = Callable[[str, str], Path]
Row = Mapping[str, Any]

LEARNING: dict[str, Any] = {
    "adapter": {"kind": "full"},
    "batch_size": 64,
    "max_steps": 12,
    "learning_rate": 1e-3,
    "dtype": "float32",
    "seed": 3,
}
LN2 = math.log(2)
EPSILON = 0.001
FIRST_LOSSES = {
    "sigmoid": LN2,
    "sigmoid_norm": LN2,
    "hinge": 1.0,
    "ipo": (1 / (2 * 0.1)) ** 2,
    "robust": LN2,
    "exo_pair": (math.log(0.5) - math.log1p(-EPSILON)) / 2 + (math.log(0.5) - math.log(EPSILON)) / 2,
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "sppo_hard": 2 * (0.5 / 0.1) ** 2,
    "aot": LN2,
    "aot_unpaired": LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (LN2 + 1) / 2,
}
"""What each loss is where the policy is its own reference, by its paper's formula at beta 0.1."""


@pytest.fixture(scope="session")
def compared(bench: Any, sorting: Any) -> dict[str, Preferences]:
    """Preferences to learn from, held-out ones, and sixteen for one batch."""
    parts = {name: list(comparison_rows(sorting[name])) for name in ("train", "eval")}
    parts["few"] = parts["train"][:16]
    return {name: publish(bench, Preferences, f"compared-{name}", rows, facts(rows)) for name, rows in parts.items()}


@pytest.fixture(scope="session")
def before(sorting_model: Any, compared: dict[str, Preferences]) -> list[bool]:
    """Whether each held-out pair's right answer was the likelier before any training on preferences."""
    return [margin > 0 for margin in margins(sorting_model, compared["eval"])]


# --- data.preferences


def prepared(bench: Any, source: str, **config: Any) -> tuple[list[Row], list[Row]]:
    sides = bench.run("data.preferences", source=source, **config)
    held_out: list[Row] = list(read_jsonl(sides["eval"].rows_file)) if "eval" in sides else []
    return list(read_jsonl(sides["train"].rows_file)), held_out


def refusal(bench: Any, kind: str, inputs: Any = None, **config: Any) -> str:
    result = bench.attempt(kind, inputs, **config)
    assert result.status == "refused", result
    assert "\n" not in result.message
    return result.message


@pytest.fixture
def jsonl(write: Write) -> Callable[..., str]:
    return lambda *rows: str(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


def test_known_layouts_become_the_same_row(bench: Any, jsonl: Callable[..., str]) -> None:
    user = {"role": "user", "content": "one?"}
    good, bad = {"role": "assistant", "content": "1"}, {"role": "assistant", "content": "2"}
    layouts: list[tuple[Row, dict[str, Any]]] = [
        ({"prompt": "one?", "chosen": "1", "rejected": "2"}, {}),
        ({"prompt": [user], "chosen": [good], "rejected": [bad]}, {}),
        ({"prompt": "one?", "chosen": [user, good], "rejected": [user, bad], "score": 3}, {}),
        ({"chosen": [user, good], "rejected": [user, bad]}, {}),
        ({"q": "one?", "yes": "1", "no": "2"}, {"columns": {"prompt": "q", "chosen": "yes", "rejected": "no"}}),
    ]
    rows = [prepared(bench, jsonl(row), eval_fraction=0, **config)[0][0] for row, config in layouts]
    assert rows[0]["prompt"] == [user]
    assert (rows[0]["chosen"], rows[0]["rejected"]) == ("1", "2")
    assert {row["id"] for row in rows} == {rows[0]["id"]}


def test_rated_answers_keep_one_side(bench: Any, jsonl: Callable[..., str]) -> None:
    labels = [True, "false", 0, "1"]
    source = jsonl(*({"prompt": f"{n}?", "completion": f"{n}", "label": label} for n, label in enumerate(labels)))
    sides = bench.run("data.preferences", source=source, eval_fraction=0)
    rows = sorted(read_jsonl(sides["train"].rows_file), key=lambda row: row["prompt"][0]["content"])
    assert [row["chosen"] is not None for row in rows] == [True, False, False, True]
    assert [row["rejected"] is not None for row in rows] == [False, True, True, False]
    assert not sides["train"].facts.paired
    assert sides["train"].facts.statistics["liked"] == 2


def test_rows_of_one_prompt_stay_together_and_duplicates_go(bench: Any, jsonl: Callable[..., str]) -> None:
    rows = [{"prompt": f"{n % 40}?", "chosen": f"good {n}", "rejected": "bad"} for n in range(200)]
    train, held_out = prepared(bench, jsonl(*rows, *rows[:30]), eval_fraction=0.25)
    asked = [{row["prompt"][0]["content"] for row in side} for side in (train, held_out)]
    assert len(train) + len(held_out) == 200
    assert not asked[0] & asked[1]
    assert 4 <= len(asked[1]) <= 18
    # Which side a prompt is on does not depend on the rows beside it.
    _, again = prepared(bench, jsonl(*rows[:100]), eval_fraction=0.25)
    assert {row["id"] for row in again} <= {row["id"] for row in held_out}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "same", "rejected": "same "}, "`chosen` and `rejected` are the same answer"),
        ({"prompt": "a", "text": "b"}, "no known layout in `prompt`"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "`label` is 'good'; it must be true (liked) or false"),
        ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "`chosen`, the assistant turn, is empty"),
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "c"}],
            },
            "differ before their last answer",
        ),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(bench: Any, jsonl: Callable[..., str], row: Row, says: str) -> None:
    message = refusal(bench, "data.preferences", source=jsonl({"prompt": "a", "chosen": "b", "rejected": "c"}, row))
    assert "rows.jsonl line 2: " in message
    assert says in message


# --- what the methods learn


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("train.dpo", {}),
    "ipo": ("train.dpo", {"loss": "ipo"}),
    "simpo": ("train.dpo", {"loss": "simpo"}),
    "orpo": ("train.orpo", {"beta": 1.0}),
    "kto": ("train.kto", {}),
}


@pytest.mark.parametrize("method", METHODS)
def test_held_out_preferences_rise(
    bench: Any, sorting_model: Any, compared: dict[str, Preferences], before: list[bool], method: str
) -> None:
    kind, settings = METHODS[method]
    inputs = {"model": sorting_model, "data": compared["train"], "eval": compared["eval"]}
    trained = bench.run(kind, inputs, **{**LEARNING, **settings})[""]
    metrics = bench.last.metrics
    after = [margin > 0 for margin in margins(trained, compared["eval"])]
    assert better(before, after) < 0.01
    assert (metrics["preference_rate_before"], metrics["preference_rate"]) == (np.mean(before), np.mean(after))
    held_out = curve(bench, trained, "eval_rewards/margins")
    assert held_out[max(held_out)] > held_out[0]


def test_an_adapter_learns_without_a_copy_of_itself(
    bench: Any, sorting_model: Any, compared: dict[str, Preferences]
) -> None:
    inputs = {"model": sorting_model, "data": compared["train"], "eval": compared["eval"]}
    trained = bench.run("train.dpo", inputs, **LEARNING | {"adapter": {"kind": "lora"}, "learning_rate": 5e-3})[""]
    assert trained.kind == "Adapter"
    assert not [path for path in trained.path.iterdir() if path.is_dir()]
    assert bench.last.metrics["preference_rate_before"] < 0.5 < 0.9 < bench.last.metrics["preference_rate"]


# --- first losses


def first_loss(bench: Any, kind: str, inputs: Any, **config: Any) -> float:
    trained = bench.run(kind, inputs, **{**LEARNING, "max_steps": 1, "batch_size": 16, **config})[""]
    return curve(bench, trained, "loss")[1]


@pytest.mark.parametrize("loss", FIRST_LOSSES)
def test_first_loss_of_each_dpo_loss(
    bench: Any, sorting_model: Any, compared: dict[str, Preferences], loss: str
) -> None:
    smoothing = {"exo_pair": EPSILON, "robust": 0.1}.get(loss, 0.0)
    inputs = {"model": sorting_model, "data": compared["few"]}
    found = first_loss(bench, "train.dpo", inputs, loss=loss, label_smoothing=smoothing)
    assert found == pytest.approx(FIRST_LOSSES[loss], rel=1e-6)
    if loss == "sigmoid":
        assert found == np.float32(LN2)


@pytest.mark.parametrize("adapter", ["lora", "qlora", "dora", "pissa", "oft"])
def test_an_adapter_begins_as_its_own_reference(
    bench: Any, sorting_model: Any, compared: dict[str, Preferences], adapter: str
) -> None:
    inputs = {"model": sorting_model, "data": compared["few"]}
    found = first_loss(bench, "train.dpo", inputs, adapter={"kind": adapter})
    # PiSSA's weights are another sum of the same parts, DoRA's are divided by their own norm.
    exact = adapter in ("lora", "qlora", "oft")
    assert found == (np.float32(LN2) if exact else pytest.approx(LN2, abs=1e-5))


def test_a_reference_may_be_named(bench: Any, sorting_model: Any, compared: dict[str, Preferences]) -> None:
    inputs = {"model": sorting_model, "data": compared["few"], "reference": sorting_model}
    assert first_loss(bench, "train.dpo", inputs) == np.float32(LN2)
    far = bench.run("train.dpo", {"model": sorting_model, "data": compared["few"]}, **LEARNING)[""]
    assert first_loss(bench, "train.dpo", {**inputs, "model": far}) < 0.5


def test_first_losses_of_kto(bench: Any, sorting_model: Any, compared: dict[str, Preferences]) -> None:
    inputs = {"model": sorting_model, "data": compared["few"]}
    assert first_loss(bench, "train.kto", inputs, batch_size=32) == 0.5
    assert first_loss(bench, "train.kto", inputs, batch_size=32, loss="apo_zero_unpaired") == 0.5


def test_first_losses_of_simpo_and_orpo(bench: Any, sorting_model: Any, compared: dict[str, Preferences]) -> None:
    import torch
    from torch.nn.functional import cross_entropy, logsigmoid

    from steps.lm.checkpoint import load_model

    model = load_model(sorting_model.path, "float32")

    def losses(prompt: list[int], answer: list[int]) -> Any:
        """Negative log-likelihood of each token after the first."""
        ids = torch.tensor([prompt + answer])
        return cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")

    chosen, rejected, whole = [], [], []
    with torch.no_grad():
        for pair in comparisons.pairs(compared["few"], sorting_model):
            good, bad = losses(pair.prompt, pair.chosen), losses(pair.prompt, pair.rejected)
            chosen.append(-good[-len(pair.chosen) :].mean())
            rejected.append(-bad[-len(pair.rejected) :].mean())
            whole.append(good)
    ours, theirs = torch.stack(chosen), torch.stack(rejected)
    simpo = -logsigmoid(2.0 * (ours - theirs) - 0.5).mean().item()
    log_odds = (ours - theirs) - (torch.log1p(-ours.exp()) - torch.log1p(-theirs.exp()))
    orpo = (torch.cat(whole).mean() - 0.1 * logsigmoid(log_odds).mean()).item()
    inputs = {"model": sorting_model, "data": compared["few"]}
    assert first_loss(bench, "train.dpo", inputs, loss="simpo") == pytest.approx(simpo, rel=1e-5)
    assert first_loss(bench, "train.orpo", inputs) == pytest.approx(orpo, rel=1e-5)


# --- the same again


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("train.dpo", {}),
        ("train.dpo", {"loss": "simpo", "adapter": {"kind": "full"}}),
        ("train.orpo", {}),
        ("train.kto", {}),
        ("train.reward", {}),
    ],
)
def test_killed_midway_it_ends_in_the_same_bytes(
    sorting_model: Any, compared: dict[str, Preferences], fresh: Callable[[], Any], kind: str, settings: dict[str, Any]
) -> None:
    inputs = {"model": sorting_model, "data": compared["train"], "eval": compared["few"]}
    settings = LEARNING | {
        "adapter": {"kind": "lora", "dropout": 0.1},
        "batch_size": 16,
        "checkpoint_steps": 4,
        "max_steps": 24,
        **settings,
    }
    undisturbed = fresh().run(kind, inputs, **settings)[""]
    bench = fresh()
    assert "SIGKILL" in run_and_kill(bench, kind, inputs, settings).message, "it was killed before its end"
    assert bench.run(kind, inputs, **settings)[""].digest == undisturbed.digest
    log = bench.root / "work" / undisturbed.manifest.key[:16] / "log.txt"
    assert "resuming from checkpoint-" in log.read_text()


@pytest.mark.parametrize(
    ("kind", "settings"), [("train.dpo", {}), ("train.dpo", {"loss": "simpo"}), ("train.orpo", {}), ("train.kto", {})]
)
def test_a_second_run_is_bit_equal(
    sorting_model: Any, compared: dict[str, Preferences], fresh: Callable[[], Any], kind: str, settings: dict[str, Any]
) -> None:
    inputs = {"model": sorting_model, "data": compared["few"]}
    settings = LEARNING | settings | {"max_steps": 4, "batch_size": 8}
    runs = [fresh().run(kind, inputs, **settings)[""] for _ in range(2)]
    assert runs[0].digest == runs[1].digest


# --- what is refused


def test_rows_without_a_preference_are_refused(
    bench: Any, sorting_model: Any, compared: dict[str, Preferences]
) -> None:
    rows = list(read_jsonl(compared["few"].rows_file))
    equal = [*rows, {**rows[0], "id": "equal", "rejected": rows[0]["chosen"]}]
    lone = [*rows, {**rows[0], "id": "lone", "rejected": None}]
    equal_data = publish(bench, Preferences, "equal", equal, facts(equal))
    lone_data = publish(bench, Preferences, "lone", lone, facts(lone, paired=False))
    for kind in ("train.dpo", "train.orpo", "train.reward"):
        message = refusal(bench, kind, {"model": sorting_model, "data": equal_data}, max_steps=1)
        assert "row equal of `data` has the same answer on both sides" in message
        message = refusal(bench, kind, {"model": sorting_model, "data": lone_data}, max_steps=1)
        assert "row lone of `data` has no rejected answer" in message
        assert "`train.kto` takes one alone" in message
    assert first_loss(bench, "train.kto", {"model": sorting_model, "data": lone_data}, batch_size=33) == 0.5


def test_what_does_not_fit_is_refused(
    bench: Any, sorting_model: Any, pico: Any, compared: dict[str, Preferences]
) -> None:
    inputs = {"model": sorting_model, "data": compared["few"]}
    assert "no row of `data` has an answer within max_tokens: 8" in refusal(bench, "train.dpo", inputs, max_tokens=8)
    other = refusal(bench, "train.dpo", {**inputs, "reference": pico}, max_steps=1)
    assert "`reference` has another tokenizer than `model`" in other


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("train.dpo", {"loss": "exo_pair"}, "exo_pair needs label_smoothing above 0"),
        ("train.dpo", {"loss": "hinge", "label_smoothing": 0.1}, "`hinge` has none"),
        ("train.dpo", {"loss": "simpo", "reference": "base"}, "`simpo` compares with none"),
        ("train.kto", {"batch_size": 1}, "a batch needs at least 2 rows"),
        ("train.reward", {"adapter": {"kind": "qlora"}}, "4-bit weights cannot be"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_the_plan(
    kind: str, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        load_kind(kind).config.model_validate({"model": "base", "data": "data", **settings})
