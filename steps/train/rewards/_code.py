"""The reward that runs the answer's code."""

import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from pydantic import Field

from steps.frame.errors import UserError
from steps.frame.scale import cores
from steps.lm.tasks import Rollout
from steps.train.rewards._answers import place
from steps.train.rewards._reward import reward
from steps.train.rewards._sandbox import Limits, run_confined

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


@reward(reference="https://arxiv.org/abs/2107.03374")
def code(
    rollouts: Sequence[Rollout],
    *,
    partial: bool = False,
    seconds: Annotated[float, Field(gt=0, le=600)] = 10.0,
    memory_mb: Annotated[int, Field(ge=64)] = 512,
    file_mb: Annotated[int, Field(ge=1)] = 8,
    processes: Annotated[int, Field(ge=1)] = 8,
) -> Sequence[float]:
    """1 where the answer's Python passes the tests of its task, else 0.

    The row's `task` has `tests`: statements that must not raise (`assert add(1, 2) == 3`), run one after another in
    what the answer defined; or `{input, output}` pairs for a program, each run by itself and compared line by line. A
    `setup` runs before the answer. Only the standard library can be imported.

    Each run is confined: at most `memory_mb` for each process, `seconds` of wall and processor time, files of
    `file_mb`, `processes` at once, all of them killed at the end; no variables of the caller's environment, a
    temporary working directory. Where the kernel allows namespaces it also has no network and sees and changes no file
    but its own; where a container forbids them, sockets and other programs are refused to Python code by an audit hook
    only, and a warning says so. A test in the answer's own process can be cheated by an answer that looks for it
    (`__eq__` that is always true, or the frames above it); `{input, output}` pairs are compared outside and cannot.

    Args:
        rollouts: sampled answers; the last fenced block counts, or all of it where there is none.
        partial: give the share of tests that passed.
        seconds: time for one run.
        memory_mb: memory for each process, in MiB.
        file_mb: size of a file and of the output, in MiB; four times as much for all files together.
        processes: processes and threads at one time.

    Raises:
        UserError: a row has no tests.
    """
    limits = Limits(seconds, memory_mb, file_mb, processes)

    def score(rollout: Rollout) -> float:
        tests = _tests_of(rollout)
        text = rollout.task.entry.get("setup", "") + "\n" + last_block(rollout.answer)
        passed = _passed_pairs(text, tests, limits) if isinstance(tests[0], Mapping) else _passed(text, tests, limits)
        return passed / len(tests) if partial else float(passed == len(tests))

    with ThreadPoolExecutor(cores()) as threads:
        return list(threads.map(score, rollouts))


def last_block(answer: str) -> str:
    """Return the code in the last fenced block of an answer, or all of an answer without one."""
    blocks = _FENCE.findall(answer)
    return blocks[-1] if blocks else answer


def _tests_of(rollout: Rollout) -> Sequence[Any]:
    tests = rollout.task.entry.get("tests")
    statements = isinstance(tests, Sequence) and all(isinstance(test, str) for test in tests)
    pairs = isinstance(tests, Sequence) and all(_is_pair(test) for test in tests)
    if not tests or isinstance(tests, str) or not (statements or pairs):
        raise UserError(
            f"reward `code`: {place(rollout)} has no tests; its `task` needs `tests`, a list of statements or of "
            "{input, output}"
        )
    return tests


def _is_pair(test: Any) -> bool:
    return isinstance(test, Mapping) and all(isinstance(test.get(key), str) for key in ("input", "output"))


def _passed(text: str, tests: Sequence[str], limits: Limits) -> int:
    """Count the statements that held. Only a token that the answer was not given proves that one was reached."""
    token = secrets.token_hex(16)
    output = run_confined("tests", {"code": text, "tests": list(tests), "token": token}, limits).output
    lines = set(output.splitlines())
    return sum(f"{token} {number}" in lines for number in range(len(tests)))


def _passed_pairs(text: str, tests: Sequence[Mapping[str, str]], limits: Limits) -> int:
    passed = 0
    for test in tests:
        outcome = run_confined("program", {"code": text, "input": test["input"]}, limits)
        passed += outcome.code == 0 and _lines(outcome.output) == _lines(test["output"])
    return passed


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
