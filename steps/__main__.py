"""Run one step from its spec: `python -m steps SPEC.json`, or `accelerate launch -m steps SPEC.json`."""

import os
import sys
from pathlib import Path

from pydantic import ValidationError

from steps.frame.errors import first_complaint
from steps.frame.runner import run_step
from steps.frame.scale import die_with_parent
from steps.frame.spec import StepSpec
from steps.runtime.verdicts import hide_broken


def main() -> int:
    """Run the step and return 0 (finished), 2 (refused: bad input) or 1 (failed)."""
    if len(sys.argv) != 2:
        print("usage: python -m steps SPEC.json", file=sys.stderr)
        return 2
    if "LOCAL_RANK" in os.environ:
        # The launcher puts its processes into sessions of their own: nothing else would end them with it.
        die_with_parent()
    try:
        spec = StepSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    except OSError as error:
        print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr)
        return 2
    except ValidationError as error:
        print(f"{sys.argv[1]}: this is no spec of a step: {first_complaint(error)}", file=sys.stderr)
        return 2
    hide_broken()
    result = run_step(spec)
    if result.message:
        print(result.message, file=sys.stderr)
    return {"finished": 0, "refused": 2, "failed": 1}[result.status]


if __name__ == "__main__":
    sys.exit(main())
