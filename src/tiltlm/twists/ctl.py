"""CTL, contrastive twist learning: raise log psi on pi*, lower it on what the twist itself believes.

    L = − Σ_t Σ_k (A_k − B_{t,k}) · log psi_t(y^k_≤t)

A: weights towards pi* (self-normalised importance weights of draws from q, or 1/n for exact draws); B_t: weights
towards the twist's own intermediate target pi_t ∝ pi_ref·psi_t. The gradient is that of Σ_t KL(pi*_t ‖ pi_t),
estimated by one batch of draws (Zhao et al. 2024, arXiv:2404.17546, §4.1, eq. 20).

A and B are normalised within the batch. At psi* they are exact for draws of the twist-induced proposal, all of whose
weights are then the same; for draws of anything else the expected gradient there is of order 1/K.

Expected gradient zero at psi_t = c_t·psi*_t, any constant c_t per step (where no row ends early; if rows may end,
c_t = 1 alone, for a finished row's weight is known). `contrast="next"` holds each step against the next one
instead of against pi*, B_{T+1} = A: nested variational inference (Zimmermann et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tiltlm.method import Method
from tiltlm.samples import Samples
from tiltlm.twists.objective import (
    Draws,
    Need,
    Rows,
    TwistObjective,
    by_prompt,
    cat_rows,
    one_value_per_prompt,
    positive_weights,
    prefix_weights,
    rows_of,
)


@dataclass(frozen=True)
class CTL(TwistObjective):
    """Positives from the draws themselves, by their weights, unless the experience brings better ones."""

    contrast: Literal["final", "next"] = "final"
    """Hold every step against pi* ("final"), or against the step after it ("next": the proposal alone counts)."""

    optimum: ClassVar[str] = "psi* up to a constant per step (drawn by another than its own proposal: as K grows)"
    needs: ClassVar[tuple[Need, ...]] = ("proposal",)

    def prepare(self, batch: Draws) -> Rows:
        proposal = drawn_by_log_q(batch.need("proposal"), batch.beta)
        negative = by_prompt(prefix_weights(proposal, batch.beta), proposal)
        if self.contrast == "next":
            after = torch.cat([negative[:, 1:], positive_weights(proposal)[:, None]], 1)
            return rows_of(proposal, after - negative, batch.prompts)
        if batch.positives is None:
            return rows_of(proposal, positive_weights(proposal)[:, None] - negative, batch.prompts)
        positive = rows_of(batch.positives, positive_weights(batch.positives), batch.prompts)
        return cat_rows(positive, rows_of(proposal, -negative, batch.prompts), batch.prompts)

    def per_token(self, out: Tensor, goal: Tensor) -> Tensor:
        return -out


def drawn_by_log_q(proposal: Samples, beta: float) -> Samples:
    """`proposal`. Raises ValueError if log_w is not that of rows drawn with log_q, for then B would be wrong."""
    log_w, log_q, log_ref, reward = proposal.log_w, proposal.log_q, proposal.log_ref, proposal.reward
    wrong = ValueError(
        "CTL weighs the proposal's rows, so they must carry log_w, and the log_q of what drew them: rows of q, of "
        "the reference, or mixed (not resampled, exact or `induced`; exact rows belong in the positives)"
    )
    if log_w is None or log_q is None or log_ref is None or reward is None:
        raise wrong
    if not one_value_per_prompt(log_w - (log_ref - log_q).sum(1) - reward / beta, proposal):
        raise wrong
    return proposal


NAMES: dict[str, str] = {"ctl": "contrastive twist learning"}
METHODS: dict[str, Method] = {"ctl": CTL()}
