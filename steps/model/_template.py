"""A chat template given to a checkpoint: its text, its control tokens, and rows of the embedding for those.

A base model was never taught to talk, and often has no template. Each control token of the one that it is given must be
a single token that no text is read as. Where the vocabulary has it, it stays as it is; else a reserved token takes its
name (`<|reserved_special_token_5|>`, `<unused7>`), or it is added behind the vocabulary, where many models have rows to
spare. A row that was never trained, or is new, starts as the mean of all (https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from steps.artifacts import write_atomic
from steps.frame.errors import UserError, did_you_mean
from steps.lm.chat import render
from steps.lm.checkpoint import chat_template, load_tokenizer, named_templates, stop_token_ids
from steps.lm.turn_end import turn_end
from steps.model._embeddings import embedding_rows, mean_rows, short_rows
from steps.sources import chat_templates, fetch_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_DECLARED = re.compile(r"\{#-?\s*tokens:(?P<tokens>[^#]*?)-?#\}\n?")
# Markup as chat templates write it, `<|end|>`, DeepSeek's `<｜User｜>`, `<end_of_turn>`, `[INST]`.
_MARKUP = re.compile(r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜]{1,40}｜>|<(?:start|end)_of_\w+>|\[/[A-Z][A-Z_]+\]")
_RESERVED = re.compile(
    r"[<\[]\W{0,2}(?:reserved|unused|extra|placeholder|dummy|special)[\w ▁]*?_?\d+\W{0,2}[>\]]", re.I
)
_PROBE = (
    {"role": "user", "content": "Is it so?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def template_text(uri: str, directory: Path, cache: Path, registered: Path | None) -> str:
    """Return the text of the template that a recipe names.

    Args:
        uri: `template://NAME`, a file, or a model that has one.
        directory: the checkpoint that is to get it; a name may be that of one of its own templates.
        cache: directory for downloads.
        registered: where the registry's model is that the URI names; None for any other.

    Raises:
        UserError: there is no such template, or none there.
    """
    own = named_templates(directory)
    name = uri.removeprefix(chat_templates.PREFIX)
    if uri.startswith(chat_templates.PREFIX) and name not in chat_templates.NAMES:
        if name not in own:
            raise UserError(f"template: no chat template `{name}`{did_you_mean(name, [*chat_templates.NAMES, *own])}")
        return own[name]
    place = registered or fetch_template(uri, cache, Path.cwd())
    if place.is_dir():
        if (text := chat_template(place)) is None:
            raise UserError(f"template: {uri} has no chat template of its own")
        return text
    try:
        return place.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"template: {uri} is no text in UTF-8; a chat template is a .jinja file") from None


def give_template(directory: Path, text: str, note: Callable[[str], None], *, built_in: bool) -> set[int]:
    """Give a checkpoint a template, in the place of its own; return the ids of control tokens that are new to it.

    Files are replaced, never written through: they may be links into a store.

    Args:
        directory: the checkpoint.
        text: of the template; its first line may name its control tokens, `{# tokens: <|im_start|> <|im_end|> #}`.
        note: told what a user should know.
        built_in: whether the text leaves the beginning of a text (`bos_token`) to the tokenizer.

    Raises:
        UserError: it is no template, ends turns with a token that the tokenizer does not have, or ends none.
    """
    from transformers import AddedToken

    tokenizer = load_tokenizer(directory)
    body, tokens = _declared(text)
    if built_in and _begins(tokenizer):
        body = "{{- bos_token }}" + body
    tokenizer.chat_template = body
    if "eos_token" in body and not tokenizer.eos_token:
        raise UserError("template: it ends turns with `eos_token`, and the tokenizer has none; take another template")
    shown = _shown(tokenizer)
    if tokens is None:
        tokens = _markup(shown)
    if (begins := _begins(tokenizer)) and not all(text.startswith(begins) for text in shown):
        note(f"the template leaves out {begins}, with which this tokenizer begins every other text")
    rows = embedding_rows(directory)
    missing = [token for token in tokens if not _is_control(tokenizer, token)]
    known = tokenizer.get_vocab()
    fresh = [token for token in missing if token not in known]
    taken = _rename_reserved(directory, tokenizer, fresh, tokens, rows)
    tokenizer = load_tokenizer(directory) if taken else tokenizer
    tokenizer.chat_template = body
    if left := [token for token in missing if token not in taken]:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in left], special_tokens=True)
    _save_tokenizer(tokenizer, directory)
    if turn_end(tokenizer) is None:
        raise UserError(
            "template: no token ends the assistant's turn in it, so no model would learn to stop; its first line may "
            "name its control tokens, {# tokens: <|turn> <turn|> #}"
        )
    # Those of Mistral's base models are there, with rows of zeros.
    new = {*_ids(tokenizer, fresh), *short_rows(directory, _ids(tokenizer, tokens))}
    mean_rows(directory, sorted(new), len(tokenizer))
    _say(note, taken, [token for token in fresh if token not in taken], len(tokenizer) - rows)
    return new


def _declared(text: str) -> tuple[str, list[str] | None]:
    """Return a template without the line that names its control tokens, and those; None where it has no such line."""
    match = _DECLARED.match(text)
    return (text[match.end() :], match["tokens"].split()) if match else (text, None)


def _shown(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Return what the template writes of some conversations: with a system message and without, asked and answered.

    Raises:
        UserError: it refuses them all.
    """
    found: list[str] = []
    why: UserError | None = None
    for turns in (_PROBE, ({"role": "system", "content": "Be brief."}, *_PROBE)):
        for prompt in (False, True):
            try:
                found.append(render(tokenizer, turns, prompt=prompt))
            except UserError as error:
                why = error
    if not found:
        raise UserError(f"template: it refuses a question that is answered ({why})")
    return found


def _markup(shown: Sequence[str]) -> list[str]:
    """Return what looks like control tokens; a word in brackets where it is closed, too (`[INST]` and `[/INST]`)."""
    found = list(dict.fromkeys(name for text in shown for name in _MARKUP.findall(text)))
    opened = [name.replace("[/", "[") for name in found if name.startswith("[/")]
    return [*(name for name in opened if any(name in text for text in shown)), *found]


def _begins(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the token that the tokenizer itself puts before every text; nothing where it puts none."""
    first: Any = tokenizer("a")["input_ids"]
    return str(tokenizer.bos_token) if tokenizer.bos_token and first[:1] == [tokenizer.bos_token_id] else ""


def _is_control(tokenizer: "PreTrainedTokenizerFast", token: str) -> bool:
    """Whether a text is one token wherever it stands: added to the vocabulary, not merged of pieces."""
    number: Any = tokenizer.get_vocab().get(token)
    return number is not None and number in tokenizer.added_tokens_decoder


def _ids(tokenizer: "PreTrainedTokenizerFast", tokens: Sequence[str]) -> list[int]:
    found: Any = tokenizer.convert_tokens_to_ids(list(tokens))
    return found


def _rename_reserved(
    directory: Path, tokenizer: "PreTrainedTokenizerFast", fresh: Sequence[str], tokens: Sequence[str], rows: int
) -> dict[str, str]:
    """Let reserved tokens take the names of new ones, where there are enough; return the old name of each."""
    added = sorted((number, token.content) for number, token in tokenizer.added_tokens_decoder.items())
    named: Any = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    serving = {*named, *stop_token_ids(directory)}
    free = [
        name
        for number, name in added
        if _RESERVED.fullmatch(name) and number < rows and name not in tokens and number not in serving
    ]
    if not fresh or len(free) < len(fresh):
        return {}
    taken = dict(zip(fresh, free, strict=False))
    names = {old: new for new, old in taken.items()}
    for name in _TOKENIZER_FILES:
        file = directory / name
        if file.exists():
            content = _renamed(json.loads(file.read_text(encoding="utf-8")), names)
            write_atomic(file, json.dumps(content, ensure_ascii=False, indent=2).encode())
    return taken


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """Return JSON in which every text and key that is an old name is the new one; a token so named is special."""
    match value:
        case str():
            return names.get(value, value)
        case list():
            return [_renamed(each, names) for each in value]
        case dict():
            found = {names.get(key, key): _renamed(each, names) for key, each in value.items()}
            is_renamed = "special" in value and value.get("content") in names
            return {**found, "special": True, "normalized": False} if is_renamed else found
    return value


def _save_tokenizer(tokenizer: "PreTrainedTokenizerFast", directory: Path) -> None:
    with TemporaryDirectory(dir=directory.parent) as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            (directory / file.name).unlink(missing_ok=True)
            shutil.move(file, directory / file.name)


def _say(note: Callable[[str], None], taken: dict[str, str], added: Sequence[str], beyond: int) -> None:
    for new, old in taken.items():
        note(f"the template's {new} takes the place of the reserved token {old}")
    if added:
        more = (
            f"; {beyond} rows were added to the embedding" if beyond > 0 else ", in rows that the embedding had spare"
        )
        note(f"the template's {', '.join(added)} were added to the vocabulary{more}")
