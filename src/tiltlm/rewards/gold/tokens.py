"""Words in the style of the Penn Treebank, by rules alone: no data files.

Punctuation stands alone, commas and colons within numbers do not (1,000 and 12:30 are one token); a period ends a
sentence unless it belongs to an abbreviation; "doesn't" is does n't, "dog's" dog 's, "cannot" can not. Unlike the
Treebank, quotes stay as they are written.
"""

from __future__ import annotations

import re

_SEPARATE = r""",:;@#$%&?!()\[\]{}<>"“”"""
_PIECE = re.compile(
    rf"""\.\.+ | --+ | `` | '' | (?:(?<=\d)[,:](?=\d) | (?!\.\.|--|``|'')[^\s{_SEPARATE}])+ | \S""", re.VERBOSE
)
_CLITIC = re.compile(r"(.+)(n['’]t|['’](?:s|m|d|ll|re|ve))", re.IGNORECASE)
_QUOTES = "'’‘"
_INITIALS = re.compile(r"(?:[^\W\d_]\.){2,}|[A-Z]\.")
_ABBREVIATIONS = "Mr. Mrs. Ms. Dr. Prof. St. Jr. Sr. Mt. Gen. Sen. Rep. Gov. Capt. Lt. Col. vs. etc. cf."
_TWO_IN_ONE = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3}
"""Words that are two, and where the first one ends."""


def tokens(text: str) -> list[str]:
    """The tokens of a text, in order; none of an empty one."""
    return [token for piece in _PIECE.findall(text) for token in _parts(piece)]


def _parts(piece: str) -> list[str]:
    """A run of characters without blanks: quotes, the period and clitics come off its ends, one by one."""
    if not _is_word(piece):
        return [piece]
    middle = piece.lstrip(_QUOTES)
    front, back = list(piece[: len(piece) - len(middle)]), []
    if front and front[-1] + middle.lower() in ("'tis", "'twas"):
        return [*front[:-1], front[-1] + middle[0], middle[1:]]
    while _is_word(middle) and (end := _end(middle)) < len(middle):
        back.append(middle[end:])
        middle = middle[:end]
    cut = _TWO_IN_ONE.get(middle.lower(), len(middle))
    return [*front, *(part for part in (middle[:cut], middle[cut:]) if part), *reversed(back)]


def _is_word(piece: str) -> bool:
    return any(c.isalnum() for c in piece)


def _end(piece: str) -> int:
    """Where what comes off the end of a piece begins; its length where nothing does."""
    if piece[-1] in _QUOTES:
        return len(piece) - 1
    if piece[-1] == "." and not (_INITIALS.fullmatch(piece) or piece in _ABBREVIATIONS.split()):
        return len(piece) - 1
    clitic = _CLITIC.fullmatch(piece)
    return clitic.end(1) if clitic else len(piece)
