"""An environment that was moved or copied: its scripts run in the place where it is now."""

import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from infra.setup import __main__ as set_up
from infra.setup.moved import renew_place
from infra.setup.stages import Stages

SCRIPT = "#!{python}\nimport sys\nprint(sys.prefix, sys.flags.isolated)\n"
LONG = "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''\nimport sys\nprint(sys.prefix, sys.flags.isolated)\n"
OTHERS = {
    "env": "#!/usr/bin/env python3\nprint('/old/.venv/bin/python')\n",
    "sh": "#!/bin/sh\necho /old/.venv/bin/python\n",
    "system": "#!/usr/bin/python3\n",
    "text": "/old/.venv/bin/python\n",
    "empty": "",
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An environment with scripts as pip writes them, of packages and of DeepSpeed beside them."""
    environment = tmp_path / "old" / ".venv"
    venv.create(environment, symlinks=True)
    for folder in (environment / "bin", environment / "share" / "posttrain" / "deepspeed" / "bin"):
        folder.mkdir(parents=True, exist_ok=True)
        python = environment / "bin" / "python"
        texts = {
            "plain": SCRIPT.format(python=python),
            "versioned": SCRIPT.format(python=f"{python}3"),
            "option": SCRIPT.format(python=f"{python} -I"),
            "long": LONG.format(python=python),
            **OTHERS,
        }
        for name, text in texts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o750)
        (folder / "binary").write_bytes(b"\x7fELF\xff#!/old/.venv/bin/python\n")
    return environment


def places() -> list[str]:
    """Plain, with a space and letters of others, and too long for a first line."""
    return ["new", "my folder ü", "/".join(["n" * 40] * 4)]


@pytest.mark.parametrize("place", places())
@pytest.mark.parametrize("is_copy", [True, False])
def test_scripts_run_in_the_environment_that_they_lie_in(old: Path, place: str, is_copy: bool, tmp_path: Path) -> None:
    here = tmp_path / place / ".venv"
    if is_copy:
        shutil.copytree(old, here, symlinks=True)
    else:
        here.parent.mkdir(parents=True)
        old.rename(here)
    assert renew_place(here) == 8 + 3, "the scripts, and three to activate it"
    for folder in (here / "bin", here / "share" / "posttrain" / "deepspeed" / "bin"):
        for name, is_isolated in (("plain", 0), ("versioned", 0), ("option", 1), ("long", 0)):
            said = subprocess.run([folder / name], capture_output=True, text=True, check=True).stdout
            assert said == f"{here} {is_isolated}\n"
            assert (folder / name).stat().st_mode & 0o777 == 0o750
        assert {name: (folder / name).read_text() for name in OTHERS} == OTHERS
        assert not list(folder.glob("*partial*"))
    assert renew_place(here) == 0, "nothing is left to do"


@pytest.mark.parametrize("place", places())
def test_activating_it_leads_to_the_place_where_it_is(old: Path, place: str, tmp_path: Path) -> None:
    """Once there, and from there to the next place, whose name is written over the one that set-up wrote."""
    for step in (place, "last"):
        here = tmp_path / step / ".venv"
        here.parent.mkdir(parents=True)
        old = old.rename(here)
        renew_place(here)
        script = f". '{here}/bin/activate'; echo \"$VIRTUAL_ENV\"; command -v python"
        said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
        assert said.splitlines() == [str(here), str(here / "bin" / "python")]
        for name in ("activate.csh", "activate.fish"):
            assert "old/.venv" not in (here / "bin" / name).read_text()
            assert str(here) in (here / "bin" / name).read_text()


def test_set_up_of_a_moved_checkout_renews_its_scripts(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old.parent.rename(tmp_path / "new")
    here = tmp_path / "new" / ".venv"
    monkeypatch.setattr(set_up, "VENV", here)
    monkeypatch.setattr(set_up, "PYTHON", here / "bin" / "python")
    for name in ("_install_packages", "_build_llama_cpp", "_prove"):
        monkeypatch.setattr(set_up, name, lambda _: None)
    monkeypatch.setattr(set_up, "_install_binding", lambda *_: None)
    set_up._set_up(Stages(tmp_path / "logs"))
    assert subprocess.run([here / "bin" / "plain"], capture_output=True, text=True).stdout == f"{here} 0\n"
    assert capsys.readouterr().out == "11 scripts ran in another place than this; now they run here\n"


def test_what_has_several_names_is_changed_under_one_only(old: Path, tmp_path: Path) -> None:
    """A copy by hard links: the original stays as it is."""
    here = tmp_path / "new" / ".venv"
    shutil.copytree(old, here, symlinks=True, copy_function=os.link)
    renew_place(here)
    assert (old / "bin" / "plain").read_text() == SCRIPT.format(python=old / "bin" / "python")
    assert (here / "bin" / "plain").read_text() == SCRIPT.format(python=here / "bin" / "python")


def test_an_environment_that_stays_is_left_as_it_is(old: Path) -> None:
    before = {path: path.lstat().st_mtime_ns for path in old.rglob("*")}
    assert renew_place(old) == 0
    assert {path: path.lstat().st_mtime_ns for path in old.rglob("*")} == before
