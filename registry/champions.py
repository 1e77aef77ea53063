"""Who is champion: a log of moves that MLflow numbers, safe between machines that know nothing of each other.

MLflow cannot move an alias on the condition that it still stands where it was seen. But the versions of a registered
model are numbered by its database, each once. So every move of a family's champion is a version of a second registered
model, `NAME.champions`, and says after which move it was decided. One that was decided without knowledge of the last
counts for nothing: whoever made it reads anew and decides again. The aliases `champion` and `previous` follow the log;
where a killed process left them behind, the log is right.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry.tracking import Tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

SUFFIX = ".champions"
_TAG = "posttrain.move."


@dataclass(frozen=True)
class Standing:
    """Which versions of a family are `champion` and `previous`, and the move that made them so."""

    champion: int | None
    previous: int | None
    move: int = 0
    """Number of the last move that counts; 0 before the first."""


def replay(registered: "RegisteredModel", moves: Iterable["ModelVersion"]) -> list[Standing]:
    """Return how the champion stood at first, and after each move that counts.

    Args:
        registered: the family's registered model, whose aliases count while no move was made.
        moves: versions of the registered model `NAME.champions`.
    """
    aliases = {name: int(version) for name, version in registered.aliases.items()}
    found = [Standing(aliases.get("champion"), aliases.get("previous"))]
    for version in sorted(moves, key=lambda each: int(each.version)):
        told = {name.removeprefix(_TAG): value for name, value in version.tags.items() if name.startswith(_TAG)}
        # Moves of a family of the same name that somebody has deleted are not this one's.
        if told.get("born") != str(registered.creation_timestamp):
            continue
        # One that was decided after a move that somebody has deleted counts, too.
        if int(told["after"]) >= found[-1].move:
            previous = int(told["previous"]) if told["previous"] else None
            found.append(Standing(int(told["champion"]), previous, int(version.version)))
    return found


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
        from mlflow.exceptions import MlflowException

        self._create()
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
            if self.follow()[-1] == seen:
                raise
            return False
        return int(made.version) in [standing.move for standing in self.follow()]

    def follow(self) -> list[Standing]:
        """Point the aliases to where the log says; return how the champion stood, the last as it stands now."""
        while True:
            found = self._replayed()
            self._point("previous", found[-1].previous)
            self._point("champion", found[-1].champion)
            # Another may have moved, and pointed, in between.
            if self._replayed()[-1] == found[-1]:
                return found

    def _replayed(self) -> list[Standing]:
        from registry.versions import versions_of

        registered = self._client.get_registered_model(self.family)
        return replay(registered, versions_of(self._tracking, self.name))

    def _point(self, alias: str, version: int | None) -> None:
        stands = self._client.get_registered_model(self.family).aliases.get(alias)
        if version is None and stands is not None:
            self._client.delete_registered_model_alias(self.family, alias)
        elif version is not None and str(version) != str(stands):
            self._client.set_registered_model_alias(self.family, alias, str(version))

    def _create(self) -> None:
        from mlflow.exceptions import MlflowException

        said = f"Every move of the champion of {self.family}, in order. It decides; the aliases follow."
        try:
            self._client.create_registered_model(self.name, description=said)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
