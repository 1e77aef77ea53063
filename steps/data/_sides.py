"""On which side a row stands, to train, to choose or to test by: decided by its question alone."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

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
    def source(self) -> str:
        """Where it comes from."""
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


def sides_by_id(
    rows: Sequence[Sided], seed: int, for_eval: float, for_test: float, read: Iterable[Sided] | None = None
) -> dict[str, str]:
    """Return on which side each row is, by its id: `train`, `eval` or `test`, where these shares are held out.

    What belongs together is on one side: rows hang together by their question and by their group, directly or through
    others. The side of each such set depends on the smallest of its groups, or of its questions where it has none: not
    on the answers, so that a question stays where it is when it is answered anew, or otherwise in another file.

    A question is what the user asks, and in sources that are told apart by their system messages (see
    `asked_by_system`) what these say, too.

    Args:
        rows: those that get a side.
        seed: another one, other sides.
        for_eval: share of rows that choices are made by.
        for_test: share of rows for the figures that are quoted.
        read: all rows of their sources, by which it is known what asks there; `rows` alone when unset.
    """
    by_system = asked_by_system(rows if read is None else read)

    def question(row: Sided) -> str:
        # Without a system message of its own a row has the question that it has in every other source.
        told = row.system if row.source in by_system else ""
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


def asked_by_system(rows: Iterable[Sided]) -> set[str]:
    """Return the sources whose rows differ more in their system messages than in what the user asks.

    There the user's words are always alike (`Summarise the document.`, a greeting) and the system message holds the
    document or the person: it is part of the question. Elsewhere it says how to answer (be brief, think first), and
    one question asked under two such messages is one question. What counts is how many different ones of each a source
    has, so that files of one make fall alike, however many rows are taken of them.
    """
    systems: dict[str, set[str]] = defaultdict(set)
    openings: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        openings[row.source].add(row.opening)
        if row.system:
            systems[row.source].add(row.system)
    return {source for source, found in systems.items() if len(found) > len(openings[source])}


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
