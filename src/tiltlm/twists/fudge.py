"""FUDGE: tilt by the probability of success (Yang & Klein 2021, arXiv:2104.05218, eq. 4).

    log psi = log P_ref(r = 1 | prefix)

The twist of the *conditional* target pi_ref(y | r = 1): the limit beta → 0 of Q# for rewards of 0 or 1. As a
road to pi* at a finite beta it is biased: it leans as hard as beta = 0 would, whatever beta is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fudge:
    """log P(success)."""

    def log_psi(self, law: Tensor, atoms: Tensor) -> Tensor:
        """law: log pmf of a binary reward [..., 2] -> [...], nats."""
        if law.shape[-1] != 2:
            raise ValueError(f"FUDGE needs a binary reward; this value model has {law.shape[-1]} atoms")
        return law[..., 1]
