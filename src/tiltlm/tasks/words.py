"""Words in the text: r = logsigmoid(5·hits − 5), hits: how many words of a list the completion holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import tyro

from tiltlm.models.causal import CausalLM
from tiltlm.objective import positive
from tiltlm.problem import Facts, without_ends
from tiltlm.rewards.words import ANIMALS, WordHits
from tiltlm.run import Run
from tiltlm.target import Reward
from tiltlm.tasks.language import Flat, Language, OfLanguage

ATOMS = (-5.0067, -0.6931, -0.0067, 0.0)
"""The rewards there are for 0, 1, 2 and more hits."""


@dataclass(frozen=True)
class Words(OfLanguage):
    """Text in which words of a list come up."""

    language: Flat = Language()
    words: tuple[str, ...] = ANIMALS
    """What is looked for; r = logsigmoid(5·hits − 5), lower-case whole words."""

    beta: float = 1.0
    """Divides the reward: smaller leans harder on it."""

    r_max: float = 0.0
    """An upper bound of the reward, for exact draws by rejection."""

    name: tyro.conf.Suppress[str] = "words"

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        odd = [word for word in self.words if not (word.isalpha() and word == word.lower())]
        if odd or not self.words:
            raise ValueError(f"words are looked for as single lower-case words; got {list(odd)}")

    def facts(self) -> Facts:
        return Facts(self.beta, r_max=self.r_max, atoms=ATOMS)

    def untilted(self) -> Self:
        return replace(self, words=ANIMALS, beta=1.0, r_max=0.0)

    def judged(self, reference: CausalLM, runs: Mapping[str, Run[Any]]) -> Reward:
        return without_ends(WordHits(self.words, reference.tokenizer), reference.eos_ids)
