"""Being asked to stop: SIGTERM, and SIGUSR1, which schedulers send ahead of the end of a job's time.

While `listening`, such a signal raises `Stopped` wherever the program stands: files are written aside or line by line,
so what is finished is kept. Work that can only be left between two steps (training) says so by `held()`: the signal then
waits until that work asks for it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [each for each in signal.Signals if each.name in ("SIGTERM", "SIGUSR1")]
"""Those of this system (Windows has no SIGUSR1)."""


class Stopped(BaseException):
    """The program was asked to stop. No `Exception`: nothing that mends errors may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number
        """The exit status, as a shell gives it: 143 for SIGTERM, 138 for SIGUSR1 (on Linux)."""


class _Asked:
    """Whether a signal waits, and how many pieces of work hold it back."""

    holding = 0
    number: int | None = None


@contextmanager
def listening() -> Iterator[None]:
    """Within, the signals raise `Stopped`. Outside the main thread, which alone receives signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, _heard) for each in SIGNALS}
    _Asked.number = None
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def held() -> Iterator[Callable[[], int | None]]:
    """Within, a signal waits; yields what tells its number (None while there is none). At the end it is raised."""
    _Asked.holding += 1
    try:
        yield lambda: _Asked.number
    finally:
        _Asked.holding -= 1
    if _Asked.number is not None and not _Asked.holding:
        raise Stopped(_Asked.number)


def _heard(number: int, frame: FrameType | None) -> None:
    _Asked.number = number
    if not _Asked.holding:
        raise Stopped(number)
