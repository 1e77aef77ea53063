"""`python -m infra.setup`, by `make setup`: every stage, the independent ones at once, then the proofs."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from infra.setup.llama_cpp import Builder
from infra.setup.moved import renew_place
from infra.setup.packages import LOCK as LOCK_NAME
from infra.setup.packages import installed_files, locked, own_conflicts
from infra.setup.stages import Log, StageFailed, Stages, interruption
from steps.runtime.processor import this_processor

ROOT = Path.cwd()
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
SHARE = VENV / "share" / "posttrain"
LOCK = ROOT / LOCK_NAME
BINDING = "llama_cpp_python"
COMPILED = ("PyPcre", "pycosat")
"""Packages that are compiled here. Never from pip's cache: PyPcre is built for one processor unless told otherwise."""
_LOOK_SECONDS = 0.5
MADE_FROM = ("requirements.lock", "pyproject.toml", "infra/setup.sh", "infra/setup/*.py", "infra/*.lock")
"""What the environment is made from, as the rule for `.venv/.ready` in the Makefile has it."""
OURS_ALONE = ("LLAMA_CPP_LIB_PATH", "POSTTRAIN_LLAMA_CPP_VARIANT")
"""Variables by which other libraries than the installed ones would be proven."""
PIP = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def main() -> int:
    """Set up; return 0 if all that everything needs is there, 1 where it is not."""
    began = time.monotonic()
    print(
        f"setting up .venv for {this_processor().model} (some minutes the first time; logs in .venv/logs)", flush=True
    )
    try:
        with _alone() as (lock, has_waited):
            if has_waited and _is_ready():
                print("the other one has made all of it", flush=True)
                return 0
            _remove_broken_venv()
            stages = Stages(VENV / "logs", lock)
            with _ready_at_the_end():
                _set_up(stages)
    except (StageFailed, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    stages.say(f"{'ready':<52} {time.monotonic() - began:6.1f} s")
    return 0


def _set_up(stages: Stages) -> None:
    _make_venv(stages)
    # Of a checkout that was moved or copied; pip leaves scripts as they are, whose packages have not changed.
    if changed := renew_place(VENV):
        stages.say(f"{changed} scripts ran in another place than this; now they run here")
    with ThreadPoolExecutor(2) as pool:
        llama_cpp = pool.submit(_build_llama_cpp, stages)
        try:
            packages = pool.submit(_install_packages, stages)
            # A signal that comes just before a wait without end is seen at its end only: Ctrl-C would be lost.
            both: list[Future[Any]] = [packages, llama_cpp]
            while wait(both, _LOOK_SECONDS, FIRST_EXCEPTION).not_done:
                for ended in filter(Future.done, both):
                    ended.result()
            packages.result()
            wheel = llama_cpp.result()
        except BaseException:
            stages.stop()
            raise
    _install_binding(stages, wheel)
    _prove(stages)


@contextlib.contextmanager
def _alone() -> Iterator[tuple[int, bool]]:
    """Keep other set-ups of this checkout waiting, and end like Ctrl-C where somebody else ends this one.

    Yields the lock's descriptor, and whether this one had to wait.
    """
    before = {number: signal.signal(number, interruption) for number in interruption.SIGNALS}
    place, has_waited = os.open(ROOT, os.O_RDONLY), False
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another set-up of this checkout runs; waiting for its end", flush=True)
        has_waited = True
        fcntl.flock(place, fcntl.LOCK_EX)
    try:
        yield place, has_waited
    finally:
        # Whoever else has the descriptor: no command runs any more.
        fcntl.flock(place, fcntl.LOCK_UN)
        os.close(place)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _ready_at_the_end() -> Iterator[None]:
    """Mark the environment as ready, dated as of the beginning: what changes meanwhile is newer, and `make` sees it."""
    ready, partial = VENV / ".ready", VENV / ".ready.partial"
    ready.unlink(missing_ok=True)
    partial.touch()
    # The file system's own date, by which it dates those files, too.
    began = partial.stat().st_mtime_ns
    partial.write_text(_readiness())
    os.utime(partial, ns=(began, began))
    yield
    partial.replace(ready)


def _is_ready() -> bool:
    ready = VENV / ".ready"
    return ready.exists() and ready.read_text() == _readiness()


def _readiness() -> str:
    """Return what `.ready` holds: the place, since a checkout that is moved is set up again, and a digest of the rest.

    Raises:
        StageFailed: the lock lacks a line that is needed.
    """
    files = [path for pattern in MADE_FROM for path in sorted(ROOT.glob(pattern))]
    content = {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    # The builder knows which variables and tools shape what is compiled.
    content["llama.cpp"] = _builder().key
    return f"{ROOT}\n{hashlib.sha256(json.dumps(content).encode()).hexdigest()}\n"


def cache() -> Path:
    """Return the directory of wheels that were built before; beside the packages where this user has no cache."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return SHARE / "cache"


def _remove_broken_venv() -> None:
    """Remove what an interrupted set-up, or a Python that is gone, left of the environment."""
    pip = [PYTHON, "-m", "pip", "--version"]
    if VENV.is_dir() and not (PYTHON.exists() and subprocess.run(pip, capture_output=True).returncode == 0):
        shutil.rmtree(VENV)


def _make_venv(stages: Stages) -> None:
    if not PYTHON.exists():
        with stages.stage("environment") as log:
            try:
                log.run([sys.executable, "-m", "venv", "--symlinks", VENV])
            except StageFailed as error:
                raise StageFailed(f"{error}\nIs the venv module of {sys.executable} whole?") from None


def _install_packages(stages: Stages) -> None:
    """Install the lock, llama.cpp's binding excepted; torch's libraries for GPUs; posttrain; DeepSpeed beside them."""
    os.environ["PYPCRE_DISABLE_NATIVE_FLAGS"] = "1"
    with stages.stage("Python packages") as log, tempfile.TemporaryDirectory() as scratch:
        lines = [line for line in LOCK.read_text().splitlines() if not line.startswith(f"{BINDING}==")]
        rest = Path(scratch) / "rest.lock"
        rest.write_text("\n".join(lines) + "\n")
        # Ten packages come as source; an environment of its own for the build of each would take half a minute.
        log.run([*PIP, "install", "--no-deps", *(f"{name}=={locked(name)}" for name in ("setuptools", "packaging"))])
        _install_compiled(log)
        log.run([*PIP, "install", "--no-deps", "--no-build-isolation", "-r", rest])
        # The lock holds what every machine needs. A build of torch for GPUs needs NVIDIA's libraries, too.
        log.run([*PIP, "install", "--constraint", LOCK, f"torch=={locked('torch')}"])
        log.run([*PIP, "install", "--no-deps", "--no-build-isolation", "-e", ROOT])
    # Not among the other packages: where accelerate finds DeepSpeed it imports it in every training.
    beside, wanted = SHARE / "deepspeed", (ROOT / "infra" / "deepspeed.lock").read_bytes()
    if not (beside / "LOCK").exists() or (beside / "LOCK").read_bytes() != wanted:
        with stages.stage("DeepSpeed") as log:
            shutil.rmtree(beside, ignore_errors=True)
            options = ["--no-deps", "--no-build-isolation", "--target", beside]
            log.run([*PIP, "install", *options, "-r", "infra/deepspeed.lock"], DS_BUILD_OPS="0")
            (beside / "LOCK").write_bytes(wanted)


def _install_compiled(log: Log) -> None:
    """Compile what is in C for any processor of this architecture, unless that was done in this environment."""
    wanted = [f"{name}=={locked(name)}" for name in COMPILED]
    placed = SHARE / "COMPILED"

    def state() -> str:
        return "\n".join([*wanted, *(installed_files(VENV, name) for name in COMPILED)])

    if placed.exists() and placed.read_text() == state():
        return
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--force-reinstall"]
    log.run([*PIP, "install", *options, *wanted])
    placed.parent.mkdir(parents=True, exist_ok=True)
    placed.write_text(state())


def _build_llama_cpp(stages: Stages) -> Path | None:
    """Return the wheel of llama.cpp's binding to install, built if none of exactly this is there; place its converter.

    None where exactly this is installed, and where it does not compile: all else works without it.
    """
    builder, share = _builder(), SHARE / "llama.cpp"
    is_placed = (share / "VERSION").exists() and (share / "VERSION").read_text().strip() == builder.version
    # Asked first: a cache may be emptied at any time, and what is installed works on.
    if is_placed and _is_installed(builder.key):
        return None
    wheel = builder.cached()
    if wheel and is_placed:
        return wheel
    try:
        name = "llama.cpp's converter" if wheel else "llama.cpp, compiled for any processor"
        with stages.stage(name) as log, _scratch() as scratch:
            source = builder.fetch(scratch, log)
            _place_converter(source / "vendor" / "llama.cpp", share, builder.version)
            return wheel or builder.build(source, log)
    except StageFailed as error:
        if stages.commands.stopped:
            return None
        stages.say(f"llama.cpp is missing, so steps that need it will not run; all others do: {error}")
        return None


def _builder(kept_in: str = "llama.cpp") -> Builder:
    return Builder(PYTHON, locked(BINDING), this_processor(), cache() / kept_in)


def _place_converter(llama: Path, share: Path, version: str) -> None:
    """Keep the converter to GGUF and the gguf library it needs, which come with this source only."""
    share.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="llama.cpp.", dir=share.parent) as scratch:
        partial = Path(scratch) / "llama.cpp"
        partial.mkdir()
        for name in ("convert_hf_to_gguf.py", "LICENSE"):
            shutil.copyfile(llama / name, partial / name)
        for name in ("conversion", "gguf-py"):
            shutil.copytree(llama / name, partial / name)
        (partial / "VERSION").write_text(version)
        shutil.rmtree(share, ignore_errors=True)
        partial.replace(share)


def _is_installed(key: str) -> bool:
    """Whether llama.cpp's binding was installed from the wheel that has this key, and is what is there now."""
    placed = SHARE / "llama.cpp" / "WHEEL"
    files = installed_files(VENV, BINDING)
    return files != "" and placed.exists() and placed.read_text() == f"{key}\n{files}"


def _install_binding(stages: Stages, wheel: Path | None) -> None:
    """Install the wheel, if it is another than what is installed, and check that all packages fit together."""
    key = wheel.parent.name if wheel else _builder().key
    with stages.stage("all packages together") as log:
        if wheel and not _is_installed(key):
            log.run([*PIP, "install", "--no-deps", "--force-reinstall", wheel])
            (SHARE / "llama.cpp" / "WHEEL").write_text(f"{key}\n{installed_files(VENV, BINDING)}")
        said = log.ask([*PIP, "check"]).stdout
        # Where llama.cpp is missing, that was told.
        is_there = _is_installed(key)
        faults = [line for line in own_conflicts(said) if is_there or "llama" not in line]
        if faults:
            raise StageFailed("; ".join(faults))
    for line in said.splitlines():
        if line not in faults and not line.startswith("No broken"):
            stages.say(f"not of the lock: {line}")


def _prove(stages: Stages) -> None:
    """Call every native library in a child; what dies is made anew once, the safer way, and proven again."""
    with stages.stage("proof of every native library") as proof:
        broken = _doctor(proof)
    for each in {row["distribution"]: row for row in broken}.values():
        with contextlib.suppress(StageFailed), stages.stage(f"{each['runtime']} made anew") as log:
            _make_anew(each, log)
    for each in _doctor(proof, *(each["runtime"] for each in broken)) if broken else []:
        stages.say(f"{each['runtime']} does not work here, so steps that need it will not run: {each['reason']}")


def _make_anew(verdict: dict[str, Any], log: Log) -> None:
    """Build llama.cpp without its newest variant from scratch; fetch any other package again, past every cache."""
    if verdict["runtime"] != "llama.cpp":
        name = verdict["distribution"]
        options = ["--no-deps", "--force-reinstall", "--no-cache-dir", "--constraint", LOCK]
        return log.run([*PIP, "install", *options, name])
    builder = _builder("llama.cpp-plain")
    with _scratch() as scratch:
        wheel = builder.build(builder.fetch(scratch, log), log, safest=True)
        log.run([*PIP, "install", "--no-deps", "--force-reinstall", wheel])
    return (SHARE / "llama.cpp" / "WHEEL").unlink(missing_ok=True)


def _doctor(log: Log, *runtimes: str) -> list[dict[str, Any]]:
    """Prove the named runtimes, or all; return the verdicts of those that posttrain needs and are broken or absent."""
    done = log.ask([VENV / "bin" / "posttrain", "doctor", "--json", *runtimes], without=OURS_ALONE)
    try:
        told = json.loads(done.stdout)["runtimes"]
        return [each for each in told if each["status"] != "works" and not each["optional"]]
    except ValueError:
        raise StageFailed(f"`posttrain doctor` ended with code {done.returncode}:\n{log.tail()}") from None


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="posttrain-set-up-") as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
