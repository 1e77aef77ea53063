"""`data.reject`: rejection sampling, verified answers as data for fine-tuning."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from steps.artifacts import Dataset, DatasetFacts, Draft, Samples
from steps.data._conversations import row_id
from steps.frame import Input, Job, Resources, StepConfig, UserError, step
from steps.lm.tasks import PASSED, has_passed, pass_rate

Answer = Mapping[str, Any]
"""A sampled answer as in `rows.jsonl`."""


class RejectSamples(StepConfig):
    """Keep the verified answers of each prompt as conversations to fine-tune on."""

    samples: Input[Samples]
    threshold: float | None = PASSED
    """Least score of an answer that is kept; null keeps unverified answers too (a teacher's, for distillation)."""
    keep: Literal["best", "shortest", "all"] = "best"
    """Which answers come first: the highest score (then the shortest), the shortest, or as they were sampled."""
    per_prompt: int | None = Field(default=None, ge=1)
    """Most answers of a prompt; unset, one, or every one with `keep: all`."""
    require_format: str | None = None
    """Regular expression that the whole answer must match, `.` any character: `<think>.+</think>.+`."""

    @field_validator("require_format")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return pattern


@step(
    "data.reject",
    produces=Dataset,
    reference="https://arxiv.org/abs/2501.12948",
    resources=Resources(cpus=1),
)
def reject_samples(config: RejectSamples, job: Job) -> Draft:
    """Choose, count what is dropped and why, write.

    Raises:
        UserError: the answers were not verified, or none is left.
    """
    from steps.lm.rows import read_jsonl, write_jsonl

    counts: Counter[str] = Counter()
    rows = list(read_jsonl(config.samples.rows_file))
    if config.threshold is not None and any(each["score"] is None for row in rows for each in row["samples"]):
        raise UserError(
            f"step `{job.name}`: the answers of {config.samples.manifest.step} were not verified; give `data.sample` "
            "`rewards`, or set `threshold: null` to keep answers unseen"
        )
    parts = [list(conversations(row, chosen(row["samples"], config, counts))) for row in rows]
    kept = [each for part in parts for each in part]
    if not kept:
        raise UserError(_nothing_left(config, job.name, counts, rows))
    out = job.output()
    write_jsonl(out / "rows.jsonl", kept)
    statistics = {
        **dict(counts),
        "prompts": len(rows),
        "prompts_kept": sum(map(bool, parts)),
        "kept_share": round(len(kept) / max(1, config.samples.facts.samples), 6),
    }
    job.log_metrics({"kept": len(kept), **statistics})
    return Dataset.draft(out, DatasetFacts(rows=len(kept), statistics=statistics))


def chosen(answers: Sequence[Answer], config: RejectSamples, counts: Counter[str]) -> list[Answer]:
    """Return the answers of one prompt that are kept; count in `counts` what is dropped, by its reason."""
    good: dict[str, Answer] = {}
    for answer in answers:
        reason = _reason(answer, config) or ("duplicate" if answer["text"] in good else None)
        if reason:
            counts[reason] += 1
        else:
            good[answer["text"]] = answer
    found = list(good.values())
    # Sorting is stable: of equals the one sampled first stays first.
    if config.keep == "best":
        found.sort(key=lambda answer: (-(answer["score"] or 0), answer["tokens"]))
    elif config.keep == "shortest":
        found.sort(key=lambda answer: answer["tokens"])
    most = config.per_prompt or (len(found) if config.keep == "all" else 1)
    counts["surplus"] += len(found[most:])
    return found[:most]


def conversations(row: Mapping[str, Any], answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """Yield a row of a Dataset for each answer, with the id of its own messages, as `data.prepare` gives them."""
    plain = {name: value for name, value in row.items() if name != "samples"}
    for answer in answers:
        made = plain | {"messages": [*row["messages"][:-1], {"role": "assistant", "content": answer["text"]}]}
        yield made | {"id": row_id(made)}


def _reason(answer: Answer, config: RejectSamples) -> str | None:
    """Return why an answer is dropped, None where it is not."""
    if answer["truncated"]:
        return "truncated"
    if not answer["text"].strip():
        return "empty"
    if config.threshold is not None and not has_passed(answer["score"], config.threshold):
        return "rejected"
    if config.require_format is not None and not re.fullmatch(config.require_format, answer["text"], re.DOTALL):
        return "wrong_format"
    return None


def _nothing_left(config: RejectSamples, name: str, counts: Counter[str], rows: Sequence[Mapping[str, Any]]) -> str:
    total = sum(len(row["samples"]) for row in rows)
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if count)
    rate = ""
    if config.threshold is not None:
        rates = [pass_rate([each["score"] for each in row["samples"]], config.threshold) or 0.0 for row in rows]
        rate = f"; the pass rate is {sum(rates) / len(rates):.1%} at threshold: {config.threshold}"
    return (
        f"step `{name}`: none of {total} answers is left ({dropped}{rate}); lower `threshold`, sample more answers, or "
        "start from a better model"
    )
