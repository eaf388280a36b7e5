"""What a benchmark is doing and how long each part of it took, and a limit of time for it."""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: How long a stack that was told to stop may go on before its process ends.
_GRACE = 20.0


class Progress:
    """Prints a line per part of the work of one stack, with seconds, and keeps them.

    Attributes:
        stack: whose work it is.
        shown: whether this rank prints.
        seconds: by part.
    """

    def __init__(self, stack: str, shown: bool):
        self.stack, self.shown = stack, shown
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times one part of the work; also one that fails."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = round(time.perf_counter() - begin, 2)
            self.say(f"{part} {self.seconds[part]:.2f} s")

    def say(self, text: str) -> None:
        """A line on stderr."""
        if self.shown:
            print(f"[{time.strftime('%H:%M:%S')}] {self.stack}: {text}", file=sys.stderr, flush=True)


@contextmanager
def limited(seconds: float, gently: bool) -> Iterator[None]:
    """Ends what takes longer.

    Args:
        seconds: until it does.
        gently: raise `TimeoutError` where Python code runs, so that the next stack can go on. What hangs below Python, or on one rank of several, ends
            with its process, which says where it was.

    Raises:
        TimeoutError: the time is over.
    """

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s (--timeout)")

    faulthandler.dump_traceback_later(seconds + (_GRACE if gently else 0), exit=True, file=sys.__stderr__)
    before = signal.signal(signal.SIGALRM, stop) if gently else None
    if gently:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        if gently:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
