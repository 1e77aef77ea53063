"""Reward models: checkpoints whose head gives one number for an answer, or one for each of its steps.

An outcome model is a sequence classifier with one label; it reads the answer's last token. A process model is a token
classifier with two labels, wrong and right, read where each reasoning step ends ("Let's verify step by step",
https://arxiv.org/abs/2305.20050); how an answer divides into steps stands in its `config.json` as `step_separator`.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.frame.errors import UserError
from steps.lm.chat import Message, conversation, render, token_ids, without_control_tokens
from steps.lm.checkpoint import check_safetensors, load_tokenizer, stop_token_ids
from steps.lm.tasks import Rollout
from steps.lm.whole import loaded_whole

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_HEADS = ("score", "classifier")


class RewardScorer:
    """A reward model ready to score answers; of either kind."""

    def __init__(self, path: Path, batch_size: int = 16) -> None:
        """Load the model, on the GPU where there is one.

        Args:
            path: directory of a RewardModel.
            batch_size: answers at once.
        """
        from steps.lm.device import own_device

        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(path)
        self.model = load_reward_model(path)
        self.model.eval().to(own_device())  # pyright: ignore[reportArgumentType]
        self.step_separator: str | None = getattr(self.model.config, "step_separator", None)
        self._stops = stop_token_ids(path)

    @property
    def is_process(self) -> bool:
        """Whether it scores steps."""
        return self.step_separator is not None

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return one reward for each answer: the outcome's, or the probability that every step is right.

        The latter is the product over the steps (section 2.5 of the paper); an answer without steps gets 0.
        """
        if self.is_process:
            return [math.prod(scores) if scores else 0.0 for scores in self.step_scores(rollouts)]
        rows = [
            answer_ids(self.tokenizer, each.task.prompt, each.text, self._stops, finished=not each.truncated)
            for each in rollouts
        ]
        logits = self._logits(rows)
        return [float(each.item()) for each in logits]

    def step_scores(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Return for each answer the probability that each of its steps is right.

        Raises:
            UserError: the model is not one for steps.
        """
        if self.step_separator is None:
            raise UserError(
                f"{self.tokenizer.name_or_path}: the reward model scores whole answers, not steps; train one with "
                "`process: true`"
            )
        steps = [split_steps(each.text, self.step_separator) for each in rollouts]
        found = [
            step_ends(self.tokenizer, each.task.prompt, each.text, parts)
            for each, parts in zip(rollouts, steps, strict=True)
        ]
        logits = self._logits([ids for ids, _ in found])
        return [
            row[ends].softmax(-1)[:, 1].tolist() if ends else [] for row, (_, ends) in zip(logits, found, strict=True)
        ]

    def _logits(self, rows: Sequence[list[int]]) -> list["Tensor"]:
        """Return what the head gives each row, rows of like length in one batch; in the order of `rows`."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        pad = self.model.config.get_text_config().pad_token_id
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids = pad_sequence([torch.tensor(rows[index]) for index in batch], batch_first=True, padding_value=pad)
            mask = pad_sequence([torch.ones(len(rows[index]), dtype=torch.long) for index in batch], batch_first=True)
            device = self.model.device
            with torch.inference_mode():
                logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
            found |= dict(zip(batch, logits.float().cpu(), strict=True))
        return [found[index] for index in range(len(rows))]


def answer_ids(
    tokenizer: "PreTrainedTokenizerFast",
    prompt: Sequence[Message],
    answer: str,
    stops: Sequence[int],
    *,
    finished: bool = True,
) -> list[int]:
    """Return the tokens of prompt and answer up to the answer's stop token, which is where an outcome is scored.

    An answer that is not finished was cut off: it has no stop token, and is scored at its last one.
    """
    messages = [*prompt, {"role": "assistant", "content": without_control_tokens(tokenizer, answer)}]
    rendered = conversation(tokenizer, messages, stops, only_last=True)
    turn = rendered.turns[-1]
    ends = finished or turn.stop <= turn.start or rendered.ids[turn.stop - 1] not in set(stops)
    return rendered.ids[: turn.stop if ends else turn.stop - 1]


def split_steps(text: str, separator: str) -> list[str]:
    """Return the steps of an answer; empty ones are none."""
    return [text[start:end] for start, end in _step_spans(text, separator)]


def beginnings(
    tokenizer: "PreTrainedTokenizerFast", prompt: Sequence[Message], answer: str, separator: str
) -> list[str]:
    """Return for each step of an answer but the last what a model goes on from: the answer as far as that step.

    It reaches up to the next step, so that no model adds to this one, or as near to that as its tokens are the first
    ones of the whole answer: where a token holds a separator and what follows (` so`), it ends before that token.
    """
    before = render(tokenizer, prompt, prompt=True)
    whole = token_ids(tokenizer, before + answer)

    def same_tokens(beginning: str) -> bool:
        ids = token_ids(tokenizer, before + beginning)
        return ids == whole[: len(ids)]

    found = []
    for (_, end), (start, _) in pairwise(_step_spans(answer, separator)):
        nearer = (answer[:cut] for cut in range(start, end - 1, -1))
        # Where one token holds the ends of both steps there is no such place.
        found.append(next(filter(same_tokens, nearer), answer[:start]))
    return found


def _step_spans(text: str, separator: str) -> Iterator[tuple[int, int]]:
    """Yield where each step begins and ends."""
    start = 0
    for part in text.split(separator):
        if part.strip():
            yield start, start + len(part)
        start += len(part) + len(separator)


def step_ends(
    tokenizer: "PreTrainedTokenizerFast", prompt: Sequence[Message], answer: str, steps: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Return the tokens of prompt and answer, and for each step the index of its last token.

    Raises:
        UserError: a step is no part of the answer, or they stand in another order.
    """
    answer = without_control_tokens(tokenizer, answer)
    steps = [without_control_tokens(tokenizer, step) for step in steps]
    text = render(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in encoded["offset_mapping"]]
    cursor = len(render(tokenizer, prompt, prompt=True))
    ends = []
    for number, step in enumerate(steps, start=1):
        # The template may strip an answer, and with it the outer steps.
        wanted = step.strip()
        at = text.find(wanted, cursor)
        if at < 0 or not wanted:
            raise UserError(f"step {number} ({wanted[:60]!r}) is no part of its answer; the steps must follow its text")
        cursor = at + len(wanted)
        ends.append(bisect_left(starts, cursor) - 1)
    last = ends[-1] + 1 if ends else len(encoded["input_ids"])
    return list(encoded["input_ids"])[:last], ends


def new_reward_model(directory: Path, dtype: str, *, process: bool) -> "PreTrainedModel":
    """Load a language model with a fresh head in place of its output layer.

    Raises:
        UserError: transformers has no classifier of this architecture.
    """
    import torch

    check_safetensors(directory)
    try:
        model = _auto_class(process).from_pretrained(
            directory,
            num_labels=2 if process else 1,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UserError(
            f"{directory}: transformers has no classifier of this architecture; take another model"
        ) from error
    if process and getattr(model.config, "classifier_dropout", None) is None and hasattr(model, "dropout"):
        # Where a checkpoint does not say, transformers drops a tenth of what the head sees.
        model.dropout.p = 0.0  # pyright: ignore[reportAttributeAccessIssue]
    return _with_exact_head(model)


def load_reward_model(directory: Path) -> "PreTrainedModel":
    """Load a reward model in the precision it is stored in."""
    from transformers import AutoConfig

    check_safetensors(directory)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with loaded_whole():
        model = _auto_class(hasattr(config, "step_separator")).from_pretrained(
            directory, dtype="auto", use_safetensors=True, trust_remote_code=False
        )
    return _with_exact_head(model)


def head_name(model: "PreTrainedModel") -> str:
    """Return the name of a classifier's last layer."""
    return next(name for name in _HEADS if hasattr(model, name))


def _auto_class(process: bool) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    return AutoModelForTokenClassification if process else AutoModelForSequenceClassification


def _with_exact_head(model: "PreTrainedModel") -> "PreTrainedModel":
    """Let the head compute in float32: bfloat16 has 8 bits, in which near rewards would be equal."""
    import torch
    from torch import nn

    class ExactHead(nn.Linear):
        """A linear layer in float32, whatever precision surrounds it."""

        def forward(self, input: "Tensor") -> "Tensor":
            # What divides the weights among processes may hand them over in another precision than they are kept in.
            bias = None if self.bias is None else self.bias.float()
            with torch.autocast(input.device.type, enabled=False):
                return nn.functional.linear(input.float(), self.weight.float(), bias)

    name = head_name(model)
    old = getattr(model, name)
    head = ExactHead(old.in_features, old.out_features, bias=old.bias is not None, device=old.weight.device)
    head.load_state_dict(old.state_dict())
    setattr(model, name, head)
    return model
