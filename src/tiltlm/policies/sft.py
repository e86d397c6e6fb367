"""Supervised fine-tuning, which is also pre-training: maximum likelihood of given completions.

    L = − Σ_rows Σ_t log p(y_t | x, y_<t) / number of tokens

Expected gradient zero at: the distribution the completions were drawn from (pi* if they are exact samples of
pi*), in every batch where completions are equally long. The number of tokens is the batch's own, so with unequal lengths
one batch of B rows pulls by order 1/B towards what makes completions short, and the optimum holds as B grows
(tests/laws/test_finite_batches.py). It knows neither reward nor reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, by_position
from tiltlm.problem import Fed
from tiltlm.samples import Samples


def sft_loss(log_p: Tensor) -> Tensor:
    """Negative log-likelihood of each row, summed over its tokens: [n, T] (0 at padding) -> [n]."""
    return -log_p.sum(1)


@dataclass(frozen=True)
class SFT(Policy):
    """Maximum likelihood. `watch_positions` reports the loss of every target position apart."""

    watch_positions: bool = False
    fed: ClassVar[Fed] = "answers"
    optimum: ClassVar[str] = "the distribution the completions were drawn from (of unequal length: as B grows)"

    def prepare(self, batch: Samples) -> Samples:
        return batch

    def weight(self, batch: Samples) -> Tensor:
        return batch.mask.sum(1)

    def loss(self, model: LanguageModel, batch: Samples) -> Outcome:
        log_p = model.log_prob(batch)
        loss = sft_loss(log_p)
        metrics = {"nll_per_token": loss.detach() / batch.mask.sum(1)}
        if self.watch_positions:
            metrics |= by_position("nll", -log_p, batch.mask)
        return Outcome(loss, metrics)


NAMES: dict[str, str] = {"sft": "maximum likelihood of given answers, or of exact draws"}
METHODS: dict[str, Method] = {"sft": SFT()}
