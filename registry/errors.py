"""What the registry refuses: one clear sentence, no traceback for the user."""

from collections.abc import Iterable
from difflib import get_close_matches


class RegistryError(Exception):
    """A name that does not exist, a damaged artifact, a server that does not answer. The message is one sentence."""


class Lost(RegistryError):
    """What MLflow once held and holds no longer, or holds damaged: asking again is of no use."""


class Damaged(Lost):
    """What MLflow holds is not what was recorded; found only when it was fetched."""


def refusal(error: Exception) -> type[RegistryError]:
    """Return what an error of MLflow's client means: that something is not there, or anything else."""
    return Lost if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST" else RegistryError


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest known word, else the list of what is known.

    >>> nearest("champoin", ["candidate", "champion"])
    '; did you mean `champion`?'
    """
    names = sorted(known)
    if near := get_close_matches(word, names, n=1, cutoff=0.6):
        return f"; did you mean `{near[0]}`?"
    return f"; known here: {', '.join(names)}" if names else ""
