"""What draws completions without being a language model: no single draw has a density that can be computed.

So the ruler cannot walk along its tokens. What such a method can say of its distance (an exact value, an estimate, an
upper bound) it says itself, in `measured`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from tiltlm.method import Learner, Method
from tiltlm.models.base import LanguageModel
from tiltlm.problem import Problem
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream


class Sampler(Method, ABC):
    """A method that draws, and is no language model."""

    @abstractmethod
    def draw(
        self, problem: Problem, learner: Learner, prompts: Tokens, n: int, stream: Stream, batch_size: int = 512
    ) -> Samples:
        """`n` completions of every prompt with their rewards, those of a prompt side by side."""

    @abstractmethod
    def measured(self, problem: Problem, learner: Learner, ruler: Ruler) -> tuple[Measurement, Samples]:
        """What is known of it, and what was drawn to know it."""

    def decoder(self, problem: Problem, learner: Learner) -> LanguageModel:
        raise ValueError(
            f"{type(self).__name__} draws completions and is no language model: nothing gives its next token a probability"
        )
