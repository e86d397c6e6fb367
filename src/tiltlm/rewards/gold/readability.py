"""The grade of school at which the response is read (Kincaid et al. 1975).

    0.39 · words / sentences + 11.8 · syllables / words − 15.59

A word is a token with a letter or digit; a sentence ends at . ! or ?, and there is one at least; a syllable is a group of
vowels (y among them), less a silent e at the end, and every word has one. Packages that count syllables by a dictionary
fetch it when they run, and hyphenation finds too few: so the rule is here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tiltlm.rewards.gold.base import OfResponse, nothing_behind
from tiltlm.rewards.gold.tokens import tokens
from tiltlm.rewards.gold.words import SHORT
from tiltlm.rewards.of_texts import OfTexts

NAMES: dict[str, str] = {
    "readinggrade": "the Flesch–Kincaid grade of the response; −10 where it has 20 tokens or fewer"
}

_VOWELS = re.compile(r"[aeiouy]+")
_SILENT = re.compile(r"(?<=[^aeiouyl])e$|(?<=[aeiouy]l)e$")
"""An e at the end that is not said: behind a consonant, and of those in -le only behind a vowel (whale, not table)."""


@dataclass(frozen=True)
class ReadingGrade(OfResponse):
    """Flesch–Kincaid; −10 for short responses."""

    def value(self, response: str) -> float:
        found = tokens(response)
        return grade(found) if len(found) > SHORT else -10.0


def grade(found: list[str]) -> float:
    """The Flesch–Kincaid grade of a tokenised text; −15.59 where none of its tokens is a word."""
    words = [token for token in found if any(c.isalnum() for c in token)]
    sentences = max(1, sum(token[-1] in ".!?" for token in found))
    per_word = sum(map(syllables, words)) / len(words) if words else 0.0
    return 0.39 * len(words) / sentences + 11.8 * per_word - 15.59


def syllables(word: str) -> int:
    """How many groups of vowels are said in a word; 1 at least."""
    groups = _VOWELS.findall(word.lower())
    return max(1, len(groups) - bool(_SILENT.search(word.lower())))


def reward(name: str, argument: str, device: str) -> OfTexts:
    """The reward called `name`."""
    nothing_behind(name, argument)
    return ReadingGrade()
