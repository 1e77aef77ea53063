"""The child that proves a runtime: `python -m steps.runtime NAME ANSWER.json`."""

import importlib
import json
import sys
from pathlib import Path

from steps.frame.scale import die_with_parent
from steps.runtime.proof import ABSENT_CODE, PASSING_CODE, Absent, begun_mark
from steps.runtime.verdicts import hide_broken


def main() -> int:
    """Call the proof; write its facts.

    Returns:
        0, `ABSENT_CODE` where the machine lacks what the runtime is for, `PASSING_CODE` where it lacks it for now.
    """
    name, answer = sys.argv[1], Path(sys.argv[2])
    module = importlib.import_module(f"steps.runtime.proofs.{name}")
    die_with_parent()
    hide_broken(but=module.PROOF.runtime)
    begun_mark(answer).touch()
    try:
        facts = module.prove()
    except Absent as absent:
        answer.write_text(json.dumps({"reason": str(absent)}))
        return ABSENT_CODE
    except Exception as error:
        if not _may_pass(error):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return PASSING_CODE
    answer.write_text(json.dumps(facts))
    return 0


def _may_pass(error: Exception) -> bool:
    """Whether memory, a disk or something else that others share was short, so that the next call may go well."""
    # ctypes raises OSError without a number for a library that cannot be loaded, numpy for a full disk.
    short_of_disk = isinstance(error, OSError) and (error.errno is not None or " written" in str(error))
    return short_of_disk or isinstance(error, MemoryError) or "memory" in str(error).lower()


if __name__ == "__main__":
    sys.exit(main())
