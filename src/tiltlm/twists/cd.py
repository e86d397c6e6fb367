"""Controlled decoding: tilt by the expected reward (Mudgal et al. 2023, arXiv:2310.17022, eq. 6).

    log psi = E_ref[r | prefix] / beta   ≤   log E_ref[exp(r/beta) | prefix]          (Jensen)

Biased on purpose: it equals psi* only where the reward-to-go is already certain (at the last token, say), and
guided decoding with it does not end at pi*. Note: the star-graph experiments' code adds log(p)/…, FUDGE's
twist, under the name CD; the paper's formula is this one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CD:
    """E[r] / beta."""

    beta: float

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive; got {self.beta}")

    def log_psi(self, law: Tensor, atoms: Tensor) -> Tensor:
        """law: log pmf [..., A] -> [...], nats."""
        return (law.exp() * atoms).sum(-1) / self.beta
