"""Errors that are the user's to mend: one clear sentence, exit code 2, no traceback."""

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import ValidationError


class UserError(Exception):
    """Bad input. The message names the file, the key and what would be right, in one sentence."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest known word, else the list of what is known.

    >>> did_you_mean("epoch", ["epochs", "rank"])
    '; did you mean `epochs`?'
    """
    names = sorted(known)
    if near := get_close_matches(word, names, n=1, cutoff=0.6):
        return f"; did you mean `{near[0]}`?"
    return f"; known here: {', '.join(names)}" if names else ""


def first_complaint(error: ValidationError) -> str:
    """Return what pydantic says first as one sentence, `weights: 1 entries for 2 parts`: it says all in many lines."""
    first = error.errors(include_url=False)[0]
    said = first["msg"].removeprefix("Value error, ")
    return ": ".join(filter(None, (".".join(map(str, first["loc"])), f"{said[0].lower()}{said[1:]}")))


class PartDone(BaseException):
    """Ends a process that shares a step with others, and is not the main one, once there is nothing more to share."""


class ProofFailed(Exception):
    """A step's own check of its result did not hold. The message gives the figures and the bounds."""
