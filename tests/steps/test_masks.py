"""What is learned of a conversation, token by token, for the chat templates that models come with.

`masks/NAME.jinja` is a template of the kind that NAME's makers ship, `masks/NAME.txt` what must be learned under it:
the text as the model sees it, what is learned between ⟦ and ⟧. `pytest -s` prints it.
"""

from pathlib import Path
from typing import Any

import pytest

from steps.frame import UserError
from steps.lm.chat import conversation, render, whole_text
from steps.lm.turn_end import turn_end
from steps.model.pico import train_tokenizer
from steps.train._preference_tokens import Encoder
from steps.train.sft import labelled

FOLDER = Path(__file__).parent / "masks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
_TOKENS = """<s> </s> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn> [INST] [/INST]
<|user|> <|assistant|> <|system|> <|end|> <|im_sep|> <|start|> <|message|> <|channel|> <|return|>
<|User|> <|Assistant|>"""
"""What the templates write beside ChatML's."""
ENDS = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>", "gpt-oss": "<|return|>"} | dict.fromkeys(
    ("chatml", "qwen3", "qwen3-tools", "phi4"), "<|im_end|>"
)
"""What ends a turn; else `</s>`."""
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "It is known."},
]
THOUGHT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\n4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "<think>\nThree and three.\n</think>\n\n6"},
]


TOOLS = [
    {
        "role": "user",
        "content": "Weather in Rome?",
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}],
    },
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}],
    },
    {"role": "tool", "content": "18 C"},
    {"role": "assistant", "content": "It is 18 C."},
]


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A tokenizer with the tokens of all, and one template."""
    name = request.param
    found = train_tokenizer(["Is it so? Yes. Why? It is known. Be brief. Two and two."], 330, 256)
    found.add_special_tokens({"additional_special_tokens": _TOKENS.split()})  # pyright: ignore[reportArgumentType]
    found.bos_token = "<s>"
    found.eos_token = "<|return|>" if name == "gpt-oss" else "</s>"
    found.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")
    found.name_or_path = name
    return found


def shown(tokenizer: Any, texts: list[tuple[list[int], list[int]]]) -> str:
    """Return texts one below the other, each with what is learned between ⟦ and ⟧."""
    found = []
    for ids, labels in texts:
        text, before = "", False
        for token, label in [*zip(ids, labels, strict=True), (None, -100)]:
            learned = label != -100
            assert label in (-100, token)
            text += "" if learned == before else "⟦" if learned else "⟧"
            text += "" if token is None else tokenizer.decode([token])
            before = learned
        found.append(text)
    return "\n--------\n".join(found)


def all_shown(tokenizer: Any) -> str:
    """Return every talk, with all turns learned."""
    stops = (turn_end(tokenizer) or 0,)
    talks = {"Two turns": TALK, "Thoughts": THOUGHT} | ({"Tools": TOOLS} if "tools" in tokenizer.name_or_path else {})
    blocks = [
        f"==== {name}\n{shown(tokenizer, labelled(talk, tokenizer, stops, 'all'))}" for name, talk in talks.items()
    ]
    return "\n".join(blocks) + "\n"


def test_what_is_learned_is_what_a_person_wrote_down(tokenizer: Any) -> None:
    found = all_shown(tokenizer)
    print(f"\n######## {tokenizer.name_or_path}\n{found}")
    assert found == (FOLDER / f"{tokenizer.name_or_path}.txt").read_text(encoding="utf-8")


def test_every_turn_goes_on_from_the_invitation_and_ends(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids(ENDS.get(tokenizer.name_or_path, "</s>"))
    assert turn_end(tokenizer) == end
    for talk in (TALK, THOUGHT):
        invited = tokenizer(render(tokenizer, talk[:-1], prompt=True), add_special_tokens=False)["input_ids"]
        whole = conversation(tokenizer, talk, [end], only_last=True)
        assert whole.ids[: len(invited)] == invited and whole.turns[-1].start == len(invited)
        assert whole.last_ids[-1] == end and whole.last_ids.count(end) == 1
        said = tokenizer.decode(whole.last_ids[:-1])
        assert talk[-1]["content"].split("</think>")[-1].strip() in said
        if talk is THOUGHT:
            assert "Three and three." in said
        assert whole_text(tokenizer, talk) == whole.text


def test_a_template_that_knows_no_tools_refuses_them(tokenizer: Any) -> None:
    if "tools" in tokenizer.name_or_path:
        return
    with pytest.raises(UserError, match=r"chat template (does not|cannot) render tools|refuses the roles"):
        render(tokenizer, TOOLS)


def test_preferences_see_the_same_tokens(tokenizer: Any, pico: Any) -> None:
    encoder = Encoder(tokenizer, pico, 256, None)  # pyright: ignore[reportArgumentType]
    encoder._stops = (turn_end(tokenizer),)  # pyright: ignore[reportAttributeAccessIssue]
    ids, start = encoder.encoded(THOUGHT[:-1], THOUGHT[-1]["content"])
    whole = conversation(tokenizer, THOUGHT, [turn_end(tokenizer) or 0], only_last=True)
    assert ids[start:] == whole.last_ids and ids[:start] == whole.ids[:start]
