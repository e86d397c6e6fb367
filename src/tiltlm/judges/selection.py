"""How many verdicts a request may buy, and on which of its pairs.

    spread   relabels·texts / window per request, what is over carried exactly: all of a window's pairs have a chance
    first    the whole quota on the window's first requests, as D2PO's published code spends it
    pool     the whole quota at the window's end, out of all its pairs

With `first` a selector sees the pairs of a window's first requests and no others: where the quota is as large as one of
these, it selects nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tiltlm.judges.rows import Pair
from tiltlm.judges.settings import Allocation, Judging, Select
from tiltlm.seeds import Stream


@dataclass(frozen=True)
class Window:
    """Where a window stands: completions seen in it, pairs bought in it, and what is owed, in parts of 1/window pair."""

    texts: int = 0
    bought: int = 0
    due: int = 0


def seen(window: Window, settings: Judging, texts: int) -> Window:
    """The window after `texts` more completions."""
    return Window(window.texts + texts, window.bought, window.due + settings.relabels * texts)


def closes(window: Window, settings: Judging) -> bool:
    """Whether the window is full."""
    return window.texts >= settings.window


ALLOTTED: dict[Allocation, Callable[[Window, Judging], int]] = {
    "spread": lambda window, settings: window.due // settings.window,
    "first": lambda window, settings: settings.relabels - window.bought,
    "pool": lambda window, settings: settings.relabels if closes(window, settings) else 0,
}
"""Pairs that may be bought now, in a window that has seen the request."""


def bought(window: Window, settings: Judging, pairs: int) -> Window:
    """The window after so many purchases."""
    return Window(window.texts, window.bought + pairs, window.due - settings.window * pairs)


def reopened(window: Window, settings: Judging) -> Window:
    """The next window: what is owed is carried over; a quota that was not spent lapses with `first` and `pool`."""
    return Window(due=window.due if settings.allocation == "spread" else 0)


ORDERED_BY: dict[Select, Callable[[Pair], float]] = {
    "random": lambda pair: 0.0,
    "min-margin": lambda pair: abs(pair.gap),
    "variance": lambda pair: -pair.spread,
}


def selected(how: Select, pairs: Sequence[Pair], n: int, own: Stream) -> list[int]:
    """The numbers of `n` of the pairs (of all, where they are fewer), in their order; equals are chosen at random."""
    shuffled = own.permutation(len(pairs)).tolist()
    ranked = sorted(shuffled, key=lambda k: ORDERED_BY[how](pairs[k]))
    return sorted(ranked[:n])
