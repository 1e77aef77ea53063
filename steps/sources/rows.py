"""Rows out of data files: JSONL, Parquet, CSV and plain text, each row with the place it came from."""

import csv
import datetime
import decimal
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from steps.frame.errors import UserError


@dataclass(frozen=True)
class SourceRow:
    """One row as its source gives it."""

    values: Mapping[str, Any]
    """Cells by column."""
    where: str
    """Where it stands, for error messages: `data.jsonl line 7`."""
    is_mended: bool = False
    """Whether halves of surrogate pairs, which no encoding can write, were replaced in its texts by U+FFFD."""


def read_file(path: Path, label: str) -> Iterator[SourceRow]:
    """Yield the rows of one file; its ending says the format.

    Args:
        path: the file.
        label: what error messages call it.

    Raises:
        UserError: the format is unknown, or a row is malformed (file and line are named).
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{label}: data files end in {', '.join(ENDINGS)}")
    yield from reader(path, label)


def is_data_file(name: str) -> bool:
    """Whether a file name has an ending that `read_file` knows."""
    return Path(name).suffix.lower() in _READERS


def is_about(name: str) -> bool:
    """Whether a file only tells of data or a model beside it: a README, or what libraries write with them."""
    return _ABOUT.fullmatch(PurePosixPath(name).name.lower()) is not None


def _read_jsonl(path: Path, label: str) -> Iterator[SourceRow]:
    """Yield one JSON object a line. Empty lines are allowed at the end only: in the middle they hide a lost row."""
    empty = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{label} line {number}"
            if not line.strip():
                empty = empty or number
                continue
            if empty:
                raise UserError(f"{label} line {empty}: the line is empty; each line must be one JSON object")
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                said = str(error).partition("; use sys.")[0]
                raise UserError(f"{where}: not valid JSON ({said}); each line must be one JSON object") from None
            if not isinstance(values, dict):
                raise UserError(f"{where}: a JSON {_json_name(values)}, where each line must be one JSON object")
            # An escape (`\\ud83d`) is the only way in which half a pair gets into JSON.
            mended = _mended(values, where) if b"\\u" in line else values
            yield SourceRow(mended, where, mended != values)


def _mended(values: Any, where: str) -> Any:
    try:
        return _without_halves(values)
    except RecursionError:
        raise UserError(f"{where}: it is nested too deeply to be read") from None


def _without_halves(value: Any) -> Any:
    """Return a value of JSON with U+FFFD for each half of a surrogate pair in its texts and keys."""
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case list():
            return [_without_halves(each) for each in value]
        case dict():
            return {_without_halves(key): _without_halves(each) for key, each in value.items()}
    return value


def _read_parquet(path: Path, label: str) -> Iterator[SourceRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1024)
        number = 0
        for batch in batches:
            for values in batch.to_pylist():
                number += 1
                row = {key: _plain(each) for key, each in values.items()}
                yield SourceRow(row, f"{label} row {number}")
    # Of damaged files some are told by exceptions of the system's kind.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{label}: not a readable Parquet file ({' '.join(str(error).split())[:300]})") from None


def _plain(value: Any) -> Any:
    """Return a cell as JSON would hold it: dates, times and decimals as text, objects without keys that say nothing.

    Every object of a column has the keys of all, null where it has none of its own.
    """
    match value:
        case dict():
            return {key: _plain(each) for key, each in value.items() if each is not None}
        case list() | tuple():
            return [_plain(each) for each in value]
        case datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta() | decimal.Decimal():
            return str(value)
    return value


def _read_csv(path: Path, label: str) -> Iterator[SourceRow]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            names = list(reader.fieldnames or ())
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f"{label} line 1: two columns are called `{twice}`; rename one")
            for values in reader:
                where = f"{label} line {reader.line_num}"
                if None in values or None in values.values():
                    raise UserError(f"{where}: another number of cells than the {len(reader.fieldnames or ())} columns")
                yield SourceRow(values, where)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{label} line {reader.line_num + 1}: not valid CSV ({error})") from None


def _json_name(value: object) -> str:
    names: dict[type, str] = {list: "array", dict: "object", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _read_json(path: Path, label: str) -> Iterator[SourceRow]:
    """Yield the objects of one array, as Alpaca's and ShareGPT's files are."""
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            # Many files of this name hold an object a line.
            yield from _read_jsonl(path, label)
            return
        raise UserError(f"{label}: not valid JSON ({str(error).partition('; use sys.')[0]})") from None
    if isinstance(rows, dict):
        inner = [each for each in rows.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        rows = inner[0] if len(inner) == 1 else rows
    if not isinstance(rows, list):
        raise UserError(f"{label}: a JSON {_json_name(rows)}, where the file must be one array of objects")
    for number, values in enumerate(rows, start=1):
        where = f"{label} row {number}"
        if not isinstance(values, dict):
            raise UserError(f"{where}: a JSON {_json_name(values)}, where each row must be one JSON object")
        mended = _mended(values, where)
        # No number equals itself that is none.
        yield SourceRow(mended, where, repr(mended) != repr(values))


def _read_text(path: Path, label: str) -> Iterator[SourceRow]:
    """Yield a whole file as one document."""
    try:
        yield SourceRow({"text": path.read_text(encoding="utf-8-sig")}, label)
    except UnicodeDecodeError as error:
        raise UserError(f"{label}: not UTF-8 ({error})") from None


_ABOUT = re.compile(
    r"(readme|licen[cs]e|changelog|contributing|citation|notice)[\w.-]*"
    r"|(dataset_infos?|dataset_dict|state|config|metadata|(generation|tokenizer|adapter|preprocessor)_config"
    r"|tokenizer|vocab|special_tokens_map|added_tokens|[\w.-]*\.index)\.json"
)
TEXTS = (".txt", ".md")
"""Endings of files that are one document each."""
_READERS: dict[str, Callable[[Path, str], Iterator[SourceRow]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".json": _read_json,
    **dict.fromkeys(TEXTS, _read_text),
}

ENDINGS = tuple(_READERS)
"""Endings of the names of data files."""
