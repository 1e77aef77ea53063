"""`reasoning-gym://NAME?size=500&seed=7&KEY=VALUE`: tasks made by reasoning-gym, with what their verifiers need.

NAME is one of the library's data sets (https://github.com/open-thought/reasoning-gym, arXiv 2505.24760) and the keys
are those of its config: `reasoning-gym://chain_sum?min_terms=2&max_terms=2&max_digits=2&size=2000&seed=1`. Values are
YAML scalars, lists are `a,b`. Without `seed` it is 0, so that equal URIs mean equal tasks.

The library makes task number i from `seed + i`, so that neighbouring seeds share nearly all tasks: what is learned from
and what is examined by would be the same. Here seeds are a million apart.

What names and keys there are is read from the library's sources: importing it takes seconds, and a plan needs no more.
"""

import ast
import enum
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import unquote

import yaml

from steps.artifacts.manifest import canonical_json
from steps.frame.errors import UserError, did_you_mean
from steps.frame.pinned import check_unedited
from steps.lm.rows import write_jsonl
from steps.sources.cache import cached

PREFIX = "reasoning-gym://"
KIND = "reasoning-gym"
"""`kind` in a row's `task`."""

_VERSION = 1
_SEED_STEP = 1_000_000
_REGISTRATION = re.compile(r"register_dataset\(\s*(\w+),\s*\w+,\s*(\w+)")
_LISTS = ("list", "tuple", "Sequence")
_PLAIN_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
# Where many answers are right the library gives none, but often an example.
_EXAMPLES = ("example_correct_answer", "example_answer", "possible_answer")


@dataclass(frozen=True)
class Gym:
    """A URI that was read and checked."""

    name: str
    config: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """What identifies the rows: the library's version, the data set, its config, and this file's version."""
        return f"{PREFIX}{self.name}:{canonical_json(dict(self.config)).decode()}:{_version()}:v{_VERSION}"


def fingerprint(uri: str, root: Path) -> str:
    """Return what enters a step's key, known without importing the library."""
    return parse(uri).fingerprint


def check(uri: str, root: Path, cache: Path) -> None:
    """Refuse an unknown data set, key or value."""
    parse(uri)


def fetch_model(uri: str, cache: Path, root: Path) -> Path:
    """Refuse: these are tasks."""
    raise UserError(f"{uri}: this is a data set, where a model is needed")


def fetch_data(uri: str, cache: Path, root: Path) -> list[Path]:
    """Return the file of rows `{question, answer, task}`, made unless in the cache."""
    gym = parse(uri)
    name = hashlib.sha256(gym.fingerprint.encode()).hexdigest()[:16]
    return [cached(cache / KIND / f"{gym.name}-{name}", lambda folder: _make_apart(uri, folder)) / "rows.jsonl"]


def _make_apart(uri: str, folder: Path) -> None:
    """Write the rows in an interpreter of their own.

    Some data sets draw from a set or from the global generator, so that two runs differ unless Python's hashes and
    that generator have fixed seeds.
    """
    program = "import sys; from steps.sources.reasoning_gym import write; sys.exit(write(*sys.argv[1:]))"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    check_unedited("steps.sources", "steps.lm", "steps.artifacts")
    made = subprocess.run(
        [sys.executable, "-c", program, uri, str(folder / "rows.jsonl")],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "MPLBACKEND": "agg"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        last = (made.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(last if last.startswith(uri) else f"{uri}: reasoning-gym failed: {last}")


def write(uri: str, path: str) -> str | None:
    """Write a URI's rows to a file; return what is wrong with it, if anything is."""
    try:
        write_jsonl(Path(path), rows(parse(uri), uri))
    except UserError as error:
        return str(error)
    return None


def rows(gym: Gym, uri: str) -> Iterator[dict[str, Any]]:
    """Make the rows.

    Raises:
        UserError: the library refuses the config, or its data set has no reference answers.
    """
    import random

    import reasoning_gym  # noqa: F401 - registers the data sets
    from reasoning_gym.factory import DATASETS, create_dataset

    seed = gym.config["seed"] * _SEED_STEP
    random.seed(seed)
    hints = get_type_hints(DATASETS[gym.name][1])
    config = {key: _typed(value, hints[key]) for key, value in gym.config.items()}
    try:
        dataset = create_dataset(gym.name, **{**config, "seed": seed})
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"{uri}: reasoning-gym refuses it: {error}") from error
    for entry in dataset:
        task = {"kind": KIND, "dataset": gym.name, "config": dict(gym.config), "entry": plain(entry)}
        yield {"question": entry["question"], "answer": _answer(entry, uri), "task": task}


def parse(uri: str) -> Gym:
    """Read a URI and check it against what the installed library declares.

    Raises:
        UserError: there is no such data set or key, or a value is of another type.
    """
    name, _, query = uri.removeprefix(PREFIX).partition("?")
    if name not in declared():
        raise UserError(f"{uri}: reasoning-gym has no data set `{name}`{did_you_mean(name, declared())}")
    types = config_types(name)
    config: dict[str, Any] = {"seed": 0}
    seen: set[str] = set()
    for part in filter(None, query.split("&")):
        key, separator, text = part.partition("=")
        if not separator or key in seen:
            raise UserError(f"{uri}: write `{key}=VALUE` once")
        if key not in types:
            raise UserError(f"{uri}: {name} has no key `{key}`{did_you_mean(key, types)}")
        seen.add(key)
        config[key] = _declared(unquote(text), types[key], f"{uri}: `{key}`")
    if config["seed"] is None:
        raise UserError(f"{uri}: `seed` must be a number, so that the tasks are the same every time")
    return Gym(name, config)


@cache
def declared() -> dict[str, tuple[Path, str]]:
    """Return for every data set of the installed library the file and the class that declare its config.

    Raises:
        UserError: the library is not installed.
    """
    spec = importlib.util.find_spec("reasoning_gym")
    if spec is None or spec.origin is None:
        raise UserError("reasoning-gym:// needs the package reasoning-gym, which is not installed here")
    found = {}
    # Data sets are in packages of their own; the files beside them are the machinery.
    for file in sorted(Path(spec.origin).parent.glob("*/**/*.py")):
        text = file.read_text(encoding="utf-8")
        name = re.search(r'^DATASET_NAME = "(\w+)"', text, re.MULTILINE)
        for variable, config in _REGISTRATION.findall(text):
            if name and variable == "DATASET_NAME":
                found[name[1]] = (file, config)
    return found


@cache
def config_types(name: str) -> dict[str, str]:
    """Return the keys of a data set's config with their types as written, `list[str]`."""
    file, config = declared()[name]
    classes = [node for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.ClassDef)]
    (fields,) = (node.body for node in classes if node.name == config)
    return {
        node.target.id: ast.unparse(node.annotation)
        for node in fields
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: pairs as lists, everything unknown as its text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(each) for each in value), key=str)
    if hasattr(value, "tolist"):  # numpy
        return plain(value.tolist())
    return plain(value.value) if isinstance(value, enum.Enum) else str(value)


def _answer(entry: Mapping[str, Any], uri: str) -> str:
    answer = entry["answer"]
    if answer is None:
        answer = next((entry["metadata"][key] for key in _EXAMPLES if entry["metadata"].get(key)), None)
    if answer is None:
        raise UserError(f"{uri}: this data set gives no reference answers, so its tasks cannot be rows; choose another")
    return answer if isinstance(answer, str) else json.dumps(plain(answer))


def _declared(text: str, declared_type: str, place: str) -> Any:
    """Read a value as its declared type asks.

    Raises:
        UserError: it is of another type.
    """
    try:
        return _value(text, declared_type, place)
    except UserError:
        raise
    # PyYAML's errors are of any class: a list that does not end, `2026-13-45`, `!!int ''`.
    except Exception:
        raise UserError(f"{place} takes a value of type {declared_type}, not `{text}`") from None


def _value(text: str, declared_type: str, place: str) -> Any:
    """Read a value as its declared type asks.

    Raises:
        UserError: it is of another type.
    """
    inner = declared_type.removeprefix("Optional[").removesuffix("]") if "Optional[" in declared_type else declared_type
    if inner.split("[")[0] in _LISTS:
        element = inner.partition("[")[2].rstrip("]").split(",")[0]
        if text.startswith("["):
            return yaml.safe_load(text)
        return [_value(part, element, place) for part in text.split(",")]
    expected = _PLAIN_TYPES.get(inner)
    value = text if expected in (None, (str,)) else _scalar(text)
    wrong = expected and (not isinstance(value, expected) or (isinstance(value, bool) and inner != "bool"))
    if wrong and not (value is None and "Optional" in declared_type):
        raise UserError(f"{place} takes a value of type {inner}, not `{text}`")
    return value


def _scalar(text: str) -> Any:
    """Read a YAML scalar; `-` and `*`, which mean more in YAML, are texts here."""
    tag = yaml.resolver.Resolver().resolve(yaml.ScalarNode, text, (True, False))
    value = yaml.constructor.SafeConstructor().construct_object(yaml.ScalarNode(tag, text))
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _typed(value: Any, hint: Any) -> Any:
    """Return a value as the library's own type: enumerations, dates and times by their text."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if isinstance(value, str) and hasattr(hint, "fromisoformat"):
        return hint.fromisoformat(value)
    return value


def _version() -> str:
    return importlib.metadata.version("reasoning-gym")
