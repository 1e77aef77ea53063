"""Who is champion: a log of moves that MLflow numbers, safe between machines that know nothing of each other.

MLflow cannot move an alias on the condition that it still stands where it was seen. But the versions of a registered
model are numbered by its database, each once. So every move of a family's champion is a version of a second registered
model, `NAME.champions`, and says after which move it was decided. One that was decided without knowledge of the last
counts for nothing: whoever made it reads anew and decides again. The aliases `champion` and `previous` follow the log;
where a killed process left them behind, the log is right.

A rollback leads back along a line: a promotion adds to its end, also one of a release that stood further back, and a
rollback takes the last away. Versions that somebody deleted in MLflow are passed over. A deleted move is as if it had
never been made, but for those that lost to it: they stay lost, because the family remembers which moves counted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry.importing import importing
from registry.tracking import Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

SUFFIX = ".champions"
_TAG = "posttrain.move."
_COUNTED = "posttrain.moves"
"""Tag of the family with the numbers of the moves that counted."""
_REMEMBERED = 400
"""How many of them it holds, the last; MLflow takes 5000 characters."""


@dataclass(frozen=True)
class Standing:
    """Which versions of a family are and were champion, and the move that made it so."""

    line: tuple[int, ...] = ()
    """Versions that became champion, each once, and were neither taken back nor deleted; the last is champion."""
    move: int = 0
    """Number of the last move that counted, even if it has been deleted since; 0 before the first."""

    @property
    def champion(self) -> int | None:
        """The version that is champion."""
        return self.line[-1] if self.line else None

    @property
    def previous(self) -> int | None:
        """The version to which a rollback leads."""
        return self.line[-2] if len(self.line) > 1 else None


def replay(
    registered: "RegisteredModel", versions: Iterable["ModelVersion"], moves: Iterable["ModelVersion"]
) -> list[Standing]:
    """Return how the champion stood at first, and after each move that counts.

    Args:
        registered: the family's registered model, whose aliases count while no move was made.
        versions: the family's versions that a release made and that are still there.
        moves: versions of the registered model `NAME.champions`.
    """
    there = {int(version.version): version.tags for version in versions}
    aliases = {name: int(version) for name, version in registered.aliases.items()}
    line = _moved([], aliases["champion"], aliases.get("previous"), there) if "champion" in aliases else []
    found = [Standing(_counting(line, there))]
    # Moves of a family of the same name that somebody has deleted are not this one's.
    born = str(registered.creation_timestamp)
    log = {int(move.version): move.tags for move in moves if move.tags.get(f"{_TAG}born") == born}
    counted = _known_to_count(registered, log)
    for number, tags in sorted(log.items()):
        after, previous = int(tags[f"{_TAG}after"]), tags[f"{_TAG}previous"]
        # Also one that was decided after a move that somebody has deleted counts, and none that lost to such a move.
        if after >= max([found[-1].move, *(each for each in counted if each < number)]):
            line = _moved(line, int(tags[f"{_TAG}champion"]), int(previous) if previous else None, there)
            found.append(Standing(_counting(line, there), number))
    if (last := max(counted, default=0)) > found[-1].move:
        found.append(Standing(found[-1].line, last))
    return found


def _known_to_count(registered: "RegisteredModel", log: Mapping[int, Mapping[str, str]]) -> set[int]:
    """Return moves that are known to have counted, deleted ones among them: others came after them, or it is noted.

    A log that is empty was deleted as a whole: its numbers begin anew.
    """
    if not log:
        return set()
    noted = map(int, registered.tags.get(_COUNTED, "").split())
    return {*noted, *(int(tags[f"{_TAG}after"]) for tags in log.values())} - {0}


def _moved(line: list[int], champion: int, previous: int | None, there: Mapping[int, Mapping[str, str]]) -> list[int]:
    """Return the line after a move: what leads to `previous`, then the champion."""
    if previous is None:
        behind = []
    elif previous in line:
        behind = line[: line.index(previous) + 1]
    else:
        behind = _before_the_log(previous, there)
    return [*(version for version in behind if version != champion), champion]


def _before_the_log(version: int | None, there: Mapping[int, Mapping[str, str]]) -> list[int]:
    """Return the line of a version that became champion in no move that we know: each tells which it succeeded."""
    found: list[int] = []
    while version is not None and version not in found:
        found.insert(0, version)
        told = there.get(version, {}).get("posttrain.succeeds")
        version = int(told) if told else None
    return found


def _counting(line: list[int], there: Mapping[int, Mapping[str, str]]) -> tuple[int, ...]:
    """Leave out of a line what was deleted, and of those before the champion what was taken back."""
    behind = [version for version in line[:-1] if version in there and not there[version].get("posttrain.rolled_back")]
    return (*behind, *(version for version in line[-1:] if version in there))


class Champions:
    """The moves of one family's champion."""

    def __init__(self, tracking: Tracking, family: str) -> None:
        self._tracking = tracking
        self._client = tracking.client
        self.family = family
        self.name = f"{family}{SUFFIX}"

    def move(self, seen: Standing, champion: int, previous: int | None, model_id: str, why: str) -> bool:
        """Make a version champion, unless somebody has moved the champion since `seen`.

        Args:
            seen: what the decision rests on.
            champion: the family's version that becomes champion.
            previous: the one to which a rollback leads from then on.
            model_id: MLflow's id of the new champion's model.
            why: one sentence, shown as the move's description.

        Returns:
            Whether it counts; if not, read anew and decide again.
        """
        with importing():
            from mlflow.exceptions import MlflowException

        self._create()
        if seen.move == 0:
            # No move is known, so what is noted is of a log that somebody has deleted.
            self._client.delete_registered_model_tag(self.family, _COUNTED)
        born = self._client.get_registered_model(self.family).creation_timestamp
        told = {"born": born, "after": seen.move, "champion": champion, "previous": previous or ""}
        tags = {f"{_TAG}{name}": str(value) for name, value in told.items()}
        said = f"Version {champion} of {self.family} became champion. {why}"
        try:
            with self._tracking.as_global():
                made = self._client.create_model_version(
                    self.name, f"models:/{model_id}", tags=tags, description=said[:5000], model_id=model_id
                )
        except MlflowException:
            # Where several wanted the same number, again and again, one of them got it.
            if self.follow()[-1].move == seen.move:
                raise
            return False
        return int(made.version) in [standing.move for standing in self.follow()]

    def follow(self) -> list[Standing]:
        """Point the aliases to where the log says; return how the champion stood, the last as it stands now."""
        from registry.versions import is_ours, versions_of

        while True:
            registered = self._client.get_registered_model(self.family)
            versions = filter(is_ours, versions_of(self._tracking, self.family))
            found = replay(registered, versions, versions_of(self._tracking, self.name))
            self._note(registered, found)
            moved = [
                self._point(registered, "previous", found[-1].previous),
                self._point(registered, "champion", found[-1].champion),
            ]
            # Another may have moved, and pointed, in between: look until there is nothing to do.
            if not any(moved):
                return found

    def _note(self, registered: "RegisteredModel", found: Iterable[Standing]) -> None:
        """Note which moves counted: once one is deleted, nothing else says that others lost to it."""
        told = registered.tags.get(_COUNTED, "")
        counted = {*map(int, told.split()), *(standing.move for standing in found if standing.move)}
        kept = " ".join(map(str, sorted(counted)[-_REMEMBERED:]))
        if kept != told:
            self._client.set_registered_model_tag(self.family, _COUNTED, kept)

    def _point(self, registered: "RegisteredModel", alias: str, version: int | None) -> bool:
        """Point an alias to a version, or to none; returns whether it stood elsewhere."""
        stands = registered.aliases.get(alias)
        if str(version or "") == str(stands or ""):
            return False
        if version is None:
            self._client.delete_registered_model_alias(self.family, alias)
        else:
            self._client.set_registered_model_alias(self.family, alias, str(version))
        return True

    def _create(self) -> None:
        with importing():
            from mlflow.exceptions import MlflowException

        said = f"Every move of the champion of {self.family}, in order. It decides; the aliases follow."
        try:
            self._client.create_registered_model(self.name, description=said)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
