"""Q#: the optimal twist from the law of the reward (Zhou et al. 2025, arXiv:2502.20548, eq. 5; eta = beta).

    log psi = log E_ref[exp(r/beta) | prefix] = logsumexp_i [log pmf_i + atom_i/beta]

For a reward of 0 or 1 with success probability p this is log(1 + p·(e^(1/beta) − 1)). With the true law it is
psi*, and guided decoding with it draws pi* exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class QSharp:
    """log E[exp(r/beta)]."""

    beta: float

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive; got {self.beta}")

    def log_psi(self, law: Tensor, atoms: Tensor) -> Tensor:
        """law: log pmf [..., A] -> [...], nats. Finite for every beta > 0: nothing is exponentiated alone."""
        return (law + atoms / self.beta).logsumexp(-1)
