"""Answers sampled from a causal language model: any decoding, thinking on, off or within a budget.

**What is deterministic.** The random numbers of an answer come from `seed`, the task's id and the answer's number
alone: neither other tasks, nor more answers, nor an interruption change them. A token is drawn by inverting the
cumulative distribution, so equal logits give equal tokens. Logits are equal where the batch is; padding to another
length may round them differently, and a token on the edge may then be its neighbour. So equal tasks and settings give
equal bytes on equal machines, interrupted or not, and an answer hardly ever changes when tasks are added. vLLM takes
the same numbers as seeds, but forms its batches itself and promises less.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from pydantic import Field, field_validator, model_validator

from steps.artifacts import Adapter, Model
from steps.frame.config import StepConfig
from steps.frame.errors import UserError
from steps.frame.hardware import fast_dtype
from steps.lm.chat import render, token_ids
from steps.lm.checkpoint import Dtype, load_model
from steps.lm.tasks import EMPTY_THINKING, THINK_CLOSE, THINK_OPEN, Rollout, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from steps.frame.job import Job

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
    dtype: Dtype = Field(default_factory=fast_dtype)
    """Precision of the model; unset, what this machine is fastest in."""
    seed: int = 0

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
    """What of the answer the prompt already holds: the tag that opens the thinking, or nothing."""

    def key(self, seed: int) -> str:
        """Return what its random numbers depend on."""
        return f"{seed}/{self.task.id}/{self.number}"


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    ids: list[int]
    """Tokens, the stop token included."""
    stopped: bool
    """Whether it ended by itself."""


class Engine(Protocol):
    """What continues prompts."""

    def write(self, prompts: Sequence[Sequence[int]], keys: Sequence[str], new_tokens: int) -> list[Continuation]:
        """Continue each prompt by at most `new_tokens` tokens, its random numbers drawn by its key."""
        ...


def sample_answers(
    engine: Engine,
    tokenizer: "PreTrainedTokenizerFast",
    tasks: Sequence[Task],
    decoding: Decoding,
    *,
    samples: int = 1,
    thinking_tokens: int | None = None,
    kept: Path | None = None,
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
        kept: file to which every finished batch is written; what it holds already is not sampled again.
        progress: takes the number of answers done and of all.

    Returns:
        The answers of each task, in the order of `tasks`.
    """
    asked = questions(tokenizer, tasks, decoding, samples, thinking_tokens)
    batches = [asked[start : start + decoding.batch_size] for start in range(0, len(asked), decoding.batch_size)]
    found: dict[tuple[str, int], Rollout] = {}
    done = _read_kept(kept)
    for index, batch in enumerate(batches):
        if index < len(done):
            rollouts = [Rollout(question.task, *each) for question, each in zip(batch, done[index], strict=True)]
        else:
            rollouts = _answer(engine, tokenizer, batch, decoding, thinking_tokens)
            _keep(kept, rollouts)
        found |= {(each.task.id, each.number): rollout for each, rollout in zip(batch, rollouts, strict=True)}
        progress(len(found), len(asked))
    return [[found[task.id, number] for number in range(samples)] for task in tasks]


def questions(
    tokenizer: "PreTrainedTokenizerFast",
    tasks: Sequence[Task],
    decoding: Decoding,
    samples: int,
    thinking_tokens: int | None = None,
) -> list[Question]:
    """Return the prompts as tokens, the short ones first, so that a batch holds prompts of like length."""
    thinking = False if thinking_tokens == 0 else decoding.thinking
    asked = []
    for task in tasks:
        text = render(tokenizer, task.prompt, prompt=True)
        opens = text.rstrip().endswith(THINK_OPEN)
        if thinking is False:
            text = text.rstrip().removesuffix(THINK_OPEN) + EMPTY_THINKING if opens else text + EMPTY_THINKING
        elif thinking and not opens:
            text, opens = text + OPENED, True
        ids = tuple(token_ids(tokenizer, text))
        opened = OPENED if opens and thinking is not False else ""
        asked += [Question(task, number, ids, opened) for number in range(samples)]
    return sorted(asked, key=lambda each: (len(each.ids), each.task.id, each.number))


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
        Rollout(question.task, question.opened + text_of(tokenizer, each.ids), len(each.ids), not each.stopped)
        for question, each in zip(batch, written, strict=True)
    ]


def _thinks(tokenizer: "PreTrainedTokenizerFast", question: Question, written: Continuation) -> bool:
    """Say whether an answer is still thinking."""
    text = question.opened + text_of(tokenizer, written.ids)
    return THINK_OPEN in text and THINK_CLOSE not in text


def text_of(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int]) -> str:
    """Return tokens as text without special tokens; the tags of thinking stay, even where they are special."""
    tags: Any = tokenizer.convert_tokens_to_ids([THINK_OPEN, THINK_CLOSE])
    dropped = set(tokenizer.all_special_ids) - set(tags)
    kept = [token for token in ids if token not in dropped]
    return str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))


def _read_kept(file: Path | None) -> list[list[tuple[str, int, bool]]]:
    """Return the batches that an earlier attempt finished; what a kill left half written is cut off."""
    if file is None or not file.exists():
        return []
    *whole, half = file.read_text(encoding="utf-8").split("\n")
    if half:
        file.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
    return [[tuple(each) for each in json.loads(line)] for line in whole]


def _keep(file: Path | None, rollouts: Sequence[Rollout]) -> None:
    if file is not None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([(each.text, each.tokens, each.truncated) for each in rollouts]) + "\n")


def random_seed(key: str) -> int:
    """Return the seed that a key stands for, below 2^63."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1


def open_engine(
    model: Model, adapter: Adapter | None, tokenizer: "PreTrainedTokenizerFast", decoding: Decoding, job: "Job"
) -> Engine:
    """Load a model, with an adapter where one is given, for sampling.

    Raises:
        UserError: the adapter was trained on another model, vLLM is asked for and not there, or several processes
            share the step.
    """
    if job.resources.world > 1:
        raise UserError(
            f"step `{job.name}`: answers are sampled by one process, not {job.resources.world}; ask for one GPU at most"
        )
    if adapter is not None and adapter.facts.base != model.digest:
        raise UserError(
            f"step `{job.name}`: the adapter was trained on {adapter.facts.base[:12]}, not on {model.digest[:12]}; "
            "give its own base"
        )
    if decoding.backend == "vllm":
        from steps.lm.vllm_engine import VllmEngine

        return VllmEngine(model, adapter, decoding)
    from steps.lm.transformers_engine import TransformersEngine

    return TransformersEngine(_loaded(model, adapter, decoding.dtype), tokenizer, decoding, model.facts.stop_token_ids)


def _loaded(model: Model, adapter: Adapter | None, dtype: Dtype) -> Any:
    """Load a model, its base in 4 bits where the adapter was trained on such, on the GPU where there is one."""
    import torch

    from steps.lm.four_bit import load_four_bit

    four_bit = adapter.facts.four_bit if adapter else None
    loaded: Any = load_four_bit(model.path, dtype, four_bit) if four_bit else load_model(model.path, dtype)
    if adapter is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, str(adapter.path))
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")
