"""Preferences made from sorting tasks, right answer over wrong, and how a model weighs the two."""

from collections.abc import Iterator, Sequence
from typing import Any

from steps.artifacts import Dataset, Model, Preferences, PreferencesFacts
from steps.lm.checkpoint import load_model, load_tokenizer
from steps.lm.reward_model import answer_ids
from steps.lm.rows import read_jsonl
from steps.train._preference_rate import log_probability_margins
from steps.train._preference_tokens import Pair


def wrong(answer: str) -> str:
    """The digits sorted the wrong way, or another digit where they are all the same."""
    digits = answer.split()
    return " ".join(digits[::-1] if digits[0] != digits[-1] else [*digits[:-1], str((int(digits[0]) + 1) % 10)])


def comparison_rows(tasks: Dataset) -> Iterator[dict[str, Any]]:
    """The right answer to each task over the wrong one."""
    for row in read_jsonl(tasks.rows_file):
        *prompt, answer = row["messages"]
        sides = {"chosen": answer["content"], "rejected": wrong(answer["content"])}
        yield {"id": row["id"], "prompt": prompt, "source": row["source"], **sides}


def facts(rows: Sequence[Any], *, paired: bool = True) -> PreferencesFacts:
    return PreferencesFacts(rows=len(rows), paired=paired)


def pairs(data: Preferences, model: Model) -> list[Pair]:
    """Tokens of every pair, found another way than the trainers find them."""
    tokenizer = load_tokenizer(model.path)
    found = []
    for row in read_jsonl(data.rows_file):
        sides = [
            answer_ids(tokenizer, row["prompt"], row[side], model.facts.stop_token_ids)
            for side in ("chosen", "rejected")
        ]
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        begin = len(tokenizer(str(prompt), add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]
        found.append(Pair(sides[0][:begin], sides[0][begin:], sides[1][begin:]))
    return found


def margins(model: Model, data: Preferences) -> list[float]:
    """log p(chosen) − log p(rejected) of every pair."""
    return log_probability_margins(load_model(model.path, "float32"), pairs(data, model), batch_size=64)
