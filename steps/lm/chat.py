"""Conversations as tokens: a row's messages through the checkpoint's own chat template, and whose each token is.

Everything that trains on, calibrates with or measures a conversation must see the same tokens, so it asks here.
"""

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from steps.frame.errors import UserError
from steps.lm.tasks import THINK_CLOSE, THINK_OPEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NO_TEMPLATE = "it has no chat template; give it one, for example `base: {uri: ..., template: chatml}`"
_WAY_OUT = "give conversations with one assistant turn, or train on the last turn only"
Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}`; the assistant's may hold `tool_calls`, and the first the `tools` that there are."""
_MARK = "\u2039what is said\u203a"
"""Stands for an answer where it is asked what the template writes behind one."""
_added_tokens: "WeakKeyDictionary[PreTrainedTokenizerFast, tuple[int, dict[int, str], frozenset[int]]]" = (
    WeakKeyDictionary()
)
"""By tokenizer: its size, the tokens marked special, and all that are added to its vocabulary. Gemma's has 6,000, which
take too long for every answer."""


@dataclass(frozen=True)
class Conversation:
    """A templated conversation."""

    text: str
    ids: list[int]
    turns: tuple[range, ...]
    """Tokens of each of the assistant's turns, its end-of-turn token included."""

    @property
    def assistant(self) -> list[bool]:
        """For every token, whether the assistant wrote it."""
        own = set().union(*self.turns)
        return [index in own for index in range(len(self.ids))]

    @property
    def last_ids(self) -> list[int]:
        """Tokens of the assistant's last turn."""
        turn = self.turns[-1]
        return self.ids[turn.start : turn.stop]

    @property
    def prompt_length(self) -> int:
        """Tokens before the assistant's last turn; all of them where the assistant says nothing."""
        return next((turn.start for turn in reversed(self.turns) if turn), len(self.ids))


class TurnChanges(UserError):
    """The template shows an earlier turn otherwise than when it was the last: each can only be learned as that."""


def _named(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return what error messages call the model: its path, or the beginning of its digest where it is an artifact."""
    name = Path(tokenizer.name_or_path).name
    return f"model {name[:12]}" if len(name) == 64 and name.isalnum() else tokenizer.name_or_path


def render(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message], *, prompt: bool = False) -> str:
    """Return the text of a conversation in the chat template; with `prompt` it ends where the assistant begins.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses the messages, or their tools.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{_named(tokenizer)}: {NO_TEMPLATE}")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(f"`{name}`" for name in sorted(tokenizer.chat_template))
        raise UserError(
            f"{_named(tokenizer)}: none of the chat templates {names} is named `default`; name the one that is "
            "meant, for example `base: {uri: ..., template: tool_use}`"
        )
    tools = messages[0].get("tools") if messages else None
    shown = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
    calls = any(message.get("tool_calls") for message in shown)
    why: UserError | None = None
    for each in (shown, _with_text(shown)) if calls else (shown,):
        try:
            text = _applied(tokenizer, _with_apart(tokenizer, each), tools, prompt=prompt)
            _check_tools(tokenizer, shown, tools, text)
        except UserError as error:
            why = why or error
        else:
            return text
    assert why is not None
    raise why


def _with_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose calls have their arguments as text, as some templates want them (DeepSeek's)."""
    found = []
    for message in messages:
        calls = [_as_text(call) for call in message.get("tool_calls") or ()]
        found.append({**message, "tool_calls": calls} if calls else message)
    return found


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call.get("function", call)
    given = inner.get("arguments", {})
    text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return {**call, "function": {**inner, "arguments": text}} if "function" in call else {**inner, "arguments": text}


def _with_apart(tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with thoughts under a key of their own, where that is how the template takes them (gpt-oss)."""
    template = str(tokenizer.chat_template)
    key = next((name for name in ("thinking", "reasoning_content") if f".{name}" in template), None)
    if key is None or THINK_CLOSE in template:
        return messages
    found = []
    for message in messages:
        content = (message["content"] or "").lstrip() if message["role"] == "assistant" else ""
        if content.startswith(THINK_OPEN) and THINK_CLOSE in content:
            thoughts, _, answer = content.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
            message = {**message, "content": answer.lstrip(), key: thoughts.strip()}
        found.append(message)
    return found


def _applied(tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, Any]], tools: Any, *, prompt: bool) -> str:
    """Return what the template writes.

    Raises:
        UserError: it refuses the messages, or fails at their tools.
    """
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))
    except (TypeError, ValueError) as error:
        # A template that knows no calls takes what is there for text, and may fail at that as Python does.
        if not tools and not any("tool_calls" in message for message in messages):
            raise
        raise UserError(f"{_named(tokenizer)}: the chat template cannot render tools ({error})") from error
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{_named(tokenizer)}: the chat template refuses the roles {roles} ({error})") from error


def _check_tools(
    tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message], tools: Sequence[Any] | None, text: str
) -> None:
    """Refuse a template that leaves out tools, calls or what they gave: the answers rest on them.

    Raises:
        UserError: naming what is left out.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    names = [each.get("function", each).get("name") for each in (*(tools or ()), *calls)]
    given = [message["content"] for message in messages if message["role"] == "tool"]
    if lost := next((each for each in (*names, *given) if each and not _is_rendered(str(each), text)), None):
        word = " ".join(str(lost).split())[:40]
        raise UserError(
            f"{_named(tokenizer)}: the chat template does not render tools: `{word}` is not in its text; give the "
            "model a template that does (`template:`), or leave such rows out"
        )


def _is_rendered(said: str, text: str) -> bool:
    """Whether a text stands in another, as it is, without white space around it, or as JSON writes it (Llama 3.1)."""
    forms = (said, said.strip(), json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1])
    return any(form in text for form in (*forms, json.dumps(said.strip())[1:-1]))


def without_control_tokens(tokenizer: "PreTrainedTokenizerFast", text: str, tokens: Iterable[str] | None = None) -> str:
    """Return a text in which no control token is read as one: an invisible space stands behind its first letter.

    A model can write the letters of `<|im_end|>` without the token. Whoever reads its answer back through a chat
    template, a reward model or a judge, would take what stands behind for another's turn.

    Args:
        tokenizer: whose control tokens are meant.
        text: what was said.
        tokens: texts of those that count; all when None.
    """
    for token in sorted(control_tokens(tokenizer).values() if tokens is None else tokens, key=len, reverse=True):
        if token in text:
            text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
    return text


def control_tokens(tokenizer: "PreTrainedTokenizerFast") -> dict[int, str]:
    """Return id and text of every token that is no part of what anyone says: the special ones.

    Those that the tokenizer names (`eos_token`, ...) are not all: one that ended the documents of a base model is
    special still where the turn's end has taken its name. The tags of thinking are text, whatever a tokenizer says, and
    so is a piece of ordinary text that a trainer gives a name to, where it has nothing else to pad or to end with.
    """
    size, marked, added = _added_tokens.get(tokenizer, (-1, {}, frozenset()))
    if size != len(tokenizer):
        decoder = tokenizer.added_tokens_decoder
        marked = {number: token.content for number, token in decoder.items() if token.special and token.content}
        added = frozenset(decoder)
        _added_tokens[tokenizer] = len(tokenizer), marked, added
    pairs = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    named = {number: text for number, text in pairs if number in added}
    return {number: text for number, text in (marked | named).items() if text not in (THINK_OPEN, THINK_CLOSE)}


def token_ids(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Tokenise a templated text: the template writes the special tokens itself, so none is added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore[reportArgumentType]


def conversation(
    tokenizer: "PreTrainedTokenizerFast",
    messages: Sequence[Message],
    stop_token_ids: Sequence[int] = (),
    *,
    only_last: bool = False,
) -> Conversation:
    """Tokenise a whole conversation and mark the assistant's tokens, of all its turns or of the last one only.

    The last turn is what a model that is asked would have to write: where the template's invitation already opens the
    thoughts (`<think>`), it goes on from there, and thoughts stay that the template takes out of what was said before
    (DeepSeek-R1's distilled models do both).

    An assistant's turn runs from where the template invites it to speak to its first stop token (`stop_token_ids`, by
    default the tokenizer's end token), because what the template writes after that no model ever generates. Where the
    template ends the last turn with none, the tokenizer's end token is put there: who learns no end never stops. Where
    there is no end token at all, a turn is all that the template renders of it.

    Raises:
        UserError: there is no template.
        TurnChanges: it renders a turn differently once a later one follows, so that it cannot be said which text is the
            assistant's.
    """
    text, spans = _turns(tokenizer, messages, only_last)
    stops = set(stop_token_ids) or set(token_ids(tokenizer, str(tokenizer.eos_token or "")))
    found = _tokenised(tokenizer, text, spans, stops)
    if found.turns and messages[-1]["role"] == "assistant" and stops.isdisjoint(found.last_ids) and tokenizer.eos_token:
        text += str(tokenizer.eos_token)
        found = _tokenised(tokenizer, text, [*spans[:-1], (spans[-1][0], len(text))], stops)
    for turn in found.turns[:-1]:
        if stops and stops.isdisjoint(found.ids[turn.start : turn.stop]):
            raise TurnChanges(
                f"{_named(tokenizer)}: the chat template ends the assistant's last turn otherwise than earlier "
                f"ones, which have no stop token; {_WAY_OUT}"
            )
    return found


def _tokenised(
    tokenizer: "PreTrainedTokenizerFast", text: str, spans: Sequence[tuple[int, int]], stops: set[int]
) -> Conversation:
    """Tokenise the text; each span of characters becomes the turn of tokens up to its first stop token."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])  # pyright: ignore[reportArgumentType]
    starts = [start for start, _ in encoded["offset_mapping"]]  # pyright: ignore[reportGeneralTypeIssues]
    turns = []
    for begin, end in spans:
        first, last = bisect_left(starts, begin), bisect_left(starts, end)
        # Where the next turn's opening is what ends this one (GLM-4), it stands just behind.
        stop = next((index + 1 for index in range(first, min(last + 1, len(ids))) if ids[index] in stops), last)
        turns.append(range(first, stop))
    return Conversation(text, ids, tuple(turns))


def whole_text(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message]) -> str:
    """Return the text of a conversation as it is learned, the thoughts of its last turn included.

    Raises:
        UserError: see `render`.
    """
    text = render(tokenizer, messages)
    last = messages[-1]
    if last["role"] != "assistant" or not (
        THINK_CLOSE in last["content"] or THINK_OPEN in str(tokenizer.chat_template)
    ):
        return text
    return _as_asked(tokenizer, messages, text, render(tokenizer, messages[:-1], prompt=True))


def _as_asked(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message], text: str, before: str) -> str:
    """Return a conversation's text with its last turn as a model writes it that is asked by `before`."""
    content = messages[-1]["content"]
    opens = before.rstrip().endswith(THINK_OPEN)
    thoughts = content.split(THINK_CLOSE)[0].replace(THINK_OPEN, "").strip() if THINK_CLOSE in content else ""
    turn = text[len(before) :] if text.startswith(before) else ""
    # A template that takes thoughts under a key writes other tags around them, or none.
    tagged = THINK_CLOSE in turn or THINK_CLOSE not in str(tokenizer.chat_template)
    kept = not thoughts or (thoughts in turn and tagged)
    if text.startswith(before) and kept:
        return text
    if not (opens or thoughts):
        return text
    marked = render(tokenizer, [*messages[:-1], {**messages[-1], "content": _MARK}])
    closing = marked[marked.rfind(_MARK) + len(_MARK) :] if _MARK in marked else ""
    if not opens:
        return f"{before}{content}{closing}"
    break_ = before[len(before.rstrip()) :]
    if THINK_CLOSE in content:
        own = content.lstrip().removeprefix(THINK_OPEN)
        return f"{before}{own.lstrip() if break_ else own}{closing}"
    # Whoever did not think closes at once what the invitation opened, as Qwen3's template writes it.
    return f"{before}{'' if break_ else chr(10)}\n{THINK_CLOSE}\n\n{content}{closing}"


def _turns(
    tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Message], only_last: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and the spans of characters of the assistant's turns."""
    text = whole_text(tokenizer, messages)
    own = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    spans = []
    for index in own[-1:] if only_last else own:
        before = render(tokenizer, messages[:index], prompt=True)
        if index == len(messages) - 1 and text.startswith(before):
            spans.append((len(before), len(text)))
            continue
        through = render(tokenizer, messages[: index + 1])
        if not text.startswith(through):
            # Some templates (Phi-3's) write the end token behind the last turn, whichever that is.
            through = through.removesuffix(str(tokenizer.eos_token or ""))
        # The last turn's text is what matters to most callers; an earlier one may lose its reasoning to the template.
        if not (text.startswith(before) and text.startswith(through)):
            raise TurnChanges(
                f"{_named(tokenizer)}: the chat template changes the assistant's turn {index + 1} when it is part "
                f"of a longer conversation; {_WAY_OUT}"
            )
        spans.append((len(before), len(through)))
    return text, spans
