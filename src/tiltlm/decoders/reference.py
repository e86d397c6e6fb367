"""The reference itself: where every method starts. KL(q‖pi_ref) = 0, KL(q‖pi*) = log Z − E_ref[r]/beta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tiltlm.method import Learner, Method
from tiltlm.models.base import LanguageModel
from tiltlm.problem import Problem


@dataclass(frozen=True)
class Reference(Method):
    """Draw from the reference, untilted."""

    optimum: ClassVar[str] = "pi* of a constant reward alone"

    def decoder(self, problem: Problem, learner: Learner) -> LanguageModel:
        return problem.reference


NAMES: dict[str, str] = {"reference": "the reference itself"}
METHODS: dict[str, Method] = {"reference": Reference()}
