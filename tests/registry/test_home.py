"""The home: one name for one place, and one sentence where it can be none."""

import os
from pathlib import Path

import pytest

from registry.errors import RegistryError
from registry.home import Home


def test_a_home_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    names = (tmp_path / "link", tmp_path / "x" / ".." / "home", Path("home"))
    assert {Home.at(name) for name in names} == {Home.at(tmp_path / "home")}


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("named", ["~nosuch/x", "{}/file", "{}/file/below", "{}/q?x", "{}/loop", "\0"])
def test_what_can_be_no_home_is_one_sentence(
    named: str, writes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    named = named.format(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "POSTTRAIN_HOME": named})
    with pytest.raises(RegistryError) as refused:
        Home.from_environment(writes=writes)
    assert str(refused.value).startswith(f"{named}: this can be no home: ")
    assert str(refused.value).endswith("; POSTTRAIN_HOME names another place")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_home_that_cannot_be_made_is_refused_only_to_those_who_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_HOME", "/proc/nope")
    assert Home.from_environment().root == Path("/proc/nope")
    with pytest.raises(RegistryError, match="/proc/nope: this can be no home: No such file or directory"):
        Home.from_environment(writes=True)


def test_the_home_of_another_user_may_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    # Root may write everywhere, so the kernel is not asked.
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
    assert Home.from_environment().root == tmp_path
    with pytest.raises(RegistryError, match="this user may not write there"):
        Home.from_environment(writes=True)
    monkeypatch.setattr(os, "access", lambda _, mode: False)
    with pytest.raises(RegistryError, match="this user may not read it"):
        Home.from_environment()
