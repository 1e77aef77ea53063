"""llama.cpp's binding: it is built or installed where it is another than the one that is there, and not otherwise."""

import shutil
import zipfile
from pathlib import Path

import pytest

from infra.setup import __main__ as set_up
from infra.setup.llama_cpp import Builder
from infra.setup.stages import StageFailed, Stages

RECORD = "lib/python3.11/site-packages/llama_cpp_python-1.dist-info/RECORD"
PIP = """#!/bin/sh
cd "$(dirname "$0")"
echo "$@" >> pip.log
case "$1" in
    install) mkdir -p "$(dirname {record})"; echo "of the wheel" > {record} ;;
    check) cat faults 2>/dev/null ;;
esac
"""


class Environment:
    """An environment in which pip is a stand-in, and the machine has no network."""

    def __init__(self, path: Path) -> None:
        self.path, self.stages = path, Stages(path / "logs")
        self.record = path / RECORD
        share = path / "share" / "posttrain" / "llama.cpp"
        share.mkdir(parents=True)
        (share / "VERSION").write_text(set_up._builder().version)
        (path / "pip").write_text(PIP.format(record=RECORD))
        (path / "pip").chmod(0o755)

    def set_up(self) -> list[str]:
        """Build and install; return what pip was called for."""
        (self.path / "pip.log").unlink(missing_ok=True)
        set_up._install_binding(self.stages, set_up._build_llama_cpp(self.stages))
        return [line.split()[0] for line in (self.path / "pip.log").read_text().splitlines()]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """One in which the binding is installed, from a wheel in the cache of this user."""

    def no_network(*_: object) -> Path:
        raise StageFailed("no network")

    path = tmp_path / ".venv"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(set_up, "VENV", path)
    monkeypatch.setattr(set_up, "SHARE", path / "share" / "posttrain")
    monkeypatch.setattr(set_up, "PIP", [path / "pip"])
    monkeypatch.setattr(Builder, "fetch", no_network)
    made = Environment(path)
    builder = set_up._builder()
    (builder.cache / builder.key).mkdir(parents=True)
    with zipfile.ZipFile(builder.cache / builder.key / "llama_cpp_python.whl", "w") as stream:
        stream.writestr("library", "a")
    assert made.set_up() == ["install", "check"]
    return made


def test_what_is_installed_is_not_built_again_where_a_cache_was_emptied(
    environment: Environment, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    assert environment.set_up() == ["check"]
    shutil.rmtree(tmp_path / "cache")
    assert environment.set_up() == ["check"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert environment.set_up() == ["check"]
    assert "missing" not in capsys.readouterr().out


def test_what_somebody_installed_over_it_is_replaced_from_the_cache(environment: Environment) -> None:
    environment.record.write_text("of pip's own\n")
    assert environment.set_up() == ["install", "check"]
    assert environment.record.read_text() == "of the wheel\n"


@pytest.mark.parametrize("change", ["other files", "no files", "other options"])
def test_what_is_not_there_as_it_should_be_is_built(
    change: str,
    environment: Environment,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if change == "other options":
        monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    elif change == "other files":
        environment.record.write_text("of pip's own\n")
    else:
        shutil.rmtree(environment.record.parent)
    shutil.rmtree(tmp_path / "cache")
    (environment.path / "faults").write_text("posttrain 0.1 requires llama-cpp-python, which is not installed.\n")
    assert environment.set_up() == ["check"], "that it is missing is no fault of the others"
    assert "llama.cpp is missing" in capsys.readouterr().out


def test_where_it_is_said_to_be_there_the_packages_must_fit_it(environment: Environment, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache")
    (environment.path / "faults").write_text("posttrain 0.1 requires llama-cpp-python, which is not installed.\n")
    with pytest.raises(StageFailed, match="requires llama-cpp-python"):
        environment.set_up()
