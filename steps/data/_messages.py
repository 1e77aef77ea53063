"""Messages in any of the forms in which data sets have them, as turns: who speaks, what is said, what tools are called.

OpenAI's (`role`, `content` as text or in parts, `tool_calls`), ShareGPT's (`from`, `value`), and those that keep the
thoughts apart (`reasoning_content`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from steps.frame.errors import UserError, did_you_mean
from steps.lm.tasks import THINK_CLOSE, THINK_OPEN

Role = Literal["system", "user", "assistant", "tool"]
Turn = tuple[str, ...]
"""Role and content; then, where there is more that a chat template renders, that as JSON: `tool_calls`,
`tool_call_id` and `name`, and on the first turn the `tools` that may be called."""

ROLES = ("system", "user", "assistant", "tool")
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "ipython": "tool",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
"""Other names of the roles: ShareGPT's, Llama's and Gemma's, OpenAI's of today and of before there were tools."""
MASKS = ("learn", "weight", "train", "loss")
"""Keys by which a message says whether it is learned: ours, OpenAI's (and Mistral's), Axolotl's, ms-swift's."""
_RENDERED = ("tool_calls", "tool_call_id", "name")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
READ = ("role", "content", "from", "value", "tool_calls", "function_call", "tool_call_id", *MASKS)
"""Keys of messages that are read, whatever they hold."""
LISTS = ("messages", "conversations", "conversation")
"""Columns that are known to hold all messages."""


def message_list(value: Any, column: str, where: str) -> list[Turn]:
    """Read a cell that holds messages as turns.

    Raises:
        UserError: it is no list of messages, or a role is unknown, or a content no text or empty.
    """
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise UserError(f"{where}: `{column}` must be a list of objects with `role` and `content`")
    return [_turn(message, f"message {number}", where) for number, message in enumerate(value, start=1)]


def content_of(value: Any, place: str, role: str, where: str) -> str:
    """Return the text of a turn; only a system message, and what a tool gives, may be empty.

    Raises:
        UserError: it is no text, or empty; `place` says where in the row it stands.
    """
    text = _joined(value, place, where)
    if role not in ("system", "tool") and not text.strip():
        raise UserError(f"{where}: {place}, the {role} turn, is empty")
    return text


def with_tools(turns: Sequence[Turn], tools: Any, where: str) -> list[Turn]:
    """Return the turns with what tools may be called on the first, where chat templates find it by `render`.

    Raises:
        UserError: that is no list of descriptions.
    """
    found = _parsed(tools)
    found = [_parsed(each) for each in found] if isinstance(found, list) else found
    if not isinstance(found, list) or not all(map(_is_named, found)):
        raise UserError(f"{where}: `tools` must be a list of objects, each the description of a tool with its `name`")
    role, content, *more = turns[0]
    extras = {**(json.loads(more[0]) if more else {}), "tools": found}
    return [(role, content, _json(extras)), *turns[1:]]


def as_message(turn: Turn) -> dict[str, Any]:
    """Return a turn as chat templates take it."""
    role, content, *more = turn
    return {"role": role, "content": content, **(json.loads(more[0]) if more else {})}


def turn_of(message: Mapping[str, Any]) -> Turn:
    """Return the turn of a message as a Dataset has it."""
    extras = {name: message[name] for name in (*_RENDERED, "tools") if message.get(name) is not None}
    return (message["role"], message["content"], *([_json(extras)] if extras else []))


def words_in(turn: Turn) -> list[str]:
    """Return the words of a turn, lower case, those of its tool calls included; what tools there are, nobody says."""
    _, content, *more = turn
    extras = {name: each for name, each in json.loads(more[0]).items() if name != "tools"} if more else {}
    return [word for text in (content, _json(extras) if extras else "") for word in text.casefold().split()]


def is_read(message: Mapping[str, Any], name: str) -> bool:
    """Whether a key of a message is read: a `name` where it is a tool's, thoughts where they are text and the only."""
    if name in _THOUGHTS:
        return name == _thoughts_key(message)
    return name in READ or (name == "name" and _role(message) == "tool")


def _thoughts_key(message: Mapping[str, Any]) -> str:
    """Return the key under which the assistant's thoughts stand apart; empty where there are none, or not apart."""
    content = message.get("content", message.get("value"))
    if _role(message) != "assistant" or (isinstance(content, str) and THINK_CLOSE in content):
        return ""
    return next((name for name in _THOUGHTS if isinstance(message.get(name), str) and message[name].strip()), "")


def _turn(message: Mapping[str, Any], place: str, where: str) -> Turn:
    role = _role(message)
    if role not in ROLES:
        raise UserError(f"{where}: {place} has the role `{role}`{did_you_mean(str(role), ROLES)}")
    extras = {name: message[name] for name in _RENDERED if message.get(name) not in (None, "", [])}
    if role != "tool":
        extras.pop("name", None)
    if message.get("function_call"):
        extras["tool_calls"] = [{"type": "function", "function": _parsed(message["function_call"])}]
    if "tool_calls" in extras:
        extras["tool_calls"] = _calls(extras["tool_calls"], place, where)
    content = next((message[name] for name in ("content", "value") if message.get(name) is not None), None)
    if "function_call" in (message.get("from"), message.get("role")):
        # ShareGPT's way to call a tool: the call is the content, or several are.
        found = _parsed(content)
        extras["tool_calls"], content = _calls(found if isinstance(found, list) else [found], place, where), None
    calls = "tool_calls" in extras
    text = "" if content is None and calls else _joined(content, place, where)
    if not calls:
        content_of(text, place, role, where)
    if (key := _thoughts_key(message)) and THINK_CLOSE not in text:
        text = f"{THINK_OPEN}\n{message[key].strip()}\n{THINK_CLOSE}\n\n{text}"
    return (role, text, *([_json(extras)] if extras else []))


def _role(message: Mapping[str, Any]) -> Any:
    """Return who speaks, by the name that the role has here."""
    name = next((message[key] for key in ("role", "from") if message.get(key) is not None), None)
    return _SPEAKERS.get(name, name) if isinstance(name, str) else name


def _joined(value: Any, place: str, where: str) -> str:
    """Return a content as one text; of parts, as OpenAI writes them, those that are text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        kinds = [part.get("type", "text") for part in value]
        if other := next((kind for kind in kinds if kind not in ("text", "input_text", "output_text")), None):
            raise UserError(f"{where}: {place} has a part of type `{other}`; posttrain trains on text alone")
        texts = [part.get("text") for part in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise UserError(f"{where}: {place} must be text, not {type(value).__name__}")


def _calls(value: Any, place: str, where: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects, as chat templates want them; OpenAI writes these as text."""
    found = _parsed(value)
    if not isinstance(found, list) or not all(isinstance(call, Mapping) for call in found):
        raise UserError(f"{where}: {place}: `tool_calls` must be a list of objects")
    calls = []
    for call in found:
        inner = call.get("function", call)
        if not _is_named(call):
            raise UserError(f"{where}: {place}: a tool call must have a `function` with a `name`")
        # Llama writes `parameters`.
        given = next((inner[key] for key in ("arguments", "parameters") if inner.get(key) is not None), {})
        rest_of = {key: each for key, each in inner.items() if key not in ("arguments", "parameters")}
        function = {**rest_of, "arguments": _parsed(given)}
        rest = {key: each for key, each in call.items() if key in ("id", "type") and each is not None}
        calls.append({"type": "function", **rest, "function": {**function}} if "function" in call else {**function})
    return calls


def _is_named(tool: Any) -> bool:
    """Whether a description or call of a tool names it, inside `function` or by itself."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return isinstance(inner, Mapping) and isinstance(inner.get("name"), str)


def _parsed(value: Any) -> Any:
    """Return what a text of JSON says; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _json(value: Any) -> str:
    # In the order in which it is written: chat templates show it so.
    return json.dumps(value, ensure_ascii=False)


def said(turns: Iterable[Turn]) -> list[Turn]:
    """Return turns with letters' case and white space as they do not count where questions are compared.

    Nor does the invisible space by which a control token is escaped: the question is on one side, escaped or not.
    """
    return [(turn[0], " ".join(turn[1].replace("\u200b", "").casefold().split()), *turn[2:]) for turn in turns]
