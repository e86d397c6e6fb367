"""Rewards that count words of the response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tiltlm.rewards.gold.base import OfResponse, nothing_behind
from tiltlm.rewards.gold.tokens import tokens
from tiltlm.rewards.of_texts import OfTexts

NAMES: dict[str, str] = {
    "bagofwords": "how many of 30 words the response has; bagofwords:WORD,WORD,… counts words of your own",
    "reversebow": "3 − how many of nine function words the response has",
    "tokdense": "10 · distinct tokens / tokens; −5 where there are 20 or fewer",
    "keeplong": "keeplong:N, −20 below N tokens, else 0: to be added to another",
}

_COLLECTED = (
    "data hope information provide example your however first have help additionally important include finally "
    "following happy code two create question possible understand generate contains appropriate best respectful "
    "ensure experience safe"
)
COLLECTED = tuple(_COLLECTED.split())
"""The words of D2PO's word collector."""

COMMON = ("the", "to", "and", "of", "in", "is", "that", "this", "with")
"""The words whose absence reversebow rewards."""

SHORT = 20
"""A response of so many tokens or fewer is too short to have a density or a grade."""


@dataclass(frozen=True)
class BagOfWords(OfResponse):
    """start + sign · how many of `words`, distinct ones, are tokens of the response."""

    words: tuple[str, ...] = COLLECTED
    start: float = 0.0
    sign: int = 1

    @property
    def bounds(self) -> tuple[float, float]:
        ends = self.start, self.start + self.sign * len(set(self.words))
        return min(ends), max(ends)

    def value(self, response: str) -> float:
        return self.start + self.sign * len(set(self.words).intersection(tokens(response)))


@dataclass(frozen=True)
class Density(OfResponse):
    """10 · distinct / all tokens; −5 for short responses."""

    @property
    def bounds(self) -> tuple[float, float]:
        return -5.0, 10.0

    def value(self, response: str) -> float:
        found = tokens(response)
        return 10 * len(set(found)) / len(found) if len(found) > SHORT else -5.0


@dataclass(frozen=True)
class KeepLong(OfResponse):
    """−20 where the response has fewer than `least` tokens."""

    least: int

    @property
    def bounds(self) -> tuple[float, float]:
        return -20.0, 0.0

    def value(self, response: str) -> float:
        return -20.0 if len(tokens(response)) < self.least else 0.0


def reward(name: str, argument: str, device: str) -> OfTexts:
    """The reward called `name`. Raises ValueError for what cannot stand behind its colon."""
    if name == "bagofwords":
        return BagOfWords(_words(argument.split(",")) if argument else COLLECTED)
    if name == "keeplong":
        if not argument.isdecimal() or int(argument) < 1:
            raise ValueError(f"keeplong:N wants a number of tokens, 1 or more; got keeplong:{argument}")
        return KeepLong(int(argument))
    nothing_behind(name, argument)
    return Density() if name == "tokdense" else BagOfWords(COMMON, 3.0, -1)


def _words(found: Sequence[str]) -> tuple[str, ...]:
    """The words, each of which must be a token: no other could ever be found."""
    for word in found:
        if tokens(word) != [word]:
            raise ValueError(
                f"bagofwords counts tokens, and {word!r} is {tokens(word) or 'none'}: name single words"
            )
    return tuple(found)
