"""On which side a row stands, to train, to choose or to test by: decided by its question alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

from steps.artifacts.manifest import canonical_json
from steps.data._hashing import hexdigest, uniform
from steps.frame.errors import UserError


class Sided(Protocol):
    """A row that has a side."""

    @property
    def id(self) -> str:
        """What tells it from other rows."""
        ...

    @property
    def opening(self) -> str:
        """Digest of what the user asks."""
        ...

    @property
    def system(self) -> str:
        """What its own system message says; empty where it has none."""
        ...

    @property
    def group(self) -> str | None:
        """What it belongs to, beside its question."""
        ...


Question = Literal["user", "system+user"]
"""Who says what is asked."""


def sides_by_id(
    rows: Sequence[Sided], seed: int, for_eval: float, for_test: float, asked_by: Question = "user"
) -> dict[str, str]:
    """Return on which side each row is, by its id: `train`, `eval` or `test`, where these shares are held out.

    What belongs together is on one side: rows hang together by their question and by their group, directly or through
    others. The side of each such set depends on the smallest of its groups, or of its questions where it has none: not
    on the answers, nor on other rows, so that a question stays where it is when it is answered anew, in another file,
    or among more rows.

    Args:
        rows: those that get a side.
        seed: another one, other sides.
        for_eval: share of rows that choices are made by.
        for_test: share of rows for the figures that are quoted.
        asked_by: whether a row's own system message is part of its question.
    """

    def question(row: Sided) -> str:
        # Without a system message of its own a row has the question that it has in every other source.
        told = row.system if asked_by == "system+user" else ""
        return hexdigest(canonical_json([row.opening, told]))[:16] if told else row.opening

    above: dict[str, str] = {}

    def top(name: str) -> str:
        while above.setdefault(name, name) != name:
            # Halving the way keeps it short, however many rows hang together.
            above[name] = above[above[name]]
            name = above[name]
        return name

    for row in rows:
        for name in (f"question {question(row)}", *([f"group {row.group}"] if row.group is not None else [])):
            above[top(f"row {row.id}")] = top(name)
    sets: dict[str, list[Sided]] = {}
    for row in rows:
        sets.setdefault(top(f"row {row.id}"), []).append(row)
    found = {}
    for together in sets.values():
        groups = [row.group for row in together if row.group is not None]
        at = uniform(seed, "side", min(groups or map(question, together)))
        # A test set takes nothing from the evaluation set, nor the other way round.
        side = "eval" if at < for_eval else "test" if at >= 1 - for_test else "train"
        found.update((row.id, side) for row in together)
    return found


def asked_by_system(rows: Iterable[Sided]) -> bool:
    """Say whether what is asked may stand in the system messages: they differ more than what the user says.

    There the user's words may always be alike (`Summarise the document.`, a greeting), and the system message holds
    the document or the person. But a date or a number in it looks the same, so this only helps to say what to write.
    """
    systems, openings = set[str](), set[str]()
    for row in rows:
        openings.add(row.opening)
        systems.add(row.system)
    return len(systems) > len(openings)


def check_shares(for_eval: float, for_test: float) -> None:
    """Check that rows are left to learn from; for the validators of step configs.

    Raises:
        ValueError: all are held out.
    """
    if for_eval + for_test >= 1:
        raise ValueError("eval_fraction and test_fraction leave no rows to learn from; make their sum less than 1")


def given_sides(shares: Mapping[str, float]) -> list[str]:
    """Return the sides that are given out: `train`, and those of which a share is asked."""
    return ["train", *(side for side, share in shares.items() if share)]


def sides_not_given(shares: Mapping[str, float]) -> dict[str, str]:
    """Return the sides of which no share is asked, as `StepConfig.not_given` has them."""
    return {
        side: f"`{side}_fraction` is 0, so that there are no rows for it; raise it"
        for side, share in shares.items()
        if not share
    }


def check_sides(source: str, sides: Mapping[str, Sequence[Sided]], shares: Mapping[str, float]) -> None:
    """Refuse a side without rows that was asked for.

    Raises:
        UserError: naming the source and the key.
    """
    if all(sides.values()):
        return
    rows = [row for side in sides.values() for row in side]
    questions = len({row.opening for row in rows})
    more = (
        f"; its {len(rows)} rows have {questions} different questions, by what the user says: where the system message "
        "holds what is asked about, write `question: system+user`"
        if asked_by_system(rows)
        else ""
    )
    if not sides["train"]:
        raise UserError(
            f"{source}: all {len(rows)} rows fell to the evaluation set and the test set; lower `eval_fraction` or "
            f"`test_fraction`{more}"
        )
    for name, share in shares.items():
        if share and not sides[name]:
            raise UserError(
                f"{source}: none of the {len(sides['train'])} rows fell to `{name}`; raise `{name}_fraction`, or set "
                f"it to 0 to do without{more}"
            )
