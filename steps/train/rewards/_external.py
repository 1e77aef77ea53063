"""The reward that asks a program: a proof checker, a compiler, any verifier with a command line."""

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from steps.artifacts import FileDigest, digest_file
from steps.artifacts.tree import tree_sha256
from steps.frame.errors import UserError
from steps.frame.hardware import runs_here
from steps.frame.scale import cores
from steps.lm.tasks import Rollout
from steps.train.rewards._reward import reward
from steps.train.rewards._sandbox import TIMED_OUT, Limits, run_confined

_NOT_RUN = 127
_CHANGED = "reward `external`: the files of the command `{}` were changed since the plan; run again"
_RESTLESS = "reward `external`: the files of the command `{}` are written while it judges; leave them be and run again"
_ATTEMPTS = 3
"""How often answers are judged anew because a file was written meanwhile, if only its time of change."""

_Written = tuple[int, int, int, int]
"""Of a file: its inode, its size, and when (nanoseconds) its content and it itself were last changed."""
_digests: dict[Path, tuple[_Written, FileDigest]] = {}
"""What files held when they were last read: those of a verifier may be large, and every batch asks."""


def _can_run(command: list[str]) -> list[str]:
    if not command:
        raise ValueError("external: `command` is empty; give a program and its arguments")
    if runs_here() and not (shutil.which(command[0]) or Path(command[0]).is_file()):
        raise ValueError(f"external: there is no program `{command[0]}` on this machine")
    return command


def _pinned(given: str, info: ValidationInfo) -> str:
    found = _own_files_sha256(info.data.get("command", []))
    if given and given != found:
        raise ValueError("external: the files of `command` are no longer what `sha256` says")
    return found


@reward(reference="https://arxiv.org/abs/2405.14333")
def external(
    rollouts: Sequence[Rollout],
    *,
    command: Annotated[list[str], AfterValidator(_can_run)],
    sha256: Annotated[str, AfterValidator(_pinned), Field(validate_default=True)] = "",
    seconds: Annotated[float, Field(gt=0, le=3600)] = 30.0,
    memory_mb: Annotated[int, Field(ge=64)] = 4096,
    file_mb: Annotated[int, Field(ge=1)] = 64,
    processes: Annotated[int, Field(ge=1)] = 64,
    network: bool = False,
) -> Sequence[float]:
    """What a verifier's command says: 1 where it exits with 0, or the number that it prints then; else 0.

    The command finds the answer on its standard input and the task (`{id, prompt, answer, source, entry}`) in
    `task.json` in its working directory, the only place where it may write. It is limited like the reward `code`, but
    sees all files and the caller's `PATH` and `HOME`, because it is trusted and the answer is not.

    Args:
        rollouts: sampled answers.
        command: the program and its arguments; paths are relative to the project's directory.
        sha256: of the command's files in the project's directory. Filled in, so that a changed verifier is a new step.
        seconds: time for one answer; 0 for what takes longer.
        memory_mb: address space of each process, in MiB.
        file_mb: size of a file and of the output, in MiB; four times as much for all files together.
        processes: processes and threads at one time.
        network: allow it.

    Raises:
        UserError: the command cannot be run, or its files are no longer what `sha256` says.
    """
    limits = Limits(seconds, memory_mb, file_mb, processes, network)
    words = [str(Path(word).resolve()) if Path(word).is_file() else word for word in command]

    def score(rollout: Rollout) -> float:
        task = {**asdict(rollout.task), "prompt": [dict(message) for message in rollout.task.prompt]}
        outcome = run_confined("command", {"answer": rollout.answer, "task": task}, limits, words)
        if outcome.code == _NOT_RUN:
            raise UserError(f"reward `external`: the command `{' '.join(command)}` cannot be run")
        if outcome.code == TIMED_OUT or outcome.code != 0:
            return 0.0
        try:
            return float(outcome.output)
        except ValueError:
            return 1.0

    for _ in range(_ATTEMPTS):
        files = _as_pinned(command, sha256)
        with ThreadPoolExecutor(cores()) as threads:
            scores = list(threads.map(score, rollouts))
        if _all_written(command) == files:
            return scores
    raise UserError(_RESTLESS.format(" ".join(command)))


def _own_files_sha256(command: Sequence[str], digest: Callable[[Path], FileDigest] = digest_file) -> str:
    """Return a digest of those files in a command that belong to the project; empty where there are none."""
    root = Path.cwd()
    files = _own_files(command)
    if not files:
        return ""
    return tree_sha256({path.relative_to(root).as_posix(): digest(path) for path in files})


def _own_files(command: Sequence[str]) -> list[Path]:
    root = Path.cwd()
    return [path for word in command if (path := (root / word).resolve()).is_file() and path.is_relative_to(root)]


def _written(path: Path) -> _Written:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _all_written(command: Sequence[str]) -> dict[Path, _Written]:
    return {path: _written(path) for path in _own_files(command)}


def _known_digest(path: Path) -> FileDigest:
    """Return a file's digest, read anew only where it was written since."""
    written = _written(path)
    if (known := _digests.get(path)) and known[0] == written:
        return known[1]
    found = digest_file(path)
    _digests[path] = written, found
    return found


def _as_pinned(command: Sequence[str], sha256: str) -> dict[Path, _Written]:
    """Check what is to be run against the settings; return what `_all_written` does.

    Raises:
        UserError: the files are others.
    """
    files = _all_written(command)
    if _own_files_sha256(command, _known_digest) != sha256:
        raise UserError(_CHANGED.format(" ".join(command)))
    return files
