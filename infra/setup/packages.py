"""What the lock says and what is installed; `python -m infra.setup.packages` writes the lock anew, by `make lock`."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

from infra.setup.stages import StageFailed

LOCK = Path("requirements.lock")
_NAMES_HERE = ("pip", "posttrain")
"""Installed, but not by the lock."""


def canonical(name: str) -> str:
    """Return a distribution's name as the index compares names: `PyYAML` and `pyyaml` are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked_versions() -> dict[str, str]:
    """Return the versions in the lock, by canonical name."""
    pairs = (line.strip().split("==") for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line)
    return {canonical(name): version for name, version in pairs}


def locked(name: str) -> str:
    """Return the version of a package in the lock.

    Raises:
        StageFailed: it is not there.
    """
    try:
        return locked_versions()[canonical(name)]
    except KeyError:
        raise StageFailed(f"{LOCK} has no line `{name}==VERSION`; `git checkout {LOCK}` brings it back") from None


def installed_files(environment: Path, name: str) -> str:
    """Return a digest of the files that pip says it installed of a package; empty where it is not there."""
    for record in environment.glob("lib/python*/site-packages/*.dist-info/RECORD"):
        if canonical(record.parent.name.partition("-")[0]) == canonical(name):
            return hashlib.sha256(record.read_bytes()).hexdigest()
    return ""


def own_conflicts(said: str) -> list[str]:
    """Return the lines of `pip check` that speak of packages of the lock; what else is installed is its user's."""
    ours = {*locked_versions(), "posttrain"}
    return [line for line in said.splitlines() if line.strip() and canonical(line.split()[0]) in ours]


def write_lock(listed: str) -> str:
    """Return the lock's new text: its comments, and each installed package with its version.

    Args:
        listed: what `pip list --format=freeze` prints: unlike `pip freeze`, it gives versions of what was installed
            from a file, too, as llama.cpp's binding is.
    """
    comments = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    pairs = [line.split("==") for line in listed.splitlines() if "==" in line]
    # Builds of torch are named after what they are for: that is not part of the lock.
    kept = [f"{name}=={version.partition('+')[0]}" for name, version in pairs if canonical(name) not in _NAMES_HERE]
    return "\n".join([*comments, *sorted(kept, key=lambda line: canonical(line.split("==")[0]))]) + "\n"


def main() -> None:
    """Write the lock from what is installed in the environment of this interpreter."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "list", "--format=freeze"]
    text = write_lock(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    partial = LOCK.with_name(f"{LOCK.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(LOCK)


if __name__ == "__main__":
    main()
