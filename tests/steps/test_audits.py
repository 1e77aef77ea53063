"""What the audits and their files hold against: a reward of the verifier's name, a kill in the middle of a line."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from steps.artifacts import cut_half_line, read_lines, write_atomic
from steps.frame import Job
from steps.frame.spec import StepSpec
from steps.train._audits import HISTORY_NAME, Audits
from steps.train._held_out import HeldOut
from steps.train._rl import best_folder
from steps.train.grpo import TrainGrpo, grpo_arguments
from steps.train.rewards import Reward, Scorer
from tests.steps.rollouts import rollout

READ: TypeAdapter[Any] = TypeAdapter(Reward)
SETTINGS = {"model": "base", "data": "data", "rewards": [{"kind": "exact"}]}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    spec = {"name": "rl", "kind": "train.grpo", "key": "k", "config": {}, "inputs": {}}
    return Job(StepSpec.model_validate({**spec, **dict.fromkeys(("work", "store", "cache"), tmp_path)}))


def audits_of(job: Job, rewards: Sequence[dict[str, Any]], verifier: dict[str, Any]) -> Audits:
    scorers = [Scorer(READ.validate_python(each)) for each in rewards]
    return Audits(job, scorers, Scorer(READ.validate_python(verifier)), group_size=2, epoch=9, stop_when=[])


@pytest.mark.parametrize("name", ["numeric", "lax"])
def test_a_laxer_reward_of_the_verifiers_kind_does_not_stand_in_for_it(name: str, job: Job) -> None:
    """Whatever it is called: all answers are rewarded, none is right."""
    lax = {"kind": "numeric", "tolerance": 1000, "name": name}
    audits = audits_of(job, [lax, {"kind": "length", "limit": 15, "weight": 0.1}], {"kind": "numeric", "name": name})
    audits.saw_rollouts([rollout("41"), rollout("40 and more words than that", tokens=20)])
    audits.log(1, {})
    (row,) = audits.history()
    assert row[f"reward/{name}"] == 1
    assert row["accuracy"] == 0
    assert row["hacking/rewarded_wrong"] > 0


def test_a_reward_that_is_the_verifier_is_asked_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    audits = audits_of(job, [{"kind": "exact", "weight": 2, "name": "mine"}], {"kind": "exact"})
    monkeypatch.setattr(audits.verifier, "_function", None)
    audits.saw_rollouts([rollout("42"), rollout("41")])
    audits.log(1, {})
    assert audits.history()[0]["accuracy"] == 0.5


def test_a_history_that_a_kill_cut_is_read_and_written_on(job: Job) -> None:
    file = job.scratch / HISTORY_NAME
    file.write_bytes(b'{"step": 1, "accuracy": 0.5}\n\xff\xfe\n{"step": 2, "accuracy": 0.75}\n{"step": 3, "accu')
    audits = audits_of(job, [{"kind": "exact"}], {"kind": "exact"})
    assert audits.resume(9) is None
    audits.record(3, {"accuracy": 1.0})
    assert [(row["step"], row["accuracy"]) for row in audits.history()] == [(1, 0.5), (2, 0.75), (3, 1.0)]


@pytest.mark.parametrize("content", [b"", b"[[1, 0.5", b"{}", b"[1]", b"\xff"])
def test_a_best_checkpoint_whose_history_is_unreadable_is_looked_for_anew(content: bytes, job: Job) -> None:
    best_folder(job).mkdir()
    (best_folder(job) / "history.json").write_bytes(content)
    held_out = HeldOut.__new__(HeldOut)
    held_out.job, held_out.history = job, []
    held_out._read_best()
    assert held_out.history == []


def test_state_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    write_atomic(file, b"one")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
        write_atomic(file, b"two")
    assert file.read_bytes() == b"one"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    cut_half_line(tmp_path / "nowhere")
    assert read_lines(tmp_path / "nowhere") == []
    file.write_bytes(json.dumps([1]).encode())
    cut_half_line(file)
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"loss": "cispo"}, 0.2, 5.0),
        ({"loss": "dapo", "epsilon": 0.1}, 0.1, 0.28),
        ({"loss": "gspo", "epsilon": 1e-3}, 1e-3, 4e-4),
        ({"loss": "grpo", "epsilon": 0.1}, 0.1, 0.1),
        ({"loss": "grpo"}, 0.2, 0.2),
        ({"loss": "dapo", "epsilon_high": 0.4}, 0.2, 0.4),
    ],
)
def test_a_lower_bound_leaves_a_loss_its_own_upper_one(settings: dict[str, Any], low: float, high: float) -> None:
    told = grpo_arguments(TrainGrpo.model_validate({**SETTINGS, **settings}))
    assert (told["epsilon"], told["epsilon_high"]) == (low, high)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rewards": [{"kind": "judge"}]}, "asks the step's input `judge`, which is not given"),
        ({"verifier": {"kind": "judge"}}, "asks the step's input `judge`, which is not given"),
        ({"judge": "other"}, "`judge` is given, but no reward of kind `judge` asks it"),
    ],
)
def test_a_reward_that_asks_a_model_is_refused_without_it(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainGrpo.model_validate({**SETTINGS, **settings})


def test_a_row_alone_in_its_batch_is_paired_with_anothers_answer() -> None:
    from steps.train._preference_tokens import Rated
    from steps.train.kto import rated_table

    rated = [Rated(prompt=[1], answer=[number], liked=True) for number in range(9)]
    table: Any = rated_table(rated, batch_size=4, seed=0)
    assert len(table) == 9
    assert all(row["KL_completion_ids"] != row["completion_ids"] for row in table)


def test_a_reward_models_head_is_not_muons() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from steps.train._muon import muon_for

    config: Any = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config.vocab_size, config.num_labels = 11, 3
    model: Any = LlamaForSequenceClassification(config)
    muons = {id(each) for each in muon_for(model, 1e-3, 0.1).param_groups[0]["params"]}
    assert id(model.score.weight) not in muons
    assert id(model.model.layers[0].mlp.up_proj.weight) in muons


def test_which_answer_is_preferred_is_not_rounded_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits in bfloat16 whose log-probabilities differ by less than bfloat16 can hold."""
    import torch

    from steps.train._preference_rate import log_probability_margins
    from steps.train._preference_tokens import Pair

    generator = torch.Generator().manual_seed(0)
    table = torch.randn(50, 50, generator=generator).bfloat16()

    class Bigrams(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: Any, **_: Any) -> Any:
            return SimpleNamespace(logits=table[input_ids])

    ids = torch.randint(50, (300, 2, 40), generator=generator).tolist()
    pairs = [Pair(prompt=[1], chosen=chosen, rejected=rejected) for chosen, rejected in ids]
    found = log_probability_margins(Bigrams(), pairs)  # pyright: ignore[reportArgumentType]
    exact = table.double().log_softmax(-1)

    def sum_of(answer: list[int]) -> float:
        return sum(exact[left, right].item() for left, right in zip([1, *answer], answer, strict=False))

    wanted = [sum_of(chosen) - sum_of(rejected) for chosen, rejected in ids]
    assert max(abs(one - other) for one, other in zip(found, wanted, strict=True)) < 1e-4


def test_an_answer_that_was_cut_off_is_scored_without_an_end(pico: Any) -> None:
    from steps.lm.checkpoint import load_tokenizer
    from steps.lm.reward_model import answer_ids

    tokenizer, stops = load_tokenizer(pico.path), pico.facts.stop_token_ids
    prompt = [{"role": "user", "content": "What is it?"}]
    whole = answer_ids(tokenizer, prompt, "forty-two", stops)
    assert whole[-1] in stops
    assert answer_ids(tokenizer, prompt, "forty-two", stops, finished=False) == whole[:-1]


def test_an_answer_without_an_end_may_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from steps.train.rewards import Models

    tools = Models()
    monkeypatch.setattr(Models, "reward_scores", lambda _, rollouts: [5.0] * len(rollouts))
    answers = [rollout("done"), replace(rollout("not do"), truncated=True)]
    for settings, wanted in (({}, [5.0, 5.0]), ({"missing_end": -1.0}, [5.0, -1.0])):
        assert Scorer(READ.validate_python({"kind": "reward_model", **settings}), tools)(answers) == wanted
