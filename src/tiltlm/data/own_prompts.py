"""Prompts of the project's own making, by name: `stories:200` are the openings of two hundred stories.

They are the same in every run, and more of them begin with those of fewer.
"""

from __future__ import annotations

from collections.abc import Callable

from tiltlm.data.stories import openings
from tiltlm.seeds import Stream, stream

MAKERS: dict[str, Callable[[int, Stream], list[str]]] = {"stories": openings}
"""kind -> (how many, stream) -> prompts."""


def own_prompts(source: str) -> list[str] | None:
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
    return MAKERS[kind](int(count), stream(0, "prompts", kind))
