"""Conversations whose template changes earlier turns: whoever looks at the last turn only, takes them."""

from types import SimpleNamespace
from typing import Any

import pytest

from steps.artifacts import Dataset, DatasetFacts
from steps.evaluate._samples import choose_samples
from steps.frame import UserError
from steps.lm.chat import conversation
from steps.lm.checkpoint import load_tokenizer
from steps.merge.adapter import _token_rows
from steps.train.distill import prompts_and_answers
from tests.steps.conftest import publish

# As Qwen3's: reasoning is kept in the last answer and dropped from earlier ones.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "<think>easy</think>two"},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "<think>more</think>three"},
]


@pytest.fixture
def tokenizer(pico: Any) -> Any:
    found = load_tokenizer(pico.path)
    found.chat_template = FORGETFUL
    return found


def test_reasoning_that_is_dropped_from_earlier_turns_hinders_nobody_who_looks_at_the_last(
    tokenizer: Any, bench: Any, pico: Any
) -> None:
    with pytest.raises(UserError, match="changes the assistant's turn 2"):
        conversation(tokenizer, TURNS)
    data = publish(bench, Dataset, "forgetful", [{"id": "1", "messages": TURNS}], DatasetFacts(rows=1))
    stops = pico.facts.stop_token_ids
    (sample,) = choose_samples(data, tokenizer, stops, rows=1, max_tokens=400)
    assert "easy" not in sample.text and "more" in sample.text
    given: Any = SimpleNamespace(data=data, model=pico, base=pico, max_new_tokens=100, prompt_tokens=999, prompts=5)
    job: Any = None
    (row,) = prompts_and_answers(given, tokenizer, job)
    assert tokenizer.decode(row["answer"]).startswith("<think>more</think>three")
    assert len(_token_rows(given, tokenizer)[0]) == len(sample.ids)
