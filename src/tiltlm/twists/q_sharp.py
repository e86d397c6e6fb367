"""Q#: the optimal twist from the law of the reward (Zhou et al. 2025, arXiv:2502.20548, eq. 5; eta = beta).

    log psi = log E_ref[exp(r/beta) | prefix] = logsumexp_i [log pmf_i + atom_i/beta]

For a reward of 0 or 1 with success probability p this is log(1 + p·(e^(1/beta) − 1)). With the true law it is
psi*, and guided decoding with it draws pi* exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiltlm.method import Method
from tiltlm.objective import positive, stated
from tiltlm.twists.value import Decode, ValueLearning, ValueRule


@dataclass(frozen=True)
class QSharp(ValueRule):
    """log E[exp(r/beta)]."""

    beta: float | None = None
    """Temperature of the tilt (None: the target's)."""

    value: ValueLearning = ValueLearning()
    decode: Decode = Decode()
    optimum: ClassVar[str] = "pi*"

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def log_psi(self, law: Tensor, atoms: Tensor) -> Tensor:
        """law: log pmf [..., A] -> [...], nats. Finite for every beta > 0: nothing is exponentiated alone."""
        return (law + atoms / stated(self.beta)).logsumexp(-1)


NAMES: dict[str, str] = {"q-sharp": "decode with log E[exp(r/beta)] of the learnt law: ends at pi*"}
METHODS: dict[str, Method] = {"q-sharp": QSharp()}
