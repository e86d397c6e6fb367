"""A ready language model: trained elsewhere, by another library say, and measured here like any method.

It must know the reference's vocabulary: KL(q‖pi*) is a sum over the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from os.path import exists
from typing import ClassVar

from tiltlm.method import Learner, Method
from tiltlm.models.base import LanguageModel
from tiltlm.models.ends import tokenizer_of
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
        self.refuse_other_words(problem)
        return problem.loaded(located(self.model))

    def refuse_other_words(self, problem: Problem) -> None:
        """Raise ValueError where the model's tokenizer has other texts for the reference's token ids: as many tokens are
        not the same tokens."""
        own = None if problem.tokenizer is None else tokenizer_of(self.model)
        if own is None:
            return
        known, here = own.get_vocab(), problem.tokenizer.get_vocab()
        other = next((text for text, i in here.items() if known.get(text) != i), None)
        if other is not None:
            of = f"token {here[other]} of the reference is {other!r}, which is {known.get(other, 'unknown')} there"
            raise ValueError(f"{self.model} knows another vocabulary ({of}): no distance joins the two")


NAMES: dict[str, str] = {"model": "a ready model: --method.model FOLDER"}
METHODS: dict[str, Method] = {"model": Ready()}
