"""Rewards of the response's dependency trees, as spaCy's parser sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tiltlm.rewards.gold.base import nothing_behind
from tiltlm.rewards.gold.nouns import OfNouns
from tiltlm.rewards.gold.spacy_model import check_spacy, depths
from tiltlm.rewards.gold.tokens import tokens
from tiltlm.rewards.gold.words import BagOfWords
from tiltlm.rewards.of_texts import Column, OfTexts

NAMES: dict[str, str] = {
    "treedep": "the deepest dependency tree of the response, in arcs",
    "allobjs": "9 · bagofwords + treedep + nouns",
}
NEEDS: dict[str, str] = {"treedep": "pip install 'tiltlm[gold]'", "allobjs": "pip install 'tiltlm[gold]'"}


@dataclass(frozen=True)
class TreeDepth(OfTexts):
    """The longest chain of arcs from the root of a sentence."""

    def check(self) -> None:
        check_spacy("treedep")

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> list[float]:
        return [float(depth) for depth in depths([tokens(response) for response in completions])]


@dataclass(frozen=True)
class AllObjectives(OfTexts):
    """9 · bagofwords + treedep + nouns."""

    def check(self) -> None:
        check_spacy("allobjs")

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> list[float]:
        given = prompts, completions, columns
        parts = zip(BagOfWords()(*given), TreeDepth()(*given), OfNouns("nouns")(*given), strict=True)
        return [9 * words + depth + nouns for words, depth, nouns in parts]


def reward(name: str, argument: str, device: str) -> OfTexts:
    """The reward called `name`."""
    nothing_behind(name, argument)
    return TreeDepth() if name == "treedep" else AllObjectives()
