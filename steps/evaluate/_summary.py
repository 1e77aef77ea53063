"""From per-sample figures to the report: rows, summary, table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from steps.evaluate._measure import Contender, Measured
from steps.evaluate._runtimes import runtime_name
from steps.evaluate._samples import Sample
from steps.lm.generate import text_of
from steps.lm.scoring import bootstrap_interval, exact_match, perplexity, rouge_l

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Score = Literal["rouge_l", "exact"]
_SCORES = {"rouge_l": rouge_l, "exact": exact_match}
_DIGITS = 6
"""Decimals kept in the files."""


@dataclass(frozen=True)
class Judged:
    """A contender with everything that goes into the report about it."""

    contender: Contender
    rows: list[dict[str, Any]]
    """One line of `rows.jsonl` a sample."""
    metrics: dict[str, float]
    """What does not change from run to run; no times, no memory."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap intervals over the samples."""


def judge(
    contender: Contender,
    measured: Measured,
    reference: Measured,
    samples: Sequence[Sample],
    tokenizer: "PreTrainedTokenizerFast",
    score: Score,
    new_tokens: int,
) -> Judged:
    """Turn figures into rows and metrics; `reference` is where top-1 agreement is measured against.

    An answer of fewer than `new_tokens` tokens ended by itself.
    """
    rows = [
        {
            "sample": sample.id,
            "candidate": contender.name,
            "prompt": list(sample.prompt),
            "reference_answer": sample.expected,
            "answer": None,
            "score": None,
            "stopped": None,
            "nll": _round(measured.nll[index]),
            "tokens": sample.end - sample.start,
            "kl": None if measured.kl is None else _round(measured.kl[index]),
            "top1": None if measured.kl is None else _round(_agreement(measured, reference, index)),
        }
        for index, sample in enumerate(samples)
    ]
    for row, sample, ids in zip(rows, samples, measured.generation.answers, strict=False):
        answer = text_of(tokenizer, ids).strip()
        row |= {
            "answer": answer,
            "score": _round(_SCORES[score](sample.expected, answer)),
            "stopped": float(len(ids) < new_tokens),
        }
    return Judged(contender, rows, _metrics(contender, rows), _intervals(rows))


def summary(reference: str, judged: Sequence[Judged], score: Score) -> dict[str, Any]:
    """Return the content of `summary.json`."""
    rows = judged[0].rows
    return {
        "reference": reference,
        "score": score,
        "rows": len(rows),
        "generated_rows": sum(row["answer"] is not None for row in rows),
        "candidates": {each.contender.name: each.metrics for each in judged},
        "intervals": {each.contender.name: each.intervals for each in judged},
        "runtimes": {each.contender.name: runtime_name(each.contender.artifact) for each in judged},
        "templates": {each.contender.name: each.contender.artifact.facts.template_sha256 for each in judged},
    }


def table(content: Mapping[str, Any]) -> str:
    """Return `summary.json`'s figures as a Markdown table, the reference first."""
    kind = {"rouge_l": "ROUGE-L", "exact": "exact match"}[content["score"]]
    lines = [
        f"| model | perplexity | KL to {content['reference']}, nats | top-1 agreement | {kind} | ends by itself "
        "| weights, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, metrics in content["candidates"].items():
        low, high = content["intervals"][name]["perplexity"]
        cells = [
            name,
            f"{metrics['perplexity']:.3f} ({low:.3f} to {high:.3f})",
            f"{metrics['kl']:.4f}" if "kl" in metrics else "",
            f"{metrics['top1_agreement']:.1%}" if "top1_agreement" in metrics else "",
            _answer_cell(metrics, content["intervals"][name]),
            f"{metrics['stopped']:.0%}" if "stopped" in metrics else "",
            f"{metrics['size_bytes'] / 1e6:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"{content['rows']} held-out rows, {content['generated_rows']} of them answered; in brackets 95 % bootstrap "
        "intervals over the rows."
    )
    return "\n".join([*lines, "", *(f"{each}.\n" for each in (*content["notes"], note.removesuffix(".")))])


def _answer_cell(metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> str:
    if "answer_score" not in metrics:
        return ""
    low, high = intervals["answer_score"]
    return f"{metrics['answer_score']:.3f} ({low:.3f} to {high:.3f})"


def _metrics(contender: Contender, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    tokens = [row["tokens"] for row in rows]
    found: dict[str, float] = {"perplexity": perplexity([row["nll"] for row in rows], tokens)}
    if rows[0]["kl"] is not None:
        found["kl"] = float(np.average([row["kl"] for row in rows], weights=tokens))
        found["top1_agreement"] = float(np.average([row["top1"] for row in rows], weights=tokens))
    if scores := _scores(rows):
        found["answer_score"] = float(np.mean(scores))
        found["stopped"] = float(np.mean([row["stopped"] for row in rows if row["stopped"] is not None]))
    found = {name: _round(value) for name, value in found.items()}
    return found | {"size_bytes": contender.size_bytes, "parameters": contender.artifact.facts.parameters}


def _intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    # The exponential keeps order, so the ends of the interval of the mean are those of the perplexity.
    low, high = bootstrap_interval([row["nll"] for row in rows], [row["tokens"] for row in rows])
    found = {"perplexity": (_round(exp(low)), _round(exp(high)))}
    if scores := _scores(rows):
        low, high = bootstrap_interval(scores)
        found["answer_score"] = (_round(low), _round(high))
    return found


def _scores(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["score"] for row in rows if row["score"] is not None]


def _agreement(measured: Measured, reference: Measured, index: int) -> float:
    return float((measured.choices[index] == reference.choices[index]).mean())


def _round(value: float) -> float:
    return round(value, _DIGITS)
