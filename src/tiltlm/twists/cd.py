"""Controlled decoding: tilt by the expected reward (Mudgal et al. 2023, arXiv:2310.17022, eq. 6).

    log psi = E_ref[r | prefix] / beta   ≤   log E_ref[exp(r/beta) | prefix]          (Jensen)

Biased on purpose: it equals psi* only where the reward-to-go is already certain (at the last token, say), and
guided decoding with it does not end at pi*. Note: the star-graph experiments' code adds log(p)/…, FUDGE's
twist, under the name CD; the paper's formula is this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiltlm.method import Method
from tiltlm.objective import positive, stated
from tiltlm.twists.value import Decode, ValueLearning, ValueRule


@dataclass(frozen=True)
class CD(ValueRule):
    """E[r] / beta."""

    beta: float | None = None
    """Temperature of the tilt (None: the target's)."""

    value: ValueLearning = ValueLearning()
    decode: Decode = Decode()
    optimum: ClassVar[str] = "biased: tilts by the expected reward, below pi* by Jensen"

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def log_psi(self, law: Tensor, atoms: Tensor) -> Tensor:
        """law: log pmf [..., A] -> [...], nats."""
        return (law.exp() * atoms).sum(-1) / stated(self.beta)


NAMES: dict[str, str] = {"cd": "decode with E[r]/beta of the same law: below pi* by Jensen"}
METHODS: dict[str, Method] = {"cd": CD()}
