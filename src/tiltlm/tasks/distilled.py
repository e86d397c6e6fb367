"""Contrastive distillation between two models of the project's own making: text that the larger one finds likelier than the
reference, the smaller one, does.

    r(x, y) = mean_t log p_large(token t | before) − mean_t log pi_ref(token t | before),   over prompt and response

With models of your own this is a `Mine` whose reward is `contrastivedistill:BIG:SMALL`, and so it is here once both are
trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import tyro

from tiltlm.fit import Fit
from tiltlm.objective import positive
from tiltlm.problem import Facts, Problem
from tiltlm.run import Recipe, Run
from tiltlm.settings import at_least_one
from tiltlm.stages.reference import FIT, LAYERS
from tiltlm.tasks.language import Flat, Language, OfLanguage
from tiltlm.tasks.mine import NONE, Mine
from tiltlm.train import best_checkpoint


@dataclass(frozen=True)
class Larger:
    """The model that is learnt from; its text and tokenizer are the reference's."""

    layers: int = LAYERS
    fit: Fit = FIT
    """How it is trained."""

    def __post_init__(self) -> None:
        at_least_one(self, "layers")


@dataclass(frozen=True)
class Distilled(OfLanguage):
    """Text that a larger model finds likelier than the reference does."""

    language: Flat = field(default_factory=lambda: Language(layers=2, fit=replace(FIT, steps=200)))
    larger: Larger = Larger()
    prompts: str = "stories:800"
    """Prompts to train on, as of the task `mine`."""

    test_rows: int = 100
    """How many of them are held out at random, and measured on."""

    beta: float = 1.0
    """Divides the reward: smaller leans harder on it."""

    plain: tyro.conf.Suppress[bool] = False
    """The reference alone, without a reward: what its draws depend on."""

    name: tyro.conf.Suppress[str] = "distilled"
    shows: ClassVar[tuple[str, ...]] = (
        "prompts",
        "beta",
        "language.new_tokens",
        "language.layers",
        "larger.layers",
    )

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        _ = self.judged_by(NONE)

    def judged_by(self, reward: str) -> Mine:
        """The same prompts of the same reference, with a reward by name."""
        return Mine(
            self.language, self.prompts, test_rows=self.test_rows, reward=reward, beta=self.beta, name=self.name
        )

    def facts(self) -> Facts:
        return replace(self.judged_by(NONE).facts(), r_max=None)

    def check(self) -> None:
        self.judged_by(NONE).check()
        if self.language.model:
            raise ValueError(
                f"{self.name} trains both of its models: with {self.language.model} take the task mine, "
                "--task.reward contrastivedistill:BIG:SMALL"
            )

    def files(self) -> list[str]:
        return self.judged_by(NONE).files()

    def needs(self, seed: int) -> dict[str, Recipe]:
        if self.plain:
            return super().needs(seed)
        larger = replace(self.language, layers=self.larger.layers, fit=self.larger.fit)
        return super().needs(seed) | {"larger": replace(larger.base(self.name, seed), called="larger")}

    def untilted(self) -> Self:
        return replace(self, larger=Larger(), beta=1.0, plain=True)

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        if self.plain:
            return self.judged_by(NONE).problem(runs, seed)
        larger = best_checkpoint(runs["larger"].folder)
        return self.judged_by(f"contrastivedistill:{larger}:{self.language.place(runs)}").problem(runs, seed)
