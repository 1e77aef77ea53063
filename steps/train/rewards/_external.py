"""The reward that asks a program: a proof checker, a compiler, any verifier with a command line."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo

from steps.artifacts import digest_file
from steps.artifacts.tree import tree_sha256
from steps.frame.errors import UserError
from steps.frame.hardware import runs_here
from steps.frame.scale import cores
from steps.lm.tasks import Rollout
from steps.train.rewards._reward import reward
from steps.train.rewards._sandbox import TIMED_OUT, Limits, run_confined

_NOT_RUN = 127
_CHANGED = "the files of the command `{}` were changed since the plan; run again"


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
    files = _as_pinned(command, sha256)
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

    with ThreadPoolExecutor(cores()) as threads:
        scores = list(threads.map(score, rollouts))
    if _written(command) != files:
        raise UserError(f"reward `external`: {_CHANGED.format(' '.join(command))}")
    return scores


def _own_files_sha256(command: Sequence[str]) -> str:
    """Return a digest of those files in a command that belong to the project; empty where there are none."""
    root = Path.cwd()
    files = _own_files(command)
    if not files:
        return ""
    return tree_sha256({path.relative_to(root).as_posix(): digest_file(path) for path in files})


def _own_files(command: Sequence[str]) -> list[Path]:
    root = Path.cwd()
    return [path for word in command if (path := (root / word).resolve()).is_file() and path.is_relative_to(root)]


def _written(command: Sequence[str]) -> tuple[tuple[Path, int, int], ...]:
    """Return which files they are and when each was written last (nanoseconds)."""
    stats = [(path, path.stat()) for path in _own_files(command)]
    return tuple((path, stat.st_ino, stat.st_mtime_ns) for path, stat in stats)


def _as_pinned(command: Sequence[str], sha256: str) -> tuple[tuple[Path, int, int], ...]:
    """Check what is to be run against the settings; return what `_written` does.

    Raises:
        UserError: the files are others.
    """
    files = _written(command)
    if _own_files_sha256(command) != sha256:
        raise UserError(f"reward `external`: {_CHANGED.format(' '.join(command))}")
    return files
