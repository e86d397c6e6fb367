"""Turns at networks that no process holds whole: one runs when all processes bring their parts to it.

Processes that share rows ask networks at different times, and how often depends on their rows. So nobody runs such a
network without its turn:

    who wants to run network k says so, and hears what the others want; the smallest number has its turn. Who wants that
    one runs it, everyone else lends its parts for one run (`take`);
    who wants nothing more comes to the next thing that all do together (`ranks`), and lends until nobody wants any
    (`settle`).

So all processes come to the same runs in the same order, whatever each of them is doing, and a process that has no rows, or
waits for what the first one does alone, holds nobody up.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakMethod

import torch

from tiltlm import ranks

NOBODY = 2**62
"""What a process says that wants no network."""

_LENDERS: list[WeakMethod[Callable[[], None]]] = []


def join(lend: Callable[[], None]) -> int:
    """The number of one more network; lend: a method that brings this process's parts to one run. All processes join with
    the same networks, in the same order."""
    if not _LENDERS:
        ranks.before_meetings(settle)
    _LENDERS.append(WeakMethod(lend))
    return len(_LENDERS) - 1


def take(number: int) -> None:
    """Wait for a turn to run network `number`, lending parts to others' runs meanwhile."""
    while (turn := _next(number)) != number:
        _lend(turn)


def settle() -> None:
    """Lend parts until no process wants to run any network."""
    while (turn := _next(NOBODY)) != NOBODY:
        _lend(turn)


def _next(wanted: int) -> int:
    """The smallest number that any process wants."""
    said = torch.tensor(wanted)
    with ranks.connected() as (dist, group):
        dist.all_reduce(said, dist.ReduceOp.MIN, group=group)
    return int(said)


def _lend(number: int) -> None:
    lend = _LENDERS[number]()
    if lend is None:
        raise RuntimeError(
            f"another process runs network {number}, which is gone here: they are not doing the same work"
        )
    lend()
