"""The child that proves a runtime: `python -m steps.runtime NAME ANSWER.json`."""

import importlib
import json
import sys
from pathlib import Path

from steps.frame.scale import die_with_parent
from steps.runtime.proof import ABSENT_CODE, Absent
from steps.runtime.verdicts import hide_broken


def main() -> int:
    """Call the proof; write its facts. Returns 0, or `ABSENT_CODE` where the machine lacks what the runtime is for."""
    name, answer = sys.argv[1], Path(sys.argv[2])
    module = importlib.import_module(f"steps.runtime.proofs.{name}")
    die_with_parent()
    hide_broken(but=module.PROOF.runtime)
    try:
        facts = module.prove()
    except Absent as absent:
        answer.write_text(json.dumps({"reason": str(absent)}))
        return ABSENT_CODE
    answer.write_text(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
