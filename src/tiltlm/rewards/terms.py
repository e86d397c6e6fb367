"""Sums of rewards by name: `a.py:f + 0.5*classifier:M:POS - 2*https://host/score`.

    sum    =  [sign] term { blank sign blank term }        sign = + or −, with blanks around it between terms
    term   =  [number *] name                              name: as `by_name` lists them

A + or - without blanks on both sides belongs to the name, and so does a * that no number stands in front of (URLs have
them). A name that holds blanks around a sign is put in quotes: `'my + file.py:f' + b.py:g`; alone it needs none where the
file it names is there.
"""

from __future__ import annotations

import math
import re
from os.path import isfile  # a sum may be longer than any path: no error
from typing import NamedTuple

from tiltlm.rewards.masking import mask

_SIGN = re.compile(r"""\s+([+-])(?:\s+|$)(?=(?:[^'"]|'[^']*'|"[^"]*")*$)""")
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TERM = re.compile(rf"(?P<sign>[+-]?)\s*(?:(?P<number>{_NUMBER})\s*\*\s*)?(?P<name>.*)", re.DOTALL)


class Term(NamedTuple):
    """weight · the reward called `name`."""

    weight: float
    name: str

    @property
    def label(self) -> str:
        """The name as it is written and printed: without credentials."""
        return mask(self.name)


def terms_of(text: str) -> tuple[Term, ...]:
    """The terms of a sum, in their order; a name that comes twice has one term. Raises ValueError for what is no sum."""
    if isfile(text.rpartition(":")[0]):  # whatever its name looks like
        return (Term(1.0, text),)
    first, *rest = _SIGN.split(text.strip())
    weights: dict[str, float] = {}
    for sign, part in [("+", first), *zip(rest[::2], rest[1::2], strict=True)]:
        weight, name = _term(part, text)
        weights[name] = weights.get(name, 0.0) + (-weight if sign == "-" else weight)
    return tuple(Term(weight, name) for name, weight in weights.items())


def _term(part: str, text: str) -> tuple[float, str]:
    found = _TERM.fullmatch(part.strip())
    assert found is not None
    name = found["name"].strip()
    if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
        name = name[1:-1]
    weight = float(found["number"] or 1.0)
    if not name or not math.isfinite(weight):
        raise ValueError(
            f"a sum of rewards is NAME + 0.5*NAME - …, with blanks around its signs; got {mask(text)!r}"
        )
    return (-weight if found["sign"] == "-" else weight), name
