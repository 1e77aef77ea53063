"""`data.prepare`: from raw rows to sets to train, to choose and to test by, in one form, without duplicates."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from steps.artifacts import Artifact, Dataset, DatasetFacts, Documents, Draft, Model
from steps.data._conversations import Conversation, conversation
from steps.data._documents import Document, document, documents_draft
from steps.data._duplicates import Dropped, without_exact, without_near
from steps.data._hashing import different_ids, uniform
from steps.data._left_out import note_as_read, note_left_out
from steps.data._settings import ReadRows
from steps.data._sides import check_sides, given_sides, sides_by_id
from steps.data._spelled import Spelled
from steps.frame import Follows, Input, Job, Resources, UserError, step
from steps.lm.chat import NO_TEMPLATE
from steps.sources import passed_over, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerFast

_BATCH = 256


class PrepareData(ReadRows):
    """Read rows, bring them into messages, drop duplicates, measure them and split off what is held out."""

    model: Input[Model] | None = Follows("base", required=False)
    """Model whose tokenizer and chat template measure the rows; without one, lengths are counted in words."""
    near_dedup: float | None = Field(default=0.8, gt=0, lt=1)
    """Similarity of word triples from which two rows count as the same, if both what is asked and what is answered are
    that alike; what many rows begin or end with (an instruction) does not count. Null keeps near duplicates."""
    group: str | None = None
    """Column that says which rows belong together, a document or an author: they are on the same side, too."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest row in tokens of the chat template; longer ones are dropped and counted."""
    format: Literal["messages", "text", "completion"] = "messages"
    """What the rows are: conversations; documents of plain `text`, to go on pretraining with; or a `prompt` with its
    `completion`. The last two need no chat template, and give Documents."""
    columns: Mapping[Literal["messages", "system", "user", "assistant", "text", "prompt", "completion"], str] = {}
    """Columns of another layout: `{user: q, assistant: a}` or `{messages: turns}`; `{text: body}`, or
    `{prompt: q, completion: a}`."""

    control_tokens: Literal["refuse", "escape", "keep"] = "refuse"
    """What to do with texts that spell a token by which the `model` begins or ends turns (`<|im_end|>`): name the row
    and stop, put an invisible space into it, or let it be read as the token. Nothing behind a stop is learned."""

    @model_validator(mode="after")
    def _columns_fit(self) -> "PrepareData":
        known = {"messages": ("messages", "system", "user", "assistant"), "text": ("text",)}
        fit = known.get(self.format, ("prompt", "completion"))
        if other := next((name for name in self.columns if name not in fit), None):
            raise ValueError(f"columns: format: {self.format} has no `{other}`; it has {', '.join(fit)}")
        if self.format != "messages" and (self.system is not None or self.question != "user"):
            raise ValueError(f"format: {self.format} has no system message; leave out `system` and `question`")
        return self

    def rendering(self, *, has_rows: bool) -> tuple[str, ...]:
        """The model's template measures conversations."""
        return ("model",) if self.format == "messages" else ()

    def produced(self) -> type[Artifact]:
        """Documents, where the rows are no conversations."""
        return Dataset if self.format == "messages" else Documents


@dataclass(frozen=True)
class Measured:
    """A conversation and its length."""

    row: Conversation | Document
    length: int
    """Tokens in the chat template, or words where there is no tokenizer."""


@step(
    "data.prepare",
    produces=dict.fromkeys(("train", "eval", "test"), (Dataset, Documents)),
    reference="https://arxiv.org/abs/2107.06499",
    libraries=("rensa", "transformers", "tokenizers", "pyarrow"),
    preload=("transformers", "rensa", "matplotlib.figure"),
    resources=Resources(cpus=1),
)
def prepare_data(config: PrepareData, job: Job) -> dict[str, Draft]:
    """Read, deduplicate, measure, limit, split, write."""
    tokenizer = _tokenizer(config)
    # Of duplicates the first stays: one that has a task can be verified too.
    spelled = Spelled(config.model, tokenizer, config.control_tokens)
    empty: list[str] = []
    rows = sorted(map(spelled.checked, _rows(config, job, empty)), key=lambda row: row.task is None)
    unique, exact = without_exact(rows) if config.exact_dedup else (rows, [])
    distinct, near = (unique, []) if config.near_dedup is None else without_near(unique, config.near_dedup)
    kept, too_long = _measured(distinct, config, tokenizer)
    side_of = sides_by_id(
        [one.row for one in kept], config.seed, config.eval_fraction, config.test_fraction, config.question
    )
    sides = {side: [one for one in kept if side_of[one.row.id] == side] for side in given_sides(config.shares)}
    counts = {
        "rows_read": len(rows) + len(empty),
        "empty": len(empty),
        "exact_duplicates": len(exact),
        "near_duplicates": len(near),
        "too_long": len(too_long),
    }
    _check_sides(config, sides, counts)
    left_out = {
        "empty": empty,
        "exact duplicates": [_like(each) for each in exact],
        "near duplicates (`near_dedup: null` keeps them)": [_like(each) for each in near],
        f"longer than max_tokens: {config.max_tokens}": [one.row.where for one in too_long],
    }
    note_as_read(job, rows)
    spelled.note(job)
    note_left_out(job, len(rows) + len(empty), left_out)
    if over := [path for source in config.sources for path in passed_over(source, Path.cwd())]:
        some = ", ".join(path.name for path in over[:3]) + (", ..." if len(over) > 3 else "")
        job.note(f"{len(over)} files of plain text beside tables were not read ({some}); name them to read them")
    unit = "words" if tokenizer is None else "tokens"
    sizes = {name: len(part) for name, part in sides.items()}
    job.log_metrics({**counts, **sizes, **percentiles(kept, unit)})
    job.log_figure(f"{unit}_per_row", _histogram(sides, unit))
    return {name: _write(config, job, name, part, counts, unit) for name, part in sides.items()}


def percentiles(rows: Sequence[Measured], unit: str) -> dict[str, float]:
    """Return total, mean, median, 95th percentile and maximum of the lengths; nothing for no rows."""
    lengths = sorted(one.length for one in rows)
    if not lengths:
        return {}
    last = len(lengths) - 1
    values = {
        "total": sum(lengths),
        "mean": round(sum(lengths) / len(lengths), 2),
        "p50": lengths[round(0.5 * last)],
        "p95": lengths[round(0.95 * last)],
        "max": lengths[last],
    }
    return {f"{unit}_{name}": float(value) for name, value in values.items()}


def _like(dropped: Dropped[Conversation | Document]) -> str:
    return f"{dropped.row.where} (like {dropped.like.where})"


def _tokenizer(config: PrepareData) -> "PreTrainedTokenizerFast | None":
    """Load the model's tokenizer.

    Raises:
        UserError: it has no chat template, or tokens are to be counted without a model.
    """
    from steps.lm.checkpoint import load_tokenizer

    if config.model is None:
        if config.max_tokens is not None:
            raise UserError("data.prepare: `max_tokens` needs a `model`, whose tokens are counted")
        return None
    if config.format == "messages" and config.model.facts.template_sha256 is None:
        raise UserError(f"data.prepare: {config.model.facts.origin or config.model}: {NO_TEMPLATE}")
    return load_tokenizer(config.model.path)


def _rows(config: PrepareData, job: Job, empty: list[str]) -> Iterator[Conversation | Document]:
    """Yield what the sources hold; `empty` gets the places of texts that say nothing, as many corpora have them."""
    columns: Any = config.columns
    for source in config.sources:
        for row in read_rows(source, job.cache, Path.cwd()):
            if config.format == "messages":
                yield conversation(row, source, columns, config.system, config.group)
            elif found := document(row, source, config.format, columns, config.group):
                yield found
            else:
                empty.append(row.where)


def _measured(
    rows: Sequence[Conversation | Document], config: PrepareData, tokenizer: "PreTrainedTokenizerFast | None"
) -> tuple[list[Measured], list[Measured]]:
    """Measure rows and drop the too long, in an order given by their hashes, until the limit is reached.

    Returns:
        The rows kept, sorted by id, and those that were too long among the ones looked at.
    """
    order = sorted(rows, key=lambda row: uniform(config.seed, "sample", row.id))
    limit = config.limit or len(order)
    kept: list[Measured] = []
    too_long: list[Measured] = []
    for one in _lengths(order, tokenizer):
        if config.max_tokens is not None and one.length > config.max_tokens:
            too_long.append(one)
            continue
        kept.append(one)
        if len(kept) == limit:
            break
    return sorted(kept, key=lambda one: one.row.id), too_long


def _lengths(
    rows: Sequence[Conversation | Document], tokenizer: "PreTrainedTokenizerFast | None"
) -> Iterator[Measured]:
    """Measure rows in their order, a batch at a time and only as far as they are asked for."""
    if tokenizer is None:
        yield from (Measured(row, row.words) for row in rows)
        return
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        ids = tokenizer([_templated(row, tokenizer) for row in batch], add_special_tokens=False)["input_ids"]
        yield from (Measured(row, len(one)) for row, one in zip(batch, ids, strict=True))  # pyright: ignore[reportArgumentType]


def _templated(row: Conversation | Document, tokenizer: "PreTrainedTokenizerFast") -> str:
    from steps.lm.chat import whole_text

    if isinstance(row, Document):
        return row.prompt + row.text
    try:
        return whole_text(tokenizer, row.as_messages())
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error


def _check_sides(config: PrepareData, sides: dict[str, list[Measured]], counts: dict[str, int]) -> None:
    """Refuse an empty result.

    Raises:
        UserError: a side that was asked for has no rows.
    """
    source = ", ".join(config.sources)
    if not any(sides.values()):
        why = (
            f"; all {counts['too_long']} are longer than max_tokens: {config.max_tokens}" if counts["too_long"] else ""
        )
        raise UserError(f"{source}: no rows are left of the {counts['rows_read']} read{why}")
    check_sides(source, {name: [one.row for one in part] for name, part in sides.items()}, config.shares)


def _write(
    config: PrepareData, job: Job, name: str, rows: Sequence[Measured], counts: dict[str, int], unit: str
) -> Draft:
    from steps.lm.rows import write_jsonl

    statistics = {**{key: float(count) for key, count in counts.items()}, **percentiles(rows, unit)}
    if config.format != "messages":
        plain = [one.row for one in rows if isinstance(one.row, Document)]
        return documents_draft(job, name, plain, config.format, statistics)
    out = job.output(name)
    ids = different_ids((one.row.id,) for one in rows)
    write_jsonl(out / "rows.jsonl", (one.row.as_row() | {"id": own} for one, own in zip(rows, ids, strict=True)))
    facts = DatasetFacts(
        rows=len(rows),
        format="messages",
        template_sha256=config.model.facts.template_sha256 if config.model else None,
        statistics=statistics,
    )
    return Dataset.draft(out, facts)


def _histogram(sides: dict[str, list[Measured]], unit: str) -> "Figure":
    """Draw how long the rows are, each side as shares of its own number."""
    import numpy as np
    from matplotlib.figure import Figure

    lengths = {name: [one.length for one in rows] for name, rows in sides.items() if rows}
    edges = np.histogram_bin_edges([length for part in lengths.values() for length in part], bins=40)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, part in lengths.items():
        weights = np.full(len(part), 1 / len(part))
        axes.hist(part, bins=edges.tolist(), weights=weights, histtype="step", label=f"{name} ({len(part)} rows)")
    axes.set(xlabel=f"{unit} per row", ylabel="share of rows", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
