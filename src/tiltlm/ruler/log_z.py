"""log Z(x), the constant that absolute distances need.

For a reward of 0 or 1 with success probability p(x) = P_ref(r = 1 | x) everything about pi* is in closed form:

    log Z = log(1 − p + p·e^(1/beta)),   P*(r = 1) = p·e^(1/beta)/Z,   KL(pi*‖pi_ref) = P*(r = 1)/beta − log Z

If the rewarded completions can be listed (one right answer, say), p is the sum of their reference
probabilities: no sampling, no error. Otherwise the measured success rate stands in, its error propagated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.ruler.estimate import Estimate


@dataclass(frozen=True)
class BinaryTarget:
    """pi* for a reward of 0 or 1, per prompt, from log_p [P] = log P_ref(r = 1 | x) (nats, ≤ 0)."""

    log_p: Tensor
    beta: float

    def __post_init__(self) -> None:
        if bool((self.log_p > 1e-6).any()):
            raise ValueError(
                f"log_p must be log-probabilities (at most 0); the largest is {self.log_p.max().item()}"
            )
        if not self.beta > 0:
            raise ValueError(f"beta must be positive; got {self.beta}")

    @property
    def log_z(self) -> Tensor:
        """log Z(x), [P]."""
        log_p = self.log_p.double().clamp_max(0)
        return torch.logaddexp(log_p + 1 / self.beta, log1mexp(log_p))

    @property
    def success(self) -> Tensor:
        """P*(r = 1 | x), which is E_pi*[r], [P]."""
        return (self.log_p.double().clamp_max(0) + 1 / self.beta - self.log_z).exp()

    @property
    def kl_to_reference(self) -> Tensor:
        """KL(pi*‖pi_ref) per prompt, [P]."""
        return self.success / self.beta - self.log_z


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x ≤ 0, stable at both ends (Mächler 2012)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def from_success_rate(rate: Estimate, beta: float) -> Estimate:
    """log Z of a binary reward from a measured success rate, with its standard error to first order.

    For *one* prompt, or prompts that share one success probability: log Z is not linear in p.
    """
    if not 0 <= rate.value <= 1 or not beta > 0:
        raise ValueError(f"need a rate within [0, 1] and beta > 0; got {rate.value} and {beta}")
    lift = math.expm1(1 / beta) if beta > 1 / 700 else math.inf
    if math.isinf(lift):
        raise ValueError(f"beta {beta} is too small for a measured rate: exp(1/beta) overflows")
    z = 1 + rate.value * lift
    return Estimate(math.log(z), rate.stderr * lift / z, rate.n)
