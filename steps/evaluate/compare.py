"""`evaluate.compare`: a reference and its candidates on the same rows, each in its own runtime and process.

Perplexity, KL divergence and top-1 agreement come from the held-out answers (teacher forcing), the answer score from
greedy answers. Speed and memory vary from run to run, so they are logged as metrics of the step and stay out of the
report's files and facts: the same work must end in the same digest. A GPTQ model runs unpacked, so it has neither.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from steps.artifacts import Dataset, Documents, Draft, Model, Quantized, Report, ReportFacts
from steps.frame import Input, Job, Metric, NamesOf, Resources, StepConfig, UserError, step
from steps.frame.hardware import fast_dtype
from steps.lm.chat import NO_TEMPLATE
from steps.lm.checkpoint import Dtype, load_tokenizer, positions_within
from steps.lm.rows import write_jsonl

if TYPE_CHECKING:
    from steps.evaluate._measure import Contender, Measured, Plan
    from steps.evaluate._samples import Sample
    from steps.evaluate._summary import Judged


class Compare(StepConfig):
    """Compare models with a reference: perplexity, KL divergence, top-1 agreement, answers, size, speed, memory."""

    reference: Input[Model]
    """The model that the others should equal; it is measured too."""
    candidates: list[Input[Model | Quantized]] = Field(min_length=1)
    data: Input[Dataset | Documents]
    """Held-out conversations, or plain texts; of documents only the perplexity is measured, nothing is answered."""
    reference_name: str | None = NamesOf("reference")
    names: tuple[str, ...] | None = NamesOf("candidates")
    """Names of the candidates in the report, in their order."""
    rows: int = Field(default=32, ge=1)
    """Rows scored, chosen by the hash of their id."""
    max_tokens: int = Field(default=256, ge=8)
    """Longest row in tokens, prompt and answer; a longer answer is cut."""
    generate_rows: int = Field(default=16, ge=1)
    """Of the scored rows, how many are also answered."""
    new_tokens: int = Field(default=64, ge=1)
    """Longest greedy answer."""
    score: Literal["rouge_l", "exact"] = "rouge_l"
    """How an answer is held against the one in the data."""
    dtype: Dtype = Field(default_factory=fast_dtype)
    """Precision in which transformers runs; the output layer and all that follows is float32.

    In `bfloat16` a model diverges from its own float32 self by some 0.001 nats: below that, KL says nothing.
    """

    def rendering(self, *, has_rows: bool) -> tuple[str, ...]:
        """The reference's template writes the rows for all."""
        return ("reference",) if has_rows else ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Quality, distance to the reference, and size."""
        return (
            Metric("perplexity", paired=True),
            Metric("nll", paired=True, summed_up=False),
            Metric("answer_score", paired=True),
            Metric("stopped", paired=True),
            Metric("kl", distance=True),
            Metric("top1_agreement", distance=True),
            Metric("size_bytes"),
            Metric("parameters"),
        )


@step(
    "evaluate.compare",
    produces=Report,
    reference="https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity",
    libraries=("torch", "transformers", "tokenizers", "llama-cpp-python", "gptqmodel", "rouge-score"),
    preload=("torch", "transformers.modeling_utils", "rouge_score.rouge_scorer", "matplotlib.figure"),
    resources=Resources(cpus=0),
)
def compare(config: Compare, job: Job) -> Draft:
    """Measure one model after the other, the reference first; write rows, summary and table."""
    from steps.evaluate._notes import chosen_on, endless, more_stops
    from steps.evaluate._samples import choose_samples
    from steps.evaluate._summary import judge, summary, table

    contenders = _contenders(config)
    _check_templates(config, contenders)
    tokenizer = load_tokenizer(config.reference.path)
    stops = config.reference.facts.stop_token_ids
    most = positions_within(config.reference.path, config.max_tokens)
    samples = choose_samples(config.data, tokenizer, stops, rows=config.rows, max_tokens=most)
    plan = _plan(config, job, samples, min(len(tokenizer), config.reference.facts.vocabulary))
    try:
        measured = [_measure(contenders, index, plan, job) for index in range(len(contenders))]
    finally:
        plan.log_probabilities.unlink(missing_ok=True)
    judged = [
        judge(contender, found, measured[0], samples, tokenizer, config.score, plan.new_tokens)
        for contender, found in zip(contenders, measured, strict=True)
    ]
    content = summary(contenders[0].name, judged, config.score)
    content["notes"] = [
        *chosen_on({each.name: each.artifact for each in contenders}, config.data),
        *endless({each.contender.name: each.rows for each in judged}, plan.new_tokens),
        *more_stops({each.name: found.more_stops for each, found in zip(contenders, measured, strict=True)}),
    ]
    for note in content["notes"]:
        job.log.warning(note)
    out = job.output()
    write_jsonl(out / "rows.jsonl", (row for each in judged for row in each.rows))
    (out / "summary.json").write_text(json.dumps(content, indent=2, sort_keys=False) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table(content), encoding="utf-8")
    _draw(content, job)
    facts = ReportFacts(metrics=_flat(judged), rows_sha256=config.data.rows_sha256)
    job.log_metrics(facts.metrics)
    return Report.draft(out, facts)


def _contenders(config: Compare) -> "list[Contender]":
    """Return the reference and the candidates under their names.

    A candidate that is the reference under the reference's own name is left out: it is measured already.
    """
    from steps.evaluate._measure import Contender

    if config.names and len(config.names) != len(config.candidates):
        raise UserError(
            f"evaluate.compare: `names` has {len(config.names)} entries for {len(config.candidates)} candidates; "
            "give one name a candidate"
        )
    first = Contender(config.reference_name or "reference", config.reference)
    names = config.names or _fallback_names(first.name, config.candidates)
    found = [first]
    for name, artifact in zip(names, config.candidates, strict=True):
        if name == first.name and artifact.digest == config.reference.digest:
            continue
        if name in [each.name for each in found]:
            raise UserError(f"evaluate.compare: two models are called `{name}`; give each its own of `names`")
        found.append(Contender(name, artifact))
    return found


def _fallback_names(taken: str, candidates: Sequence[Model | Quantized]) -> list[str]:
    """Name candidates by what they are: `model`, `gguf:Q4_K_M`, and `model-2` for the second of a kind."""
    names: list[str] = []
    for artifact in candidates:
        stem = f"{artifact.facts.format}:{artifact.facts.scheme}" if isinstance(artifact, Quantized) else "model"
        name, count = stem, 1
        while name in [taken, *names]:
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return names


def _check_templates(config: Compare, contenders: "Sequence[Contender]") -> None:
    """Refuse models and data whose chat templates differ: the same row would be another text to each.

    Raises:
        UserError: naming both ends.
    """
    own, reference = config.reference.facts.template_sha256, contenders[0].name
    if isinstance(config.data, Documents):
        return
    if own is None:
        raise UserError(f"evaluate.compare: `{reference}`: {NO_TEMPLATE}")
    ends = {f"candidate `{each.name}`": each.artifact.facts.template_sha256 for each in contenders[1:]}
    ends[f"`data` (from {config.data.manifest.step})"] = config.data.facts.template_sha256
    for end, found in ends.items():
        if found is not None and found != own:
            raise UserError(
                f"evaluate.compare: the chat template of {end} ({found[:12]}) is not the one of the reference "
                f"`{reference}` ({own[:12]}); both must come from the same template"
            )


def _is_whole(data: Dataset | Documents) -> bool:
    """Whether the rows are documents, which answer nothing."""
    return isinstance(data, Documents) and data.facts.layout == "text"


def _plan(config: Compare, job: Job, samples: "list[Sample]", vocabulary: int) -> "Plan":
    from steps.evaluate._measure import Plan

    if len(samples) < config.rows:
        job.note(f"{len(samples)} rows fit, fewer than the {config.rows} asked for")
    longest = max(sample.start for sample in samples[: config.generate_rows])
    new_tokens = positions_within(config.reference.path, longest + config.new_tokens) - longest
    if new_tokens < config.new_tokens:
        job.note(f"answers are cut at {new_tokens} tokens: the model has no more positions behind its longest prompt")
    return Plan(
        samples=samples,
        vocabulary=vocabulary,
        generate_rows=0 if _is_whole(config.data) else min(config.generate_rows, len(samples)),
        new_tokens=new_tokens,
        dtype=config.dtype,
        threads=job.cpus,
        log_probabilities=job.scratch / "reference.float16",
    )


def _measure(contenders: "Sequence[Contender]", index: int, plan: "Plan", job: Job) -> "Measured":
    """Measure one contender in a process of its own; log what must not enter the report."""
    from steps.evaluate._measure import measure
    from steps.evaluate._process import run_in_child

    contender = contenders[index]
    measured, peak = run_in_child(
        contender.name,
        lambda report: measure(contender, plan, is_reference=index == 0, report=report),
        lambda share: job.progress(index + share, len(contenders), contender.name),
    )
    if speed := measured.generation.speed:
        figures = {
            "tokens_per_second": speed.tokens_per_second,
            "prompt_tokens_per_second": speed.prompt_tokens_per_second,
            "peak_memory_bytes": float(peak),
        }
        job.log_metrics({f"{contender.name}/{name}": value for name, value in figures.items()})
    return measured


def _flat(judged: "Sequence[Judged]") -> dict[str, float]:
    return {f"{each.contender.name}/{name}": value for each in judged for name, value in each.metrics.items()}


def _draw(content: dict[str, Any], job: Job) -> None:
    from steps.evaluate._figures import divergence, quality_against_size

    job.log_figure("quality_against_size", quality_against_size(content))
    if len(content["candidates"]) > 1:
        job.log_figure("kl_divergence", divergence(content))
