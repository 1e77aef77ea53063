"""The comparison tells equal models from unequal ones, in every runtime, and gives the same report twice."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from calibration_rows import publish_conversations
from variants import replace, scale_noise, variant

from steps.artifacts import Dataset, Model, Report
from steps.evaluate._measure import Contender, Measured
from steps.evaluate._notes import endless
from steps.evaluate._process import run_in_child
from steps.evaluate._runtimes import Generation
from steps.evaluate._samples import Sample
from steps.evaluate._summary import judge
from steps.frame import UserError
from steps.lm.chat import token_ids
from steps.lm.checkpoint import load_tokenizer
from steps.lm.rows import read_jsonl

SMALL = {"rows": 8, "max_tokens": 160, "generate_rows": 3, "new_tokens": 12}
NAMES = ("same", "noised", "q8", "gptq")


@pytest.fixture(scope="module")
def data(bench: Any) -> Dataset:
    return publish_conversations(bench.store)


@pytest.fixture(scope="module")
def noised(bench: Any, pico: Model) -> Model:
    return variant(bench.store, pico, scale_noise(0.5))


@pytest.fixture(scope="module")
def inputs(bench: Any, pico: Model, noised: Model, data: Dataset) -> dict[str, Any]:
    gguf = bench.run("quantize.gguf", {"model": pico}, scheme="Q8_0")[""]
    gptq = bench.run("quantize.gptq", {"model": pico, "calibration": data}, bits=4, group_size=64, calibration_rows=8)
    return {"reference": pico, "candidates": [pico, noised, gguf, gptq[""]], "data": data}


@pytest.fixture(scope="module")
def report(bench: Any, inputs: dict[str, Any]) -> Report:
    return bench.run("evaluate.compare", inputs, reference_name="pico", names=NAMES, **SMALL)[""]


def test_a_model_equals_itself(report: Report) -> None:
    metrics = report.facts.metrics
    assert metrics["same/kl"] == pytest.approx(0, abs=2e-6)
    assert metrics["same/top1_agreement"] == 1
    assert metrics["same/perplexity"] == metrics["pico/perplexity"]
    assert metrics["same/answer_score"] == metrics["pico/answer_score"]
    assert "pico/kl" not in metrics


def test_noise_costs_perplexity_and_divergence(report: Report) -> None:
    metrics = report.facts.metrics
    assert metrics["noised/kl"] > 0.02
    assert metrics["noised/top1_agreement"] < 0.95
    assert metrics["noised/perplexity"] > metrics["pico/perplexity"] * 1.005


def test_eight_bits_in_llama_cpp_stay_close(report: Report) -> None:
    metrics = report.facts.metrics
    assert 0 < metrics["q8/kl"] < 0.01
    assert metrics["q8/top1_agreement"] > 0.9
    assert metrics["q8/perplexity"] == pytest.approx(metrics["pico/perplexity"], rel=0.02)
    assert metrics["q8/size_bytes"] < 0.6 * metrics["pico/size_bytes"]


def test_four_bits_diverge_more_than_eight_but_less_than_noise(report: Report) -> None:
    metrics = report.facts.metrics
    assert metrics["q8/kl"] < metrics["gptq/kl"] < metrics["noised/kl"]


def test_rows_hold_every_sample_of_every_candidate(report: Report, data: Dataset) -> None:
    rows = list(read_jsonl(report.rows_file))
    assert len(rows) == 5 * SMALL["rows"]
    known = {row["id"]: row["messages"] for row in read_jsonl(data.rows_file)}
    for row in rows:
        assert [*row["prompt"], {"role": "assistant", "content": row["reference_answer"]}] == known[row["sample"]]
        assert 0 < row["tokens"] < SMALL["max_tokens"]
        assert (row["kl"] is None) == (row["candidate"] == "pico")
    answered = [row for row in rows if row["answer"] is not None]
    assert len(answered) == 5 * SMALL["generate_rows"]
    assert all(0 <= row["score"] <= 1 and "<|im_end|>" not in row["answer"] for row in answered)
    # The same weights in two runtimes begin to answer alike.
    first = {row["candidate"]: row["answer"][:8] for row in answered if row["sample"] == answered[0]["sample"]}
    assert first["pico"] == first["same"] == first["q8"]


def test_summary_and_table_agree_with_the_rows(report: Report) -> None:
    content = json.loads((report.path / "summary.json").read_text())
    assert content["reference"] == "pico"
    assert list(content["candidates"]) == ["pico", *NAMES]
    for name, metrics in content["candidates"].items():
        low, high = content["intervals"][name]["perplexity"]
        assert low <= metrics["perplexity"] <= high
        assert f"| {name} | {metrics['perplexity']:.3f}" in (report.path / "table.md").read_text()
        assert not {"tokens_per_second", "peak_memory_bytes"} & set(metrics)


def test_same_work_same_digest_and_speed_only_in_the_metrics(
    bench: Any, inputs: dict[str, Any], report: Report
) -> None:
    result = bench.attempt("evaluate.compare", inputs, reference_name="pico", names=NAMES, **SMALL)
    assert result.outputs[""] == report.digest
    for name in ("pico", "same", "noised", "q8"):
        assert result.metrics[f"{name}/tokens_per_second"] > 0
        assert result.metrics[f"{name}/prompt_tokens_per_second"] > 0
        assert 1e6 < result.metrics[f"{name}/peak_memory_bytes"] < 1e9
    # GPTQ runs unpacked here: that tells nothing of its speed.
    assert "gptq/tokens_per_second" not in result.metrics and "gptq/kl" in result.metrics
    work = next(path for path in (bench.root / "work").iterdir() if (path / "plots/kl_divergence.png").exists())
    assert (work / "plots" / "quality_against_size.svg").stat().st_size > 1000
    assert not list((work / "scratch").iterdir())


def test_another_template_is_refused_by_both_names(bench: Any, pico: Model, data: Dataset) -> None:
    other = variant(bench.store, pico, lambda path: replace(path / "chat_template.jinja", "{{ messages[0].content }}"))
    inputs = {"reference": pico, "candidates": [other], "data": data}
    result = bench.attempt("evaluate.compare", inputs, reference_name="merged", names=("stranger",), **SMALL)
    assert result.status == "refused"
    assert "`stranger`" in result.message and "`merged`" in result.message and "template" in result.message


def test_another_tokenizer_is_refused(bench: Any, pico: Model, data: Dataset) -> None:
    def swap(path: Path) -> None:
        content = json.loads((path / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
        replace(path / "tokenizer.json", json.dumps(content))

    inputs = {"reference": pico, "candidates": [variant(bench.store, pico, swap)], "data": data}
    result = bench.attempt("evaluate.compare", inputs, **SMALL)
    assert result.status == "refused"
    assert "`model` tokenises sample" in result.message


def test_weights_that_are_not_numbers_fail_by_name(bench: Any, pico: Model, data: Dataset) -> None:
    broken = variant(bench.store, pico, scale_noise(float("nan")))
    inputs = {"reference": pico, "candidates": [broken], "data": data}
    result = bench.attempt("evaluate.compare", inputs, names=("broken",), **SMALL)
    assert result.status == "failed"
    assert "broken: its logits on sample" in result.message


def test_thinking_between_special_tags_is_told_from_the_answer(pico: Model) -> None:
    tokenizer = load_tokenizer(pico.path)
    tags: Any = ["<think>", "</think>"]
    tokenizer.add_special_tokens({"extra_special_tokens": tags})
    expected = "<think>\nhm\n</think>\n\n1 2 3"
    ids = token_ids(tokenizer, expected + "<|im_end|>")
    sample = Sample("one", [{"role": "user", "content": "Count."}], expected, "", ids, 0, len(ids))
    measured = Measured([1.0], None, [], Generation([ids], None))
    judged = judge(Contender("a", pico), measured, measured, [sample], tokenizer, "exact", 99)
    assert [(row["answer"], row["score"]) for row in judged.rows] == [(expected, 1.0)]


def test_who_does_not_end_is_named_and_who_ends_as_often_is_not() -> None:
    def rows(*stopped: int) -> list[dict[str, Any]]:
        return [{"sample": str(at), "stopped": each, "tokens": 5} for at, each in enumerate(stopped)]

    found = endless({"tuned": rows(*8 * [1]), "half": rows(*4 * [1, 0]), "never": rows(*8 * [0])}, 16)
    assert found == ["`never`: 0 of 8 answers ended by themselves within 16 tokens, of those of `tuned` 8"]
    # A tie is no proof, and one alone is none.
    assert endless({"tuned": rows(1, 1, 1, 0), "close": rows(1, 1, 0, 0)}, 16) == []
    (said,) = endless({"tuned": rows(0, 0, 0, 0)}, 16)
    assert said.startswith("`tuned`: none of 4 answers ended by itself within 16 tokens")
    assert endless({"tuned": [{**row, "tokens": 40} for row in rows(0, 0, 0, 0)]}, 16) == []


def test_a_child_that_dies_is_named() -> None:
    with pytest.raises(RuntimeError, match="big: its process died of SIGKILL"):
        run_in_child("big", lambda _: os.kill(os.getpid(), signal.SIGKILL), lambda _: None)


def test_a_child_returns_its_result_its_progress_and_its_memory() -> None:
    seen: list[float] = []

    def work(report: Any) -> int:
        report(0.5)
        return len(bytes(200_000_000).replace(b"\0", b"\1", 10))

    size, memory = run_in_child("child", work, seen.append)
    assert size == 200_000_000 and seen == [0.5]
    assert 150e6 < memory < 600e6


def test_a_refusal_in_a_child_stays_a_refusal() -> None:
    def refuse(_: Any) -> None:
        raise UserError("no such file")

    with pytest.raises(UserError, match="no such file"):
        run_in_child("child", refuse, lambda _: None)
