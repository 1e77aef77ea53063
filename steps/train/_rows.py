"""How long a training row may be, and what is said of rows that are longer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.frame import Job, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Longest:
    """The most tokens of a row."""

    tokens: int
    reason: str
    """What says so, in words: `max_tokens: 1024`."""


def longest_row(model: Path, max_tokens: int) -> Longest:
    """Return the most tokens that a row of a training may have: no more than the model has positions for."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    # The library's own name of it, whichever the architecture has (GPT-2's is `n_positions`).
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < max_tokens:
        return Longest(positions, f"the model's {positions} positions (below max_tokens: {max_tokens})")
    return Longest(max_tokens, f"max_tokens: {max_tokens}")


def note_spelled(job: Job, field: str, rows: int, spelled: int) -> None:
    """Note in how many rows an answer spells a stop token, behind which nothing is learned."""
    if spelled:
        job.note(
            f"in {spelled} of {rows} rows of `{field}` an answer spells a stop token, and what stands behind it is not "
            "learned; `control_tokens: escape` of data.prepare keeps it"
        )


def stop_texts(tokenizer: "PreTrainedTokenizerFast", stops: Sequence[int]) -> tuple[str, ...]:
    """Return how stop tokens are spelled."""
    found: Any = tokenizer.convert_ids_to_tokens(list(stops))
    return tuple(str(text) for text in found if text)


def check_no_tools(job: Job, field: str, prompts: Iterable[Sequence[Mapping[str, Any]]]) -> None:
    """Refuse prompts with tools where TRL itself writes the prompt, which leaves them out.

    Raises:
        UserError: one has them.
    """
    if any({"tools", "tool_calls"} & set(message) for prompt in prompts for message in prompt):
        raise UserError(
            f"step `{job.name}`: rows of `{field}` have tools, and questions are asked without any here; `train.sft` "
            "learns from such rows"
        )


def note_rows(job: Job, field: str, rows: int, *, left_out: int, cut: int, longest: Longest) -> None:
    """Note how many rows teach nothing and are left out, and how many were cut at their end.

    Args:
        job: the running step.
        field: the config's key that names the rows.
        rows: how many there were.
        left_out: how many of them have no answer to learn within the length.
        cut: how many of them are longer.
        longest: the length.
    """
    if left_out:
        job.note(
            f"{left_out} of {rows} rows of `{field}` were left out: no answer to learn in them within {longest.reason}"
        )
    if cut:
        job.note(f"{cut} of {rows} rows of `{field}` are longer than {longest.reason}")
