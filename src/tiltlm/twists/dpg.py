"""DPG: fit the twist-induced model itself to pi*, by the likelihood of pi*'s samples.

    L = − Σ_k A_k · Σ_t log q(x^k_t | x^k_<t),     q(s|·) ∝ pi_ref(s|·)·psi(·, s)

The gradient of KL(pi*‖q); with x drawn from q and A the self-normalised weights it is distributional policy
gradient (Parshakova et al. 2019; Khalifa et al. 2021, arXiv:2012.11635). Expected gradient zero at
psi_t = c(y_<t)·psi*_t: any factor of the *prefix* is free. So q is right, but psi's size is not: never resample
with such a twist (importance weights are fine, for there psi cancels). A is normalised within the batch: exact for q's own
draws at the optimum and for exact draws, of order 1/K off for others'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.method import Method
from tiltlm.models.base import LanguageModel, Values
from tiltlm.objective import Outcome
from tiltlm.problem import Problem
from tiltlm.twists.objective import Draws, Need, Rows, TwistMethod, TwistObjective, positive_weights, rows_of


@dataclass(frozen=True)
class DPG(TwistMethod):
    """The method; its objective knows what the twist tilts."""

    optimum: ClassVar[str] = "psi* up to a factor of the prefix, q = pi* (weighted draws of another: as K grows)"

    def objective(self, problem: Problem) -> DPGObjective:
        return DPGObjective(problem.reference)


@dataclass(frozen=True)
class DPGObjective(TwistObjective):
    """`reference` is what the twist tilts."""

    reference: LanguageModel
    optimum: ClassVar[str] = "psi* up to a factor of the prefix, q = pi* (weighted draws of another: as K grows)"
    needs: ClassVar[tuple[Need, ...]] = ("proposal",)

    @property
    def needs_beside_positives(self) -> tuple[Need, ...]:
        return ()

    def prepare(self, batch: Draws) -> Rows:
        positives = batch.need("proposal") if batch.positives is None else batch.positives
        return rows_of(positives, positive_weights(positives), batch.prompts)

    def per_token(self, out: Tensor, goal: Tensor) -> Tensor:
        return -out

    def loss(self, model: Values, batch: Rows) -> Outcome:
        log_q = model.tilted_log_prob(self.reference, batch.samples)
        each = torch.where(batch.samples.mask, -log_q * batch.weight.to(log_q), 0.0)
        return Outcome(each.sum(1) / log_q.shape[1], batch.notes)


NAMES: dict[str, str] = {"dpg": "distributional policy gradient"}
METHODS: dict[str, Method] = {"dpg": DPG()}
