"""Rewards that count nouns of the response: tokens whose Penn tag begins with NN.

The tags are spaCy's (the names alone), or those of a small built-in lexicon (`nouns:lexicon`). Which of them is part of the
name: what a reward is does not depend on what happens to be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tiltlm.rewards.gold.lexicon import lexicon_tags
from tiltlm.rewards.gold.spacy_model import check_spacy, spacy_tags
from tiltlm.rewards.gold.tokens import tokens
from tiltlm.rewards.of_texts import Column, OfTexts

NAMES: dict[str, str] = {
    "nouns": "how many tokens of the response are nouns",
    "unique_nns": "how many distinct nouns the response has",
    "nounvstoks": "3 · nouns + 50 − tokens",
}
NEEDS: dict[str, str] = {
    "nouns": "pip install 'tiltlm[gold]'; nouns:lexicon does without",
    "unique_nns": "pip install 'tiltlm[gold]'; unique_nns:lexicon does without",
    "nounvstoks": "pip install 'tiltlm[gold]'; nounvstoks:lexicon does without",
}

Tagger = Callable[[Sequence[Sequence[str]]], list[list[str]]]
"""Tokenised texts -> a Penn tag for every token."""

TAGGERS: dict[str, Tagger] = {"spacy": spacy_tags, "lexicon": lexicon_tags}


def _count(nouns: Sequence[str], words: Sequence[str]) -> float:
    return len(nouns)


def _distinct(nouns: Sequence[str], words: Sequence[str]) -> float:
    return len(set(nouns))


def _against_tokens(nouns: Sequence[str], words: Sequence[str]) -> float:
    return 3 * len(nouns) + 50 - len(words)


MEASURES = {"nouns": _count, "unique_nns": _distinct, "nounvstoks": _against_tokens}
"""Name -> what it makes of a response's nouns and all its tokens."""


@dataclass(frozen=True)
class OfNouns(OfTexts):
    """The measure called `name` of the nouns that the tagger called `tagger` sees in the response."""

    name: str
    tagger: str = "spacy"

    def check(self) -> None:
        if self.tagger == "spacy":
            check_spacy(self.name)

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> list[float]:
        words = [tokens(response) for response in completions]
        tags = TAGGERS[self.tagger](words)
        nouns = [
            [word for word, tag in zip(*each, strict=True) if tag.startswith("NN")]
            for each in zip(words, tags, strict=True)
        ]
        return [float(MEASURES[self.name](*each)) for each in zip(nouns, words, strict=True)]


def reward(name: str, argument: str, device: str) -> OfTexts:
    """The reward called `name`. Raises ValueError for a tagger that there is not."""
    if argument not in ("", *TAGGERS):
        raise ValueError(f"{name}:{argument}: there is no tagger {argument!r}; there are {', '.join(TAGGERS)}")
    return OfNouns(name, argument or "spacy")
