"""Names of candidates in reports."""

from steps.frame import UserError


def candidate_names(kind: str, given: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
    """Return the names of a step's candidates, made up where none are given.

    Raises:
        UserError: there are too few or too many, or two are the same.
    """
    names = given or tuple(f"model-{number}" for number in range(1, count + 1))
    if len(names) != count:
        raise UserError(f"{kind}: `names` has {len(names)} entries for {count} candidates; give one name a candidate")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{kind}: two candidates are called `{twice}`; give each its own of `names`")
    return names
