"""Prompts of the project's own making, by name: `stories:200` are two hundred openings of stories, `arithmetic:200` as many
expressions to work out.

They are the same in every run, no two alike, and more of them begin with those of fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from tiltlm.data.arithmetic import question
from tiltlm.data.stories import opening
from tiltlm.seeds import stream

MAKERS: dict[str, Callable[[np.random.Generator], str]] = {"stories": opening, "arithmetic": question}
"""kind -> one prompt."""

TRIES = 200
"""Prompts made for each one that is wanted, at most."""


@cache
def own_prompts(source: str) -> tuple[str, ...] | None:
    """The prompts that `source`, KIND:N, stands for; None where it names something else.

    Raises ValueError for an N that is no number above 0, and where there are not so many.
    """
    kind, colon, count = source.partition(":")
    if not colon or kind not in MAKERS:
        return None
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(
            f"{source}: how many prompts of one's own making is a number, {kind}:200 say; got {count!r}"
        )
    n, rng, found = int(count), stream(0, "prompts", kind).numpy(), dict[str, None]()
    for _ in range(TRIES * n):
        if len(found) == n:
            return tuple(found)
        found[MAKERS[kind](rng)] = None
    raise ValueError(f"{source}: no more than {len(found)} were found that differ; name fewer")
