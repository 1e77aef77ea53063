"""One artifact as MLflow keeps it: asked for, fetched, and given again where it was lost."""

from collections.abc import Callable
from typing import Any

from registry.errors import Damaged, Lost, RegistryError
from registry.home import Home
from registry.index import Index
from registry.location import Location, fetch, lacking, read_manifest
from registry.step_run import share_files
from steps.artifacts import Artifact, Manifest


class Kept:
    """An artifact in MLflow. MLflow is asked by what is called, not before."""

    def __init__(self, home: Home, digest: str, place: str, locate: Callable[[], Location]) -> None:
        """Take what is known of it.

        Args:
            home: whose store and index are used.
            digest: the artifact's.
            place: id of the model or the run that holds it.
            locate: asks MLflow where that lies.
        """
        self.store = home.store
        self.index = Index(home.index)
        self.digest = digest
        self.place = place
        self._locate = locate

    def fetch(self) -> Artifact[Any]:
        """Return the artifact from the local store, brought there from MLflow where it is missing or damaged.

        Raises:
            Lost: MLflow no longer holds it, or holds it damaged, which is noted.
            RegistryError: there is no answer.
        """
        with self.index.lock(self.digest):
            if self.store.fault(self.digest) is None:
                return self.store.open(self.digest)
            try:
                found = fetch(self.store, self._locate(), self.digest)
            except Damaged as error:
                self.index.note_damage(self.digest, self.place, str(error))
                raise
            self.index.forget_damage(self.digest)
            return found

    def manifest(self) -> Manifest:
        """Return its manifest, from MLflow where the artifact itself is not here.

        Raises:
            Lost: MLflow no longer holds it, or holds it damaged.
            RegistryError: there is no answer.
        """
        if self.store.has(self.digest):
            return self.store.open(self.digest).manifest
        return read_manifest(self._locate(), self.digest)

    def lost(self) -> str:
        """Return what MLflow no longer holds of it; nothing where it has all, or gives no answer.

        Its folders are listed, and no file but the manifest is fetched. What is damaged and has its length is known
        once somebody here has fetched it.
        """
        if damage := self.index.damage(self.digest, self.place):
            return damage
        try:
            location = self._locate()
            here = self.store.quick_fault(self.digest) is None
            manifest = self.store.open(self.digest).manifest if here else read_manifest(location, self.digest)
            return lacking(location, manifest)
        except Lost as error:
            return str(error)
        except RegistryError:
            return ""

    def give(self) -> None:
        """Give MLflow again, in the same place, the files of an artifact that is here.

        Raises:
            Lost: the model or the run is gone, too.
            RegistryError: there is no answer.
            OSError: it is not here.
        """
        share_files(self.store.open(self.digest), self._locate(), "")
        self.index.forget_damage(self.digest)
