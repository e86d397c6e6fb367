"""Numbers as people write them: 70000, 70,000, −3, 0.5, in the digits of any script."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

NUMERAL = r"[-+−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
"""A whole or decimal number; commas part its thousands."""


def value(text: str) -> Fraction | None:
    """The number, or the fraction of two numbers, that a text is, and nothing else; None where it is none."""
    parts = [part.strip() for part in text.split("/")]
    if len(parts) > 2 or not all(re.fullmatch(NUMERAL, part) for part in parts):
        return None
    top, *bottom = [Fraction(_plain(part)) for part in parts]
    return None if bottom == [0] else top / (bottom[0] if bottom else 1)


def _plain(text: str) -> str:
    """A numeral in ASCII digits, without commas."""
    digits = (str(unicodedata.decimal(mark)) if mark.isdecimal() else mark for mark in text)
    return "".join(digits).replace(",", "").replace("−", "-")
