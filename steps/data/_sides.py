"""On which side a row stands, to train, to choose or to test by: decided by its question alone."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from steps.data._hashing import uniform
from steps.frame.errors import UserError


class Sided(Protocol):
    """A row that has a side."""

    @property
    def id(self) -> str:
        """What tells it from other rows."""
        ...

    @property
    def opening(self) -> str:
        """Digest of the question that it answers."""
        ...

    @property
    def group(self) -> str | None:
        """What it belongs to, beside its question."""
        ...


def sides_by_id(rows: Sequence[Sided], seed: int, for_eval: float, for_test: float) -> dict[str, str]:
    """Return on which side each row is, by its id: `train`, `eval` or `test`, where these shares are held out.

    What belongs together is on one side: rows hang together by their opening and by their group, directly or through
    others. The side of each such set depends on the smallest of its groups, or of its openings where it has none: not
    on the answers, so that a question stays where it is when it is answered anew, or otherwise in another file.
    """
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above.setdefault(name, name) != name:
            # Halving the way keeps it short, however many rows hang together.
            above[name] = above[above[name]]
            name = above[name]
        return name

    for row in rows:
        for name in (f"opening {row.opening}", *([f"group {row.group}"] if row.group is not None else [])):
            above[top(f"row {row.id}")] = top(name)
    sets: dict[str, list[Sided]] = {}
    for row in rows:
        sets.setdefault(top(f"row {row.id}"), []).append(row)
    found = {}
    for together in sets.values():
        groups = [row.group for row in together if row.group is not None]
        at = uniform(seed, "side", min(groups or [row.opening for row in together]))
        # A test set takes nothing from the evaluation set, nor the other way round.
        side = "eval" if at < for_eval else "test" if at >= 1 - for_test else "train"
        found.update((row.id, side) for row in together)
    return found


def check_shares(for_eval: float, for_test: float) -> None:
    """Check that rows are left to learn from; for the validators of step configs.

    Raises:
        ValueError: all are held out.
    """
    if for_eval + for_test >= 1:
        raise ValueError("eval_fraction and test_fraction leave no rows to learn from; make their sum less than 1")


def check_sides(source: str, sides: Mapping[str, Sequence[object]], shares: Mapping[str, float]) -> None:
    """Refuse a side without rows that was asked for.

    Raises:
        UserError: naming the source and the key.
    """
    if not sides["train"]:
        held_out = sum(map(len, sides.values()))
        raise UserError(
            f"{source}: all {held_out} rows fell to the evaluation set and the test set; lower `eval_fraction` or "
            "`test_fraction`"
        )
    for name, share in shares.items():
        if share and not sides[name]:
            raise UserError(
                f"{source}: none of the {len(sides['train'])} rows fell to `{name}`; raise `{name}_fraction`, or set "
                "it to 0 to do without"
            )
