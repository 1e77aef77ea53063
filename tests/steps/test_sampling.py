"""Sampling is what the model's distribution says, repeats and resumes to the byte, and what is kept of it teaches."""

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from scipy.stats import chisquare

from steps.artifacts import Samples, SamplesFacts
from steps.frame import Resources
from steps.lm.chat import token_ids
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.lm.generate import Decoding, questions, sample_answers, text_of
from steps.lm.rows import read_jsonl
from steps.lm.sampler import share
from steps.lm.tasks import EMPTY_THINKING, Task, read_tasks
from steps.lm.transformers_engine import TransformersEngine
from tests.conftest import Bench
from tests.steps.conftest import better, publish, solved, sort_row

TWO = Resources(processes=2, cpus=2)
SETTINGS = {"samples": 4, "max_new_tokens": 8, "rewards": [{"kind": "exact"}], "dtype": "float32", "seed": 11}


@pytest.fixture(scope="session")
def sampled(bench: Bench, sorting: Any, sorting_model: Any) -> Samples:
    return bench.run("data.sample", {"model": sorting_model, "data": sorting["train"]}, rows=400, **SETTINGS)[""]


@pytest.fixture(scope="session")
def engine(sorting_model: Any) -> Callable[..., tuple[TransformersEngine, Any]]:
    tokenizer = load_tokenizer(sorting_model.path)
    model = load_model(sorting_model.path, "float32")

    def make(**decoding: Any) -> tuple[TransformersEngine, Any]:
        how = Decoding(**{"dtype": "float32", **decoding})
        return TransformersEngine(model, tokenizer, how, sorting_model.facts.stop_token_ids), tokenizer

    return make


def answers(samples: Samples) -> dict[str, list[str]]:
    return {row["id"]: [each["text"] for each in row["samples"]] for row in read_jsonl(samples.rows_file)}


def row(identity: str, *samples: tuple[str, float | None, int, bool]) -> dict[str, Any]:
    made = [
        {"text": text, "score": score, "tokens": tokens, "truncated": truncated}
        for text, score, tokens, truncated in samples
    ]
    return {**sort_row((1, 2, 3)), "id": identity, "samples": made}


def samples_of(bench: Bench, name: str, *rows: dict[str, Any]) -> Samples:
    facts = SamplesFacts(rows=len(rows), samples=sum(len(each["samples"]) for each in rows))
    return publish(bench, Samples, name, rows, facts)


def test_facts_are_those_of_the_rows(sampled: Samples, sorting: Any) -> None:
    rows = list(read_jsonl(sampled.rows_file))
    every = [each for one in rows for each in one["samples"]]
    assert [each["id"] for each in rows] == [each.id for each in read_tasks(sorting["train"], 400)]
    right = [each["text"] == one["messages"][-1]["content"] for one in rows for each in one["samples"]]
    assert [each["score"] == 1 for each in every] == right
    assert sampled.facts.pass_rate == pytest.approx(sum(right) / len(right))
    assert 0.1 < sum(right) / len(right) < 0.6
    assert sampled.facts.statistics["mean_tokens"] == pytest.approx(sum(e["tokens"] for e in every) / 1600, abs=1e-6)
    assert sampled.facts.statistics["truncated"] == pytest.approx(sum(e["truncated"] for e in every) / 1600, abs=1e-6)
    assert "<|im_end|>" not in "".join(each["text"] for each in every)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_is_read_once_for_all_answers_to_it(
    engine: Callable[..., tuple[TransformersEngine, Any]], temperature: float
) -> None:
    writer, tokenizer = engine(temperature=temperature)
    tasks = [Task(each, ({"role": "user", "content": f"sort {each}"},), "", "test") for each in ("3 1 2", "3 1 2 9")]
    one, other = (list(each.ids) for each in questions(tokenizer, tasks, writer.decoding, 1))
    prompts = [one] * 4 + [other] * 3 + [one]
    keys = [f"answer-{number}" for number in range(len(prompts))]
    seen: list[tuple[int, ...]] = []
    hook = writer.model.register_forward_pre_hook(
        lambda _, args, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    together = writer.write(prompts, keys, 6)
    hook.remove()
    assert seen[0] == (3, len(other))
    assert set(seen[1:]) == {(8, 1)}
    alone = [writer.write([prompt], [key], 6)[0] for prompt, key in zip(prompts, keys, strict=True)]
    assert [each.ids for each in together] == [each.ids for each in alone]
    assert "_prefill" not in vars(writer.model)


def test_samples_repeat_and_resume_to_the_same_bytes(
    sorting: Any, sorting_model: Any, fresh: Callable[[], Bench]
) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"]}
    settings = {**SETTINGS, "rows": 40, "batch_size": 32}
    first, second, disturbed = fresh(), fresh(), fresh()
    undisturbed = first.run("data.sample", inputs, **settings)[""]
    assert second.run("data.sample", inputs, **settings)[""].digest == undisturbed.digest
    # As a kill leaves it: two batches of five done, the third half written.
    place = f"work/{undisturbed.manifest.key[:16]}/scratch"
    kept = (first.root / place / "answers/0.jsonl").read_text()
    assert kept.count("\n") == 5
    lines = kept.splitlines(keepends=True)
    (disturbed.root / place / "answers").mkdir(parents=True)
    (disturbed.root / place / "answers/0.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    assert disturbed.run("data.sample", inputs, **settings)[""].digest == undisturbed.digest
    # And what is kept is not sampled again.
    spoilt = fresh()
    (spoilt.root / place / "answers").mkdir(parents=True)
    (spoilt.root / place / "answers/0.jsonl").write_text(re.sub(r'"[\d ]+"', '"kept"', lines[0]))
    found = answers(spoilt.run("data.sample", inputs, **settings)[""])
    assert sum(text == "kept" for texts in found.values() for text in texts) > 16


def test_two_processes_give_the_bytes_of_one(sorting: Any, sorting_model: Any, fresh: Callable[[], Bench]) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"]}
    settings = {**SETTINGS, "rows": 40, "batch_size": 32}
    alone, shared, disturbed = fresh(), fresh(), fresh()
    one = alone.run("data.sample", inputs, **settings, resources=Resources(cpus=1))[""]
    two = shared.run("data.sample", inputs, **settings, resources=TWO)[""]
    assert two.digest == one.digest
    # Each wrote every other batch; after a kill either goes on with its own.
    scratch = f"work/{one.manifest.key[:16]}/scratch/answers"
    written = {part: (shared.root / scratch / f"{part}.jsonl").read_text().splitlines(True) for part in (0, 1)}
    assert [json.loads(line)[0] for line in written[0] + written[1]] == [0, 2, 4, 1, 3]
    (disturbed.root / scratch).mkdir(parents=True)
    (disturbed.root / scratch / "0.jsonl").write_text(written[0][0] + written[0][1][:20])
    (disturbed.root / scratch / "1.jsonl").write_text(written[1][0][:40])
    assert disturbed.run("data.sample", inputs, **settings, resources=TWO)[""].digest == one.digest


def test_a_group_of_gpus_answers_as_one() -> None:
    """Of eight GPUs that hold a model in pairs, every other process answers."""

    class Eight:
        resources = Resources(gpus=4, nodes=2)

        def __init__(self, rank: int) -> None:
            self.rank = rank

    decoding = Decoding(backend="vllm", tensor_parallel=2)
    parts = [share(decoding, Eight(rank)) for rank in range(8)]  # pyright: ignore[reportArgumentType]
    assert parts == [(0, 4), (None, 4), (1, 4), (None, 4), (2, 4), (None, 4), (3, 4), (None, 4)]


def test_an_answer_depends_on_its_own_task_and_number_alone(engine: Any, sorting: Any) -> None:
    tasks = read_tasks(sorting["train"], 48)
    runner, tokenizer = engine(max_new_tokens=8, seed=3)
    whole = sample_answers(runner, tokenizer, tasks, runner.decoding, samples=4)
    part = sample_answers(runner, tokenizer, tasks[20:5:-3], runner.decoding, samples=2)
    assert [[each.text for each in one] for one in part] == [[each.text for each in one[:2]] for one in whole[20:5:-3]]
    other, _ = engine(max_new_tokens=8, seed=4)
    assert sample_answers(other, tokenizer, tasks, other.decoding, samples=4) != whole
    assert len({each.text for one in whole for each in one}) > 40


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8}])
def test_samples_follow_the_models_distribution(pico: Any, how: dict[str, Any]) -> None:
    import torch

    tokenizer, decoding = load_tokenizer(pico.path), Decoding(max_new_tokens=1, dtype="float32", **how)
    runner = TransformersEngine(load_model(pico.path, "float32"), tokenizer, decoding, pico.facts.stop_token_ids)
    task = Task("t", ({"role": "user", "content": "def add(a, b):"},), "", "test")
    (question,) = questions(tokenizer, [task], runner.decoding, 1)
    with torch.inference_mode():
        logits = runner.model(input_ids=torch.tensor([question.ids])).logits[0, -1].double() / how.get("temperature", 1)
    probabilities, order = logits.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = (torch.arange(len(order)) < how.get("top_k", 10**6)) & (before < how.get("top_p", 1.1))
    wanted = probabilities[kept] / probabilities[kept].sum()
    count = 4000
    written = runner.write([question.ids] * count, [f"key {index}" for index in range(count)], 1)
    found = Counter(each.ids[0] for each in written)
    assert set(found) <= set(order[kept].tolist())
    often = (wanted * count >= 5).tolist()
    seen = [found[token] for token, use in zip(order[kept].tolist(), often, strict=True) if use]
    due = [float(share) * count for share, use in zip(wanted, often, strict=True) if use]
    rest = (count - sum(seen), count - sum(due))
    tail = ([rest[0]], [rest[1]]) if rest[1] >= 1 else ([], [])
    scale = (sum(seen) + sum(tail[0])) / (sum(due) + sum(tail[1]))
    assert len(due) > 2
    assert chisquare([*seen, *tail[0]], [scale * each for each in [*due, *tail[1]]]).pvalue > 1e-3


def test_greedy_takes_the_likeliest_token_and_stops(engine: Any, sorting: Any) -> None:
    import torch

    runner, tokenizer = engine(temperature=0, max_new_tokens=8)
    for task, (rollout,) in zip(
        tasks := read_tasks(sorting["eval"], 12),
        sample_answers(runner, tokenizer, tasks, runner.decoding),
        strict=True,
    ):
        (question,) = questions(tokenizer, [task], runner.decoding, 1)
        ids = list(question.ids)
        for _ in range(8):
            with torch.inference_mode():
                ids.append(int(runner.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in runner.stops:
                break
        own = ids[len(question.ids) :]
        assert rollout.text == tokenizer.decode(own, skip_special_tokens=True)
        assert rollout.tokens == len(own)
        assert rollout.truncated == (own[-1] not in runner.stops)


def test_a_thinking_budget_closes_the_thinking(pico: Any) -> None:
    tokenizer, model = load_tokenizer(pico.path), load_model(pico.path, "float32")
    task = Task("t", ({"role": "user", "content": "What is it?"},), "", "test")
    decoding = Decoding(thinking=True, max_new_tokens=40, thinking_end="</think>So: ", dtype="float32", seed=2)
    engine = TransformersEngine(model, tokenizer, decoding, pico.facts.stop_token_ids)
    found = sample_answers(engine, tokenizer, [task], decoding, samples=20, thinking_tokens=10)[0]
    asked = questions(tokenizer, [task], decoding, 20, 10)
    thoughts = engine.write([each.ids for each in asked], [each.key(decoding.seed) for each in asked], 10)
    end = len(token_ids(tokenizer, "</think>So: "))
    for rollout, thought in zip(found, thoughts, strict=True):
        begun = f"<think>\n{text_of(tokenizer, thought.ids)}"
        if thought.stopped:
            assert (rollout.text, rollout.tokens) == (begun, len(thought.ids))
        else:
            assert rollout.text.startswith(f"{begun}</think>So: ")
            assert 10 + end < rollout.tokens <= 40 + end
            assert rollout.answer.startswith("So:")
    assert sum(not each.stopped for each in thoughts) > 10


def test_no_thinking_is_an_empty_block_in_the_prompt(pico: Any) -> None:
    tokenizer = load_tokenizer(pico.path)
    task = Task("t", ({"role": "user", "content": "What is it?"},), "", "test")
    for decoding, budget in ((Decoding(thinking=False), None), (Decoding(thinking=True), 0)):
        (question,) = questions(tokenizer, [task], decoding, 1, budget)
        assert str(tokenizer.decode(list(question.ids))).endswith(f"assistant\n{EMPTY_THINKING}")
        assert question.opened == ""
    # A template that opens the thinking itself must not open it twice.
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"
    )
    for thinking, end in ((None, "<think>\n"), (True, "<think>\n"), (False, EMPTY_THINKING)):
        (question,) = questions(tokenizer, [task], Decoding(thinking=thinking), 1)
        text = str(tokenizer.decode(list(question.ids)))
        assert text.endswith(f"assistant\n{end}")
        assert text.count("<think>") == 1
        assert question.opened == ("" if thinking is False else "<think>\n")


def test_an_adapter_is_sampled_with(bench: Bench, sorting: Any, sorting_model: Any, pico: Any) -> None:
    inputs = {"model": sorting_model, "data": sorting["train"]}
    adapter = bench.run("train.sft", inputs, max_steps=5, learning_rate=3e-2, adapter={"kind": "lora", "rank": 4})[""]
    settings = {**SETTINGS, "rows": 40}
    plain = answers(bench.run("data.sample", inputs, **settings)[""])
    tuned = answers(bench.run("data.sample", {**inputs, "adapter": adapter}, **settings)[""])
    assert plain.keys() == tuned.keys()
    assert plain != tuned
    wrong = bench.attempt("data.sample", {"model": pico, "data": sorting["train"], "adapter": adapter}, **settings)
    assert wrong.status == "refused"
    assert f"the adapter was trained on {sorting_model.digest[:12]}, not on {pico.digest[:12]}" in wrong.message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"samples": 3, "temperature": 0}, "3 greedy answers are all the same"),
        ({"thinking_tokens": 8, "max_new_tokens": 8}, "thinking_tokens: 8 leaves nothing of max_new_tokens: 8"),
        ({"tensor_parallel": 2}, "tensor_parallel: 2 needs `backend: vllm`"),
        ({"thinking_end": "well"}, "it must contain </think>"),
        ({"rewards": [{"kind": "exact"}, {"kind": "exact"}]}, "two rewards are called `exact`"),
    ],
)
def test_bad_settings_are_refused_before_the_run(settings: dict[str, Any], said: str) -> None:
    from steps.data.sample import SampleData

    with pytest.raises(ValueError, match=re.escape(said)):
        SampleData.model_validate({"model": "base", "data": "data.train", **settings})


def test_answers_that_do_not_fit_are_refused(bench: Bench, sorting: Any, sorting_model: Any) -> None:
    result = bench.attempt("data.sample", {"model": sorting_model, "data": sorting["eval"]}, max_new_tokens=60)
    assert result.status == "refused"
    assert re.search(r"a prompt of \d+ tokens and an answer of 60 do not fit the model's context of 64", result.message)


def test_vllm_is_named_where_it_is_absent(bench: Bench, sorting: Any, sorting_model: Any) -> None:
    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    inputs = {"model": sorting_model, "data": sorting["eval"]}
    result = bench.attempt("data.sample", inputs, backend="vllm", **SETTINGS)
    assert result.status == "refused"
    assert "backend: vllm is not installed" in result.message


def test_rejection_keeps_verified_answers_only(bench: Bench, sampled: Samples) -> None:
    kept = bench.run("data.reject", {"samples": sampled}, keep="all")[""]
    rows = list(read_jsonl(kept.rows_file))
    assert len({row["id"] for row in rows}) == len(rows) == kept.facts.rows
    for each in rows:
        task, answer = (message["content"].split() for message in each["messages"])
        assert answer == sorted(task[1:])
    solvable = sum(any(each["score"] == 1 for each in one["samples"]) for one in read_jsonl(sampled.rows_file))
    statistics = kept.facts.statistics
    assert statistics["prompts_kept"] == solvable == len({row["messages"][0]["content"] for row in rows})
    dropped = sum(statistics.get(name, 0) for name in ("rejected", "truncated", "duplicate", "surplus", "empty"))
    assert dropped + kept.facts.rows == sampled.facts.samples


def test_rejection_chooses_counts_and_refuses(bench: Bench) -> None:
    samples = samples_of(
        bench,
        "choice",
        row("a", ("long right", 1.0, 9, False), ("right", 1.0, 3, False), ("right", 1.0, 3, False)),
        row("b", ("fine", 1.2, 8, False), ("ok", 1.0, 2, False), ("cut", 1.0, 4, True), ("no", 0.0, 1, False)),
        row("c", ("<think>x</think>yes", 1.0, 9, False), ("wrong", 0.3, 2, False)),
    )

    def texts(**settings: Any) -> list[str]:
        found = bench.run("data.reject", {"samples": samples}, **settings)[""]
        return [each["messages"][-1]["content"] for each in read_jsonl(found.rows_file)]

    assert texts() == ["right", "fine", "<think>x</think>yes"]
    assert texts(keep="shortest") == ["right", "ok", "<think>x</think>yes"]
    assert texts(keep="all", per_prompt=2) == ["long right", "right", "fine", "ok", "<think>x</think>yes"]
    assert texts(threshold=1.1) == ["fine"]
    assert texts(require_format="<think>.+</think>.+") == ["<think>x</think>yes"]
    one = bench.run("data.reject", {"samples": samples})[""].facts.statistics
    assert {name: one[name] for name in ("duplicate", "rejected", "surplus", "truncated")} == {
        "duplicate": 1,
        "rejected": 2,
        "surplus": 2,
        "truncated": 1,
    }
    none = bench.attempt("data.reject", {"samples": samples}, threshold=3.0)
    assert none.status == "refused"
    assert (
        "none of 9 answers is left (8 rejected, 1 truncated; the pass rate is 0.0% at threshold: 3.0)" in none.message
    )
    unverified = samples_of(bench, "unverified", row("a", ("x", None, 1, False)))
    asked = bench.attempt("data.reject", {"samples": unverified})
    assert asked.status == "refused"
    assert "were not verified" in asked.message
    assert bench.run("data.reject", {"samples": unverified}, threshold=None)[""].facts.rows == 1


def test_fine_tuning_on_kept_answers_solves_more(
    bench: Bench, sorting: Any, sorting_model: Any, sampled: Samples
) -> None:
    kept = bench.run("data.reject", {"samples": sampled})[""]
    tuned = bench.run(
        "train.sft",
        {"model": sorting_model, "data": kept},
        adapter={"kind": "full"},
        batch_size=64,
        max_steps=60,
        learning_rate=1e-3,
        dtype="float32",
    )[""]
    before, after = solved(bench, sorting_model, sorting["eval"]), solved(bench, tuned, sorting["eval"])
    assert better(before, after) < 0.01


def test_the_window_of_difficulty(bench: Bench, sampled: Samples) -> None:
    found = bench.run("data.filter_difficulty", {"samples": sampled}, min_pass_rate=0.25, max_pass_rate=0.75)[""]
    rates = {
        each["id"]: sum(one["score"] == 1 for one in each["samples"]) / 4 for each in read_jsonl(sampled.rows_file)
    }
    inside = [identity for identity, rate in rates.items() if 0.25 <= rate <= 0.75]
    rows = list(read_jsonl(found.rows_file))
    assert [each["id"] for each in rows] == inside
    assert set(rows[0]) == {"id", "messages", "source"}
    assert found.facts.statistics["too_hard"] == sum(rate == 0 for rate in rates.values())
    assert found.facts.statistics["too_easy"] == sum(rate == 1 for rate in rates.values())
    work = bench.root / "work" / found.manifest.key[:16]
    assert (work / "plots" / "pass_rate.svg").exists()
    hard = samples_of(bench, "hard", row("a", ("x", 0.0, 1, False)), row("b", ("x", 1.0, 1, False)))
    refused = bench.attempt("data.filter_difficulty", {"samples": hard})
    assert refused.status == "refused"
    assert "1 are harder, 1 easier" in refused.message


def test_kept_answers_are_plain_json(sampled: Samples, bench: Bench) -> None:
    lines = (bench.root / "work" / sampled.manifest.key[:16] / "scratch/answers/0.jsonl").read_text().splitlines()
    assert sum(len(written) for _, written in map(json.loads, lines)) == 1600
