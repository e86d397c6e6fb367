"""Infilling and fixed continuations: r(x, y) = log pi_ref(c | x, y), the reference's own word on what comes next.

With beta = 1, pi* is the reference's posterior over the gap, pi_ref(y | x, c), and Z(x, c) = pi_ref(c | x) with
the gap summed over. c is each prompt's own condition (`Conditioned` prompts: infilling), or the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel
from tiltlm.samples import Samples, Tokens, conditions_of


@dataclass(frozen=True)
class Continuation:
    """log pi_ref(c | x, y) in nats, or, with `kind="probability"`, pi_ref(c | x, y) itself (then r ≤ 1).

    fixed: one row of tokens that must follow every completion; None: each prompt's condition.
    less_prior: subtract log pi_ref(y | x), so that pi* ∝ pi_ref(y)^{1 − 1/beta}·pi_ref(c | y)^{1/beta}.
    """

    reference: LanguageModel
    fixed: Tokens | None = None
    kind: Literal["log", "probability"] = "log"
    less_prior: bool = False

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        """Returns float [N]. Raises ValueError if neither `fixed` nor the prompts say what must follow."""
        gap = samples.sequences()
        follow = Samples(gap, torch.arange(len(samples), device=samples.device), *self._wanted(samples))
        log_p = self.reference.log_prob(follow).sum(1)
        if self.less_prior:
            prior = self.reference.log_prob(samples) if samples.log_ref is None else samples.log_ref
            log_p = log_p - prior.sum(1).to(log_p)
        return log_p.exp() if self.kind == "probability" else log_p

    def _wanted(self, samples: Samples) -> tuple[Tensor, Tensor]:
        if self.fixed is None:
            wanted = conditions_of(samples.prompts).select(samples.prompt_index)
            return wanted.ids, wanted.mask
        if len(self.fixed) != 1:
            raise ValueError(f"a fixed continuation is one row of tokens; got {len(self.fixed)}")
        one = self.fixed.to(samples.device)
        return one.ids.expand(len(samples), -1), one.mask.expand(len(samples), -1)
