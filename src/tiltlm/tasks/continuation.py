"""A continuation: text that must follow every completion. r = log pi_ref(c | x, y), or that probability itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import tyro

from tiltlm.models.causal import CausalLM
from tiltlm.objective import positive
from tiltlm.problem import Facts
from tiltlm.rewards.continuation import Continuation as ContinuationReward
from tiltlm.run import Run
from tiltlm.samples import Tokens
from tiltlm.target import Reward
from tiltlm.tasks.infill import ATOMS
from tiltlm.tasks.language import Flat, Language, OfLanguage

PROBABILITIES = (0.0, 1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0)
"""What a law of probabilities is over; others count as the nearest."""


@dataclass(frozen=True)
class Continuation(OfLanguage):
    """Completions that a given text can follow."""

    language: Flat = Language()
    continuation: str = ""
    """The text that must follow."""

    kind: Literal["log", "probability"] = "log"
    """r = log pi_ref(c | x, y), or pi_ref(c | x, y) itself."""

    beta: float = 1.0
    """Divides the reward: smaller leans harder on it."""

    r_max: float | None = None
    """An upper bound of the reward, for exact draws by rejection (none: 0, or 1 of the probability)."""

    name: tyro.conf.Suppress[str] = "continuation"

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def facts(self) -> Facts:
        log = self.kind == "log"
        most = (0.0 if log else 1.0) if self.r_max is None else self.r_max
        return Facts(self.beta, r_max=most, atoms=ATOMS if log else PROBABILITIES)

    def check(self) -> None:
        super().check()
        if not self.continuation:
            raise ValueError("continuation: name the text that must follow, --task.continuation TEXT")

    def untilted(self) -> Self:
        return replace(self, continuation="", kind="log", beta=1.0, r_max=None)

    def judged(self, reference: CausalLM, runs: Mapping[str, Run[Any]]) -> Reward:
        tokenizer: Any = reference.tokenizer
        ids = tokenizer(self.continuation, add_special_tokens=False)["input_ids"]
        return ContinuationReward(reference, Tokens.of([ids], reference.device), kind=self.kind)
