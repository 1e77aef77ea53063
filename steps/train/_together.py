"""What the processes of a step find out each for its own part, brought together. Imports no heavy library itself."""

from collections.abc import Callable
from typing import TypeVar

from steps.frame import Job, UserError

T = TypeVar("T")


def together(job: Job, own: Callable[[], T]) -> list[T]:
    """Let every process compute its own part, and give all of them all parts, in the processes' order.

    All processes must call this.

    Raises:
        UserError: a part was refused; all processes then raise the sentence of the first, so that none is left waiting
            for another, and each can still do what takes all of them (save a checkpoint).
    """
    if job.resources.world == 1:
        return [own()]
    from accelerate.utils import gather_object

    part: T | None = None
    refusal: UserError | None = None
    try:
        part = own()
    except UserError as error:
        refusal = error
    found: list[tuple[T | None, str]] = gather_object([(part, str(refusal) if refusal else "")])
    if said := next((sentence for _, sentence in found if sentence), None):
        raise UserError(said) from refusal
    return [each for each, _ in found]  # pyright: ignore[reportReturnType]
