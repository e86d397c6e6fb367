"""log Z(x), the constant that absolute distances need.

For a reward of 0 or 1 with success probability p(x) = P_ref(r = 1 | x) everything about pi* is in closed form:

    log Z = log(1 − p + p·e^(1/beta)),   P*(r = 1) = p·e^(1/beta)/Z,   KL(pi*‖pi_ref) = P*(r = 1)/beta − log Z

If the rewarded completions can be listed (one right answer, say), p is the sum of their reference
probabilities: no sampling, no error. Otherwise the measured success rate stands in, its error propagated.

For any other target, `LogZ` holds what is known: a number, a number with a standard error (one long importance
run), or a pair of stochastic bounds around it (`bounds.py`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.ruler.weights import trust


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


@dataclass(frozen=True)
class LogZ:
    """log Z of a comparison (over prompts: its mean), nats: value ± stderr, and bounds where it is only bracketed.

    lower, upper: estimates of E[log Ẑ] ≤ log Z and of its counterpart ≥ log Z. Without them the value is unbiased
    to first order; with them it is the middle, and the truth may lie anywhere between.
    paired: known prompt by prompt (`each` [P]) and subtracted so: its spread over prompts is in the distances
    already, and `lower`, `upper` err only by how the gap varies.
    """

    value: float
    stderr: float
    lower: Estimate | None = None
    upper: Estimate | None = None
    source: str = "exact"
    paired: bool = False
    each: Tensor | None = field(default=None, compare=False)

    @staticmethod
    def exact(value: float | Tensor) -> LogZ:
        """A known number, or the mean of known numbers [P]."""
        return LogZ(float(torch.as_tensor(value).double().mean()), 0.0)

    @staticmethod
    def of_importance(log_w: Tensor, source: str) -> LogZ:
        """From one long run of importance sampling: log of the mean weight, [n]; error by the delta method."""
        log_w = log_w.double()
        value = float(log_w.logsumexp(0)) - math.log(len(log_w))
        spread = float((log_w - value).exp().std()) / math.sqrt(len(log_w))
        return LogZ(value, spread, source=f"{len(log_w)} {source}; {trust(log_w)}")

    @staticmethod
    def of_bounds(lower: Tensor, upper: Tensor, source: str) -> LogZ:
        """From repeated lower and upper bounds [R] each, of SMC: the midpoint, its error from the pairs'
        spread."""
        middle = mean((lower.double() + upper.double()) / 2)
        return LogZ(middle.value, middle.stderr, mean(lower), mean(upper), source)

    @staticmethod
    def of_pairs(lower: Tensor, upper: Tensor, source: str) -> LogZ:
        """From one pair of bounds per prompt, [P] each: the midpoints."""
        middle, half = (lower.double() + upper.double()) / 2, mean((upper.double() - lower.double()) / 2)
        value = mean(middle)
        low, high = (Estimate(value.value + sign * half.value, half.stderr, half.n) for sign in (-1, 1))
        return LogZ(value.value, value.stderr, low, high, source, paired=True, each=middle)

    def per_prompt(self, n: int) -> Tensor | float:
        """What is subtracted from n prompts' distances: each one's own, or the common value."""
        if self.each is None:
            return self.value
        if len(self.each) < n:
            raise ValueError(f"log Z is known for {len(self.each)} prompts, but {n} are measured")
        return self.each[:n]

    @property
    def shared_stderr(self) -> float:
        """The part of the error that all prompts' distances have in common."""
        return 0.0 if self.paired else self.stderr

    @property
    def gap(self) -> float:
        """Upper less lower bound; 0 where the value is not bracketed."""
        return 0.0 if self.lower is None or self.upper is None else self.upper.value - self.lower.value

    @property
    def interval(self) -> tuple[float, float]:
        """Where log Z lies, at 95%: from the lower bound's end (by Student's t) to the upper's, or the value's own."""
        low, high = self.lower, self.upper
        if low is None or high is None:
            return self.value - 1.96 * self.stderr, self.value + 1.96 * self.stderr
        return low.interval()[0], high.interval()[1]

    @property
    def width(self) -> float:
        """How long `interval` is."""
        low, high = self.interval
        return high - low

    def __str__(self) -> str:
        if self.lower is None or self.upper is None:
            return f"log Z = {self.value:.4f} ± {self.stderr:.4f} nats ({self.source})"
        low, high = self.interval
        return (
            f"log Z lies between {self.lower} and {self.upper} nats (95%: {low:.4f} to {high:.4f}; "
            f"gap {self.gap:.4f}, middle {self.value:.4f} ± {self.stderr:.4f}; {self.source})"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(replace(self, each=None)) | {"each": None if self.each is None else self.each.tolist()}

    @staticmethod
    def from_json(value: dict[str, Any]) -> LogZ:
        """What `to_json` made. Raises ValueError for anything else."""
        try:
            return LogZ._read(value)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a stored log Z: {str(value)[:40]} ({type(error).__name__}: {error})") from None

    @staticmethod
    def _read(value: dict[str, Any]) -> LogZ:
        bounds = {name: None if value[name] is None else Estimate(**value[name]) for name in ("lower", "upper")}
        paired, each = value.get("paired", False), value.get("each")
        each = None if each is None else torch.tensor(each, dtype=torch.float64)
        return LogZ(value["value"], value["stderr"], **bounds, source=value["source"], paired=paired, each=each)
