"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    L = − log σ( beta·[h(y_c) − h(y_r)] ),     h(y) = log p(y|x) − log pi_ref(y|x)

Expected gradient zero at pi*, *if* preferences follow Bradley–Terry with reward r, P(y_c ≻ y_r) = σ(r_c − r_r),
and beta is the target's. With hard labels (the better answer always wins) no finite optimum exists: margins
grow without bound, and probability may flow to completions no pair ever showed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltlm.method import Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.problem import Fed
from tiltlm.samples import Pairs


def dpo_loss(h_chosen: Tensor, h_rejected: Tensor, beta: float) -> Tensor:
    """−log σ(beta·(h_c − h_r)): sequence log-ratios [n], [n] -> [n]. At h = 0 it is ln 2."""
    return -logsigmoid(beta * (h_chosen - h_rejected))


def log_ratios(model: LanguageModel, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """h of chosen [n], h of rejected [n], log p of chosen [n]; one forward pass for all rows.

    Raises ValueError where the pairs carry no reference log-probabilities.
    """
    log_ref_chosen, log_ref_rejected = pairs.chosen.log_ref, pairs.rejected.log_ref
    if log_ref_chosen is None or log_ref_rejected is None:
        raise ValueError(
            "these pairs have no log_ref: score them with the reference first (experience.Referenced)"
        )
    log_p = model.log_prob(pairs.both()).sum(1)
    log_p_chosen, log_p_rejected = log_p.split(len(pairs))
    return log_p_chosen - log_ref_chosen.sum(1), log_p_rejected - log_ref_rejected.sum(1), log_p_chosen


def preference_metrics(h_chosen: Tensor, h_rejected: Tensor, beta: float) -> dict[str, Tensor]:
    """Implicit rewards beta·h, their margin, and how often the chosen one is ahead (a tie counts half)."""
    chosen, rejected = beta * h_chosen.detach(), beta * h_rejected.detach()
    ahead = torch.where(chosen == rejected, 0.5, (chosen > rejected).to(chosen.dtype))
    return {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "margin": chosen - rejected,
        "reward_accuracy": ahead,
    }


@dataclass(frozen=True)
class DPO(PerRow, Policy):
    """DPO with temperature `beta`."""

    beta: float | None = None
    """Temperature of the log-ratios (None: the target's)."""

    fed: ClassVar[Fed] = "pairs"
    optimum: ClassVar[str] = "pi* of the same beta, under Bradley–Terry preferences"

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def loss(self, model: LanguageModel, batch: Pairs) -> Outcome:
        beta = stated(self.beta)
        h_chosen, h_rejected, _ = log_ratios(model, batch)
        loss = dpo_loss(h_chosen, h_rejected, beta)
        return Outcome(loss, preference_metrics(h_chosen, h_rejected, beta))


NAMES: dict[str, str] = {"dpo": "direct preference optimisation, on pairs"}
METHODS: dict[str, Method] = {"dpo": DPO()}
