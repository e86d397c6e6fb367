"""Infilling: a gap is filled between the prompt and tokens that must follow it, other ones for every row.

r = log pi_ref(c | x, y),    pi* at beta 1 = pi_ref(y | x, c): exact draws come by construction
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import tyro

from tiltlm.models.causal import CausalLM
from tiltlm.problem import Facts, Problem
from tiltlm.rewards.continuation import Continuation
from tiltlm.run import Run
from tiltlm.samplers.scenes import infilling
from tiltlm.samples import Conditioned, Samples
from tiltlm.seeds import Stream
from tiltlm.settings import at_least_one
from tiltlm.target import Reward
from tiltlm.tasks.language import Flat, Language, OfLanguage

ATOMS = (-20.0, -16.0, -13.0, -11.0, -9.5, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0)
"""What a law of log-probabilities is over; others count as the nearest."""


@dataclass(frozen=True)
class Infill(OfLanguage):
    """A gap before tokens that must follow."""

    language: Flat = Language(new_tokens=2)
    condition_tokens: int = 1
    """How many tokens follow the gap."""

    beta: float = 1.0
    name: tyro.conf.Suppress[str] = "infill"

    def __post_init__(self) -> None:
        at_least_one(self, "condition_tokens")
        if self.beta != 1:
            raise ValueError(
                "infill: gap and continuation are drawn in one go, which is exact for r = log pi_ref(c | x, y) at beta 1 "
                f"alone; got beta {self.beta}"
            )

    def facts(self) -> Facts:
        return Facts(self.beta, "conditions", r_max=0.0, atoms=ATOMS)

    def check(self) -> None:
        super().check()
        if self.language.stop:
            raise ValueError("infill: gap and what follows have a fixed length each; leave --task.stop out")

    def untilted(self) -> Self:
        return replace(self, condition_tokens=1)

    def judged(self, reference: CausalLM, runs: Mapping[str, Run[Any]]) -> Reward:
        return Continuation(reference)

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        plain = super().problem(runs, seed)

        def fresh(n: int, own: Stream) -> tuple[Conditioned, Samples]:
            return infilling(plain.reference, plain.prompts["test"], n, plain.width, self.condition_tokens, own)

        return replace(plain, fresh=fresh)
