"""A ready language model: trained elsewhere, by another library say, and measured here like any method.

It must know the reference's vocabulary: KL(q‖pi*) is a sum over the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from os.path import exists
from typing import ClassVar

from tiltlm.method import Learner, Method
from tiltlm.models.base import LanguageModel
from tiltlm.models.folders import located
from tiltlm.problem import Facts, Problem


@dataclass(frozen=True)
class Ready(Method):
    """Draw from a model as it is."""

    model: str = ""
    """A transformers folder, a hub name, or the run that trained a policy."""

    optimum: ClassVar[str] = "whatever it was trained for"

    def files(self) -> list[str]:
        return [self.model]

    def why_not(self, facts: Facts) -> str | None:
        if not self.model:
            return "which model? --method.model FOLDER (or a hub name, or a run that trained a policy)"
        if facts.conditioned:
            return "a plain language model does not see what must follow"
        where = self.model.startswith((".", "/", "~")) or self.model.count("/") > 1
        if where and not exists(self.model):
            return f"{self.model}: no such folder (--method.model)"
        return None

    def decoder(self, problem: Problem, learner: Learner) -> LanguageModel:
        problem.refuse_other_words(self.model)
        return problem.loaded(located(self.model))


NAMES: dict[str, str] = {"model": "a ready model: --method.model FOLDER"}
METHODS: dict[str, Method] = {"model": Ready()}
