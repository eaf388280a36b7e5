"""One line about what takes long: what is done, and how many of how many. Nothing about what is done at once."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO, TypeVar

import torch.distributed as dist

T = TypeVar("T")

#: Seconds without a word.
PATIENCE = 2.0


@contextlib.contextmanager
def counted(items: Sequence[T], what: str, named: Callable[[T], str], stream: TextIO | None = None) -> Iterator[Iterator[T]]:
    """The items in turn; once they have taken `PATIENCE` seconds, a line says which one of how many is at work.

    On a terminal the line is written over and goes away at the end. Elsewhere (a log, a notebook) it is written once. One rank speaks for all.

    Args:
        items: what is worked through.
        what: is done with them, such as "timing backends".
        named: what an item is called; asked for only if the line is written.
        stream: standard error if None.

    >>> with counted(["one", "two"], "doing", str) as turns:
    ...     done = [item for item in turns]
    >>> done
    ['one', 'two']
    """
    line = _Line(len(items), what, named, stream or sys.stderr)
    try:
        yield line.turns(items)
    finally:
        line.end()


class _Line:
    """A timer writes it first, for an item may take minutes by itself; after that each turn does."""

    def __init__(self, count: int, what: str, named: Callable, stream: TextIO | None):
        self.count, self.what, self.named, self.stream = count, what, named, stream
        self.at, self.item, self.shown, self.over = 0, None, False, False
        self.lock = threading.Lock()
        self.timer = threading.Timer(PATIENCE, self._show)
        self.timer.daemon = True
        if count and stream is not None and not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
            self.timer.start()

    def turns(self, items: Sequence) -> Iterator:
        """The items; the line says which one is at work."""
        for self.at, self.item in enumerate(items, 1):
            if self.shown and self._on_terminal():
                self._show()
            yield self.item

    def end(self) -> None:
        """Takes the line away."""
        self.timer.cancel()
        with self.lock:
            self.over = True
            if self.shown and self._on_terminal():
                self._write("\r\033[K")

    def _show(self) -> None:
        with self.lock:
            if self.over or not self.at:
                return
            words = f"moepatch: {self.what}, {self.at} of {self.count}: {self.named(self.item)}"
            self._write(f"\r\033[K{words}" if self._on_terminal() else f"{words} …\n")
            self.shown = True

    def _on_terminal(self) -> bool:
        return not getattr(self.stream, "closed", False) and self.stream.isatty()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever reads it has gone: nothing depends on a line
            self.stream.write(text)
            self.stream.flush()
