"""Gold rewards by name: what D2PO's tasks pay for (Singhal et al. 2024, arXiv:2405.01511), of prompts and responses.

A file of this folder says what is in it: NAMES {name: one line}, NEEDS {name: what must be there} where something must, and
reward(name, argument, device), which makes the one called `name`; `argument` is what stands behind a colon. The files are
found by looking. Two endings wrap any of them: `…noise` and `…exponent`, see `wrapped`.

Prompt and response are two arguments, here as everywhere: no response is looked for in a text. Words are tokens in the
style of the Penn Treebank (`tokens`), and case counts.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tiltlm.literals import literal

if TYPE_CHECKING:
    from tiltlm.rewards.of_texts import OfTexts


class Gold(NamedTuple):
    """Where a gold reward stands, what it is in a line, and what it needs (nothing: empty)."""

    module: str
    line: str
    needs: str


ENDINGS = ("noise", "exponent")
"""Endings of a name that wrap the reward in front of them."""


@cache
def catalogue() -> dict[str, Gold]:
    """Every gold reward by its name, nothing of it imported."""
    return {
        name: Gold(f"{__name__}.{path.stem}", line, literal(path, "NEEDS").get(name, ""))
        for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))
        for name, line in literal(path, "NAMES").items()
    }


def gold(name: str, device: str = "cpu") -> OfTexts | None:
    """The gold reward called `name`; None where there is none. Raises ValueError for an argument it cannot take."""
    kind, colon, argument = name.partition(":")
    if kind in catalogue():
        made: OfTexts = import_module(catalogue()[kind].module).reward(kind, argument, device)
        return made
    for ending in ENDINGS:
        inner = gold(kind.removesuffix(ending) + colon + argument, device) if kind.endswith(ending) else None
        if inner is not None:
            from tiltlm.rewards.gold.wrapped import wrapped

            return wrapped(ending, inner, name)
    return None
