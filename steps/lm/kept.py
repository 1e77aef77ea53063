"""Finished batches of answers on disk: a restart does not lose them, and processes that share a step exchange them.

Which process answers a batch depends on its number alone, so that several give, together, the bytes of one.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from steps.artifacts import cut_half_line
from steps.lm.tasks import Rollout

Written = tuple[str, int, bool]
"""What is kept of an answer: text, tokens, whether it is truncated."""
_LOOK_SECONDS = 0.2


class Kept:
    """The batches of one set of answers. Every process appends to a file of its own and reads those of all."""

    def __init__(
        self,
        folder: Path | None = None,
        part: int | None = 0,
        parts: int = 1,
        is_ended: Callable[[], bool] = lambda: False,
    ) -> None:
        """Read what is there.

        Args:
            folder: where the files lie; None keeps everything in memory.
            part: which share of the batches this process answers; None answers none.
            parts: shares in all.
            is_ended: whether a process that shares the work has given up.
        """
        self.done: dict[int, list[Written]] = {}
        """Batches that are finished, as far as this process knows, by number."""
        self._folder, self._part, self._parts, self._is_ended = folder, part, parts, is_ended
        self._read: dict[Path, int] = {}
        self._own: Path | None = None
        if folder is not None:
            folder.mkdir(exist_ok=True)
            if part is not None:
                self._own = folder / f"{part}.jsonl"
                cut_half_line(self._own)
            self._look()

    def own(self, batches: int) -> Iterator[int]:
        """Yield the numbers of the batches that this process has to answer.

        Raises:
            RuntimeError: another process has given up.
        """
        if self._part is not None:
            for index in range(self._part, batches, self._parts):
                if index not in self.done:
                    self._go_on()
                    yield index

    def add(self, index: int, rollouts: Sequence[Rollout]) -> None:
        """Keep a finished batch, and look at what the others have finished."""
        self.done[index] = [(each.text, each.tokens, each.truncated) for each in rollouts]
        if self._own is not None:
            with self._own.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([index, self.done[index]]) + "\n")
            self._look()

    def all(self, batches: int, waiting: Callable[[], None] = lambda: None) -> list[list[Written]]:
        """Return every batch, when the last process is done; `waiting` is called now and then until it is.

        Raises:
            RuntimeError: another process has given up. (One that dies takes those of its machine with it, and `join`
                speaks for it on the first one.)
        """
        while len(self.done) < batches:
            self._go_on()
            time.sleep(_LOOK_SECONDS)
            self._look()
            waiting()
        return [self.done[index] for index in range(batches)]

    def _go_on(self) -> None:
        if self._is_ended():
            raise RuntimeError("another process of this step has given up")

    def _look(self) -> None:
        """Read what was added to the files; a line that is still being written waits for the next look."""
        assert self._folder is not None
        for file in self._folder.glob("*.jsonl"):
            with file.open("rb") as stream:
                stream.seek(self._read.get(file, 0))
                text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[file] = self._read.get(file, 0) + len(whole)
            for line in whole.splitlines():
                try:
                    index, written = json.loads(line)
                except ValueError:
                    # Spoilt, as by a power cut: it is answered again.
                    continue
                self.done[index] = [tuple(each) for each in written]
