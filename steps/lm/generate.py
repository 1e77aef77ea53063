"""Answers sampled from a causal language model: any decoding, thinking on, off or within a budget.

**What is deterministic.** The random numbers of an answer come from `seed`, the task's id, the answer's number and what
of it was given alone: neither other tasks, nor more answers, nor an interruption change them. A token is drawn by
inverting the cumulative distribution, so equal logits give equal tokens. Logits are equal where the batch is; padding
to another length may round them differently, and a token on the edge may then be its neighbour. So equal tasks and
settings give equal bytes on equal machines, interrupted or not, and an answer hardly ever changes when tasks are added.
vLLM takes the same numbers as seeds, but forms its batches itself and promises less.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from steps.frame.config import Resources, Seed, StepConfig
from steps.frame.errors import UserError
from steps.frame.hardware import fast_dtype
from steps.lm.chat import control_tokens, render, token_ids
from steps.lm.checkpoint import Dtype
from steps.lm.kept import Kept
from steps.lm.tasks import EMPTY_THINKING, THINK_CLOSE, THINK_OPEN, Rollout, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


OPENED = f"{THINK_OPEN}\n"
"""What a prompt ends with where the model is to think (DeepSeek-R1's advice, https://arxiv.org/abs/2501.12948)."""


class Decoding(StepConfig):
    """How answers are sampled."""

    temperature: float = Field(default=1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 leaves every token in."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer, thinking included."""
    thinking: bool | None = None
    """Let the prompt open the thinking (true) or end with an empty thinking block (false); unset, as the template does.
    """
    thinking_end: str = f"\n{THINK_CLOSE}\n\n"
    """Written for the model once its thinking budget is spent. Qwen3 first lets it say why: "Considering the limited
    time by the user, I have to give the solution based on the thinking directly now."."""
    batch_size: int = Field(default=64, ge=1)
    """Answers sampled at once; also what an interruption can cost. Give vLLM many."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """vLLM needs a GPU and its own installation."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that hold one copy of the model (vLLM only); each such group answers its share of the prompts."""
    dtype: Dtype = Field(default_factory=fast_dtype)
    """Precision of the model; unset, what this machine is fastest in."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _has_backend(self) -> Self:
        if self.tensor_parallel > 1 and self.backend != "vllm":
            raise ValueError(f"tensor_parallel: {self.tensor_parallel} needs `backend: vllm`")
        return self

    @property
    def packages(self) -> tuple[str, ...]:
        """The backend, where it is one of its own."""
        return ("vllm",) if self.backend == "vllm" else ()

    def check_resources(self, resources: Resources) -> None:
        """Processes share the prompts; each group of `tensor_parallel` must be whole."""
        if self.backend == "vllm" and resources.world > 1 and not resources.gpus:
            raise ValueError("backend: vllm needs a GPU for each process; ask for `gpus`, not `processes`")
        if resources.local_processes % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel: {self.tensor_parallel} does not divide a node's {resources.local_processes} GPUs"
            )

    @field_validator("thinking_end")
    @classmethod
    def _closes(cls, text: str) -> str:
        if THINK_CLOSE not in text:
            raise ValueError(f"it must contain {THINK_CLOSE}, else the thinking goes on")
        return text


def check_budgets(budgets: Sequence[int | None], max_new_tokens: int) -> None:
    """Refuse a thinking budget that leaves no token for the answer.

    Raises:
        ValueError: naming it.
    """
    for budget in budgets:
        if budget is not None and budget >= max_new_tokens:
            raise ValueError(f"thinking_tokens: {budget} leaves nothing of max_new_tokens: {max_new_tokens} to answer")


class Sampling(Decoding):
    """Decoding of several answers a prompt."""

    samples: int = Field(default=1, ge=1)
    """Answers of each prompt."""

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples: {self.samples} greedy answers are all the same; raise `temperature`")
        return self


@dataclass(frozen=True)
class Question:
    """One answer to be sampled."""

    task: Task
    number: int
    """Which of the task's answers."""
    ids: tuple[int, ...]
    """Tokens of the prompt."""
    opened: str
    """What of the answer the prompt already holds: its given beginning, the tag that opens the thinking, or nothing."""

    def key(self, seed: int) -> str:
        """Return what its random numbers depend on."""
        key = f"{seed}/{self.task.id}/{self.number}"
        return f"{key}/after/{self.task.begun}" if self.task.begun else key


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    ids: list[int]
    """Tokens, the stop token included."""
    stopped: bool
    """Whether it ended by itself."""

    @property
    def said(self) -> list[int]:
        """The tokens without the stop token, which a tokenizer may hold for text."""
        return self.ids[:-1] if self.stopped else self.ids


class Engine(Protocol):
    """What continues prompts."""

    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[str], new_tokens: int) -> list[Continuation]:
        """Continue each prompt by at most `new_tokens` tokens, its random numbers drawn by its key."""
        ...

    def close(self) -> None:
        """Give the model's memory back."""
        ...


def sample_answers(
    engine: Engine,
    tokenizer: "PreTrainedTokenizerFast",
    tasks: Sequence[Task],
    decoding: Decoding,
    *,
    samples: int = 1,
    thinking_tokens: int | None = None,
    kept: Kept | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Rollout]]:
    """Sample answers to every task.

    Args:
        engine: what runs the model.
        tokenizer: the model's own, with a chat template.
        tasks: in any order.
        decoding: how to sample.
        samples: answers a task.
        thinking_tokens: tokens after which the thinking is closed and the answer must follow; None for no limit.
        kept: where every finished batch is written; what it holds already is not sampled again, and what other
            processes have to sample is waited for.
        progress: takes the number of answers done and of all.

    Returns:
        The answers of each task, in the order of `tasks`.
    """
    asked = questions(tokenizer, tasks, decoding, samples, thinking_tokens)
    batches = [asked[start : start + decoding.batch_size] for start in range(0, len(asked), decoding.batch_size)]
    kept = kept or Kept()

    def report() -> None:
        progress(sum(len(batches[index]) for index in kept.done), len(asked))

    for index in kept.own(len(batches)):
        kept.add(index, _answer(engine, tokenizer, batches[index], decoding, thinking_tokens))
        report()
    # By the task itself: two may have one id.
    found: dict[tuple[int, int], Rollout] = {}
    for batch, written in zip(batches, kept.all(len(batches), report), strict=True):
        for question, each in zip(batch, written, strict=True):
            found[id(question.task), question.number] = Rollout(question.task, *each)
    return [[found[id(task), number] for number in range(samples)] for task in tasks]


def questions(
    tokenizer: "PreTrainedTokenizerFast",
    tasks: Sequence[Task],
    decoding: Decoding,
    samples: int,
    thinking_tokens: int | None = None,
) -> list[Question]:
    """Return the prompts as tokens, the short ones first, so that a batch holds prompts of like length.

    Raises:
        UserError: an answer is begun with thinking where there is to be none, or the other way round.
    """
    thinking = False if thinking_tokens == 0 else decoding.thinking
    asked = []
    for task in tasks:
        text, opened = _prompt(tokenizer, task, thinking)
        ids = tuple(token_ids(tokenizer, text))
        asked += [Question(task, number, ids, opened) for number in range(samples)]
    return sorted(asked, key=lambda each: (len(each.ids), each.task.place, each.number))


def _prompt(tokenizer: "PreTrainedTokenizerFast", task: Task, thinking: bool | None) -> tuple[str, str]:
    """Return the text that the model goes on from, and what of the answer it holds."""
    text = render(tokenizer, task.prompt, prompt=True)
    opens = bool(opened_thinking(text))
    if thinking is False:
        text = text.rstrip().removesuffix(THINK_OPEN) + EMPTY_THINKING if opens else text + EMPTY_THINKING
    elif thinking and not opens:
        text, opens = text + OPENED, True
    opened = OPENED if opens and thinking is not False else ""
    if not task.begun:
        return text, opened
    thinks = task.begun.startswith(THINK_OPEN)
    if thinks if thinking is False else opened and not thinks:
        raise UserError(
            f"task {task.id}: its answer begins {'with' if thinks else 'without'} thinking, and cannot be gone on with "
            f"by `thinking: {str(thinking).lower()}`; set that as it was when the answer was sampled"
        )
    rest = task.begun.removeprefix(THINK_OPEN).removeprefix("\n") if opened else task.begun
    return text + rest, task.begun


def opened_thinking(prompt: str) -> str:
    """Return what of the answer a prompt already holds: the tag that opens the thinking, where its template ends so."""
    return OPENED if prompt.rstrip().endswith(THINK_OPEN) else ""


def _answer(
    engine: Engine,
    tokenizer: "PreTrainedTokenizerFast",
    batch: Sequence[Question],
    decoding: Decoding,
    thinking_tokens: int | None,
) -> list[Rollout]:
    keys = [question.key(decoding.seed) for question in batch]
    first_tokens = thinking_tokens or decoding.max_new_tokens
    written = engine.write([question.ids for question in batch], keys, first_tokens)
    if first_tokens < decoding.max_new_tokens:
        end = token_ids(tokenizer, decoding.thinking_end)
        open_ = [index for index, each in enumerate(written) if not each.stopped]
        begun = {
            index: written[index].ids + (end if _thinks(tokenizer, batch[index], written[index]) else [])
            for index in open_
        }
        rest = engine.write(
            [[*batch[index].ids, *begun[index]] for index in open_],
            [f"{keys[index]}/answer" for index in open_],
            decoding.max_new_tokens - first_tokens,
        )
        for index, more in zip(open_, rest, strict=True):
            written[index] = Continuation(begun[index] + more.ids, more.stopped)
    return [
        Rollout(question.task, question.opened + text_of(tokenizer, each.said), len(each.ids), not each.stopped)
        for question, each in zip(batch, written, strict=True)
    ]


def _thinks(tokenizer: "PreTrainedTokenizerFast", question: Question, written: Continuation) -> bool:
    """Say whether an answer is still thinking."""
    text = question.opened + text_of(tokenizer, written.ids)
    return THINK_OPEN in text and THINK_CLOSE not in text


def text_of(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int]) -> str:
    """Return tokens as text without special tokens; the tags of thinking stay, even where they are special."""
    dropped = control_tokens(tokenizer)
    kept = [token for token in ids if token not in dropped]
    return str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))


def random_seed(key: str) -> int:
    """Return the seed that a key stands for, below 2^63."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1
