"""Soft Q learning of the twist ("RL" in the twisted-SMC paper): path consistency, one step at a time.

    L = Σ_t (log psi_t − y_t)²,   y_t = log n_{t+1} = log E_ref[psi_{t+1} | y_≤t]  (held fixed),   y_T = r/beta

beta·log psi is the soft Q value, beta·log n the soft value of the next state (Zhao et al. 2024, arXiv:2404.17546,
§4.3; Mudgal et al. 2023 for the other targets). Expected gradient zero at psi*, whoever draws the prefixes, if
every prefix may be drawn.

    target "log"     as above
    target "linear"  (psi_t − e^{y_t})²: the same optimum, the CD-Q loss
    target "mean"    y_t = E_ref[log psi_{t+1}]: a Jensen lower bound, *biased*: ends at CD's E_ref[r|·]/beta
    multi_step > 0   adds multi_step·(Σ_t residuals)²/T: consistency over the whole path; the same optimum
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tiltlm.method import Method
from tiltlm.models.base import LanguageModel, Twist, Values
from tiltlm.objective import Outcome
from tiltlm.samples import Samples
from tiltlm.twists.objective import (
    Draws,
    Need,
    Rows,
    TwistObjective,
    cat_rows,
    equal,
    one_value_per_prompt,
    rows_of,
)


@dataclass(frozen=True)
class SoftQ(TwistObjective):
    """Rows of the proposal, and of the positives (if the experience brings any) beside them, all counting
    alike."""

    target: Literal["log", "linear", "mean"] = "log"
    multi_step: float = 0.0
    optimum: ClassVar[str] = 'psi* (with target "mean" biased: the expected reward / beta)'
    needs: ClassVar[tuple[Need, ...]] = ("proposal",)
    induced: ClassVar[bool] = True

    @property
    def backups(self) -> bool:
        return self.target == "mean"

    def __post_init__(self) -> None:
        if self.multi_step < 0 or (self.multi_step and self.target == "linear"):
            raise ValueError(f"multi_step must be ≥ 0, and sums logarithms (not target 'linear'); got {self}")

    def prepare(self, batch: Draws) -> Rows:
        rows = self._rows(batch.need("proposal"), batch, batch.backups)
        if batch.positives is None:
            return rows
        return cat_rows(self._rows(batch.positives, batch, batch.positive_backups), rows, batch.prompts)

    def _rows(self, samples: Samples, batch: Draws, means: Tensor | None) -> Rows:
        backups = means if self.target == "mean" else log_norms(samples)
        if backups is None:
            raise ValueError('target "mean" needs E_ref[log psi] along the rows: draw with `backups`')
        return rows_of(samples, equal(samples), batch.prompts, goals(samples, backups, batch.beta))

    def per_token(self, out: Tensor, goal: Tensor) -> Tensor:
        if self.target == "linear":
            return (out.exp() - goal.exp()).square()
        return (out - goal).square()

    def loss(self, model: Values, batch: Rows) -> Outcome:
        if not self.multi_step:
            return super().loss(model, batch)
        out = model.values(batch.samples)[..., 0]
        residual = torch.where(batch.samples.mask, out - batch.goal.to(out), 0.0)
        weight = batch.weight.to(out)[:, 0]
        path = residual.sum(1).square()
        return Outcome(weight * (residual.square().sum(1) + self.multi_step * path) / out.shape[1], batch.notes)


def log_norms(samples: Samples) -> Tensor:
    """log n_t = log_ref + log_psi − log_q of rows under the twist-induced proposal, [N, T], nats."""
    if samples.log_q is None or samples.log_ref is None or samples.log_psi is None:
        raise ValueError("soft Q targets need log_q, log_ref and log_psi under the twist-induced proposal")
    log_n = samples.log_ref + samples.log_psi - samples.log_q
    if not one_value_per_prompt(log_n[:, 0], samples):  # n_1 depends on the prompt alone
        raise ValueError(
            "these rows' log_q is not the twist-induced proposal's, so soft Q has no targets: draw with `induced`"
        )
    return log_n


def goals(samples: Samples, backups: Tensor, beta: float) -> Tensor:
    """y_t: the next step's backup, and r/beta at every row's last token; [N, T]."""
    if samples.reward is None:
        raise ValueError("these samples have no reward: score them first")
    ahead = torch.cat([backups[:, 1:], torch.zeros_like(backups[:, :1])], 1)
    last = torch.arange(ahead.shape[1], device=ahead.device) == samples.mask.sum(1, keepdim=True) - 1
    return torch.where(last, (samples.reward / beta).to(ahead)[:, None], ahead)


@torch.no_grad()
def mean_backups(reference: LanguageModel, twist: Twist, samples: Samples) -> Tensor:
    """E_ref[log psi_t | y_<t], the mean instead of the log-mean-exp, before every token; [N, T], nats."""
    prompts, width = samples.row_prompts, samples.tokens.shape[1]
    state, own = reference.start(prompts, width), twist.start(prompts, width)
    columns = []
    for t in range(width):
        p = state.log_next().exp()
        columns.append((p * own.log_psi(None).to(p)).sum(-1))
        for walker in (state, own):
            walker.append(samples.tokens[:, t])
    return torch.where(samples.mask, torch.stack(columns, 1), 0.0)


NAMES: dict[str, str] = {"rl": "soft Q learning of the twist"}
METHODS: dict[str, Method] = {"rl": SoftQ()}
