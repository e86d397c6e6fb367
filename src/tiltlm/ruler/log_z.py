"""log Z(x), the constant that absolute distances need.

For a reward of 0 or 1 with success probability p(x) = P_ref(r = 1 | x) everything about pi* is in closed form:

    log Z = log(1 − p + p·e^(1/beta)),   P*(r = 1) = p·e^(1/beta)/Z,   KL(pi*‖pi_ref) = P*(r = 1)/beta − log Z

If the rewarded completions can be listed (one right answer, say), p is the sum of their reference
probabilities: no sampling, no error.

For any other target, `LogZ` holds what is known: a number, a number with a standard error (one long importance
run, rejection's verdicts: `importance.py`), or a pair of stochastic bounds around it (`bounds.py`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.ruler import importance
from tiltlm.ruler.certificate import WRONG, certified
from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.ruler.intervals import FEW
from tiltlm.ruler.student import errors


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


Side = tuple[float, float]
"""An end of an interval: the value that it starts from, and how far the draws' chance may carry beyond it."""


@dataclass(frozen=True)
class LogZ:
    """log Z of a comparison (over prompts: its mean), nats: value ± stderr, and bounds where it is only bracketed.

    lower, upper: estimates of E[log Ẑ] ≤ log Z and of its counterpart ≥ log Z. Without them the value is unbiased
    to first order; with them it is the middle, and the truth may lie anywhere between.
    paired: known prompt by prompt (`each` [P]) and subtracted so: its spread over prompts is in the distances
    already, and `lower`, `upper` err only by how the gap varies.
    low, high: the estimate's 95% interval, where it is not value ± 1.96 stderr. certificate: the interval that needs
    nothing to be normal (`certificate.py`, `betting.py`); over prompts, of the mean over *these* prompts.
    doubt: why the estimate's interval may not hold; empty where nothing says so.
    """

    value: float
    stderr: float
    lower: Estimate | None = None
    upper: Estimate | None = None
    source: str = "exact"
    paired: bool = False
    each: Tensor | None = field(default=None, compare=False)
    low: float | None = None
    high: float | None = None
    certificate: tuple[float, float] | None = None
    doubt: str = ""

    @staticmethod
    def exact(value: float | Tensor) -> LogZ:
        """A known number, or the mean of known numbers [P]."""
        return LogZ(float(torch.as_tensor(value).double().mean()), 0.0)

    @staticmethod
    def of_importance(log_w: Tensor, source: str, log_w_max: float | None = None) -> LogZ:
        """From one long run of importance sampling: log of the mean weight, [n]; error by the delta method.

        log_w_max: a bound on the weights (r_max/beta for draws of the reference). With it the interval holds whatever the
        draws missed, and there is a certificate; without it nothing can tell what they missed, and `doubt` says so.
        """
        return LogZ(**vars(importance.of_weights(log_w, source, log_w_max)))

    @staticmethod
    def of_acceptance(accepts: int, tries: int, log_w_max: float) -> LogZ:
        """From rejection's verdicts: `accepts` of `tries` draws of the reference kept, each with chance w/w_max."""
        return LogZ(**vars(importance.of_counts(accepts, tries, log_w_max)))

    @staticmethod
    def of_success_rate(successes: int, n: int, beta: float) -> LogZ:
        """Of a reward of 0 or 1 for *one* prompt: log(1 + p·(e^(1/beta) − 1)), with Wilson's and betting's ends of p."""
        return LogZ(**vars(importance.of_successes(successes, n, beta)))

    @staticmethod
    def of_bounds(lower: Tensor, upper: Tensor, source: str) -> LogZ:
        """From repeated lower and upper bounds [R] each, of SMC: the midpoint, its error from the pairs'
        spread. Raises ValueError if the lower ones lie above the upper ones by more than three errors."""
        refuse_crossed(lower, upper)
        middle, fixed = mean((lower.double() + upper.double()) / 2), certified(lower, upper)
        doubt = FEW_REPEATS if middle.n < FEW else ""
        return LogZ(middle.value, middle.stderr, mean(lower), mean(upper), source, certificate=fixed, doubt=doubt)

    @staticmethod
    def of_pairs(lower: Tensor, upper: Tensor, source: str) -> LogZ:
        """From one pair of bounds per prompt, [P] each: the midpoints. Raises ValueError as `of_bounds` does."""
        refuse_crossed(lower, upper, paired=True)
        middle, half = (lower.double() + upper.double()) / 2, mean((upper.double() - lower.double()) / 2)
        value, fixed = mean(middle), certified(lower, upper)
        low, high = (Estimate(value.value + sign * half.value, half.stderr, half.n) for sign in (-1, 1))
        return LogZ(value.value, value.stderr, low, high, source, paired=True, each=middle, certificate=fixed)

    @staticmethod
    def of_listing(lower: Tensor, upper: Tensor, source: str) -> LogZ:
        """From ends of each prompt's log Z that nothing can be beyond, [P] each: the middles."""
        sure = float(lower.double().mean()), float(upper.double().mean())
        return replace(LogZ.of_pairs(lower, upper, source), certificate=sure)

    @staticmethod
    def of_runs(log_w: Tensor, source: str) -> LogZ:
        """From an importance run for each of P prompts, log-weights [P, n]: log of each mean weight, its bias of order 1/n
        taken off by the delta method, log Ẑ + s²/(2n·Ẑ²).

        The runs' chance is independent from prompt to prompt, so that it is in the distances' spread already; stderr is
        that of the mean over *these* prompts.
        """
        log_w = log_w.double()
        n = log_w.shape[1]
        plain = log_w.logsumexp(1) - math.log(n)
        ratio = (log_w - plain[:, None]).exp()
        each = plain + ratio.var(1) / (2 * n)
        few = ((log_w.logsumexp(1) * 2 - (2 * log_w).logsumexp(1)).exp() < FEW_EFFECTIVE).double().mean()
        doubt = (
            f"of {float(few):.0%} of the prompts fewer than {FEW_EFFECTIVE} draws tell log Z" if few > 0 else ""
        )
        stderr = float((ratio.var(1) / n).sum().sqrt()) / len(each)
        return LogZ(
            float(each.mean()),
            stderr,
            source=f"{source}, {len(each)} prompts",
            paired=True,
            each=each,
            doubt=doubt,
        )

    def per_prompt(self, n: int) -> Tensor | float:
        """What is subtracted from n prompts' distances: each one's own, or the common value."""
        if self.each is None:
            return self.value
        if len(self.each) < n:
            raise ValueError(
                f"log Z is known for {len(self.each)} prompts, but {n} are measured: raise --log-z.prompts, or lower "
                "--ruler.prompts"
            )
        return self.each[:n]

    @property
    def shared_stderr(self) -> float:
        """The part of the error that all prompts' distances have in common."""
        return 0.0 if self.paired else self.stderr

    @property
    def gap(self) -> float:
        """Upper less lower bound, where upper is above; 0 where no gap is seen, or the value is not bracketed."""
        return 0.0 if self.lower is None or self.upper is None else max(0.0, self.upper.value - self.lower.value)

    @property
    def sides(self) -> tuple[Side, Side]:
        """The interval's two ends. Between bounds they start from the bounds, at Student's distance; where lower and
        upper crossed within their errors, from the outer one."""
        if self.lower is None or self.upper is None:
            if self.lower is not None:
                return (self.lower.value, self.lower.value - self.lower.interval()[0]), (math.inf, 0.0)
            usual = 1.96 * self.stderr
            down = usual if self.low is None else self.value - self.low
            return (self.value, down), (self.value, usual if self.high is None else self.high - self.value)
        first, last = sorted((self.lower, self.upper), key=lambda e: e.value)
        return (first.value, first.value - first.interval()[0]), (last.value, last.interval()[1] - last.value)

    @property
    def interval(self) -> tuple[float, float]:
        """Where log Z lies, at 95%, by estimate."""
        (low, down), (high, up) = self.sides
        return low - down, high + up

    @property
    def width(self) -> float:
        """How long `interval` is."""
        low, high = self.interval
        return high - low

    def __str__(self) -> str:
        low, high = self.interval
        ends = f"estimate, 95%: {low:.4f} to {high:.4f}" + (
            f", which may not hold: {self.doubt}" if self.doubt else ""
        )
        if self.certificate is not None:
            ends += "; certified, 95%: {:.4f} to {:.4f}".format(*self.certificate)
        if self.lower is None or self.upper is None:
            exact = self.stderr == 0 and self.low is None
            plain = f"{self.value:.4f}" + ("" if exact else f" ± {self.stderr:.4f}")
            if max(high - self.value, self.value - low) > 4 * self.stderr + 1e-4:  # the draws do not tell it
                return f"log Z lies between {low:.4f} and {high:.4f} nats ({ends}; the draws met: {plain}; {self.source})"
            return f"log Z = {plain} nats ({'' if exact else ends + '; '}{self.source})"
        middle = f"middle {self.value:.4f} ± {self.stderr:.4f}"
        if self.upper.value < self.lower.value:
            return f"log Z = {middle[7:]} nats (no gap seen, interval from the errors; {ends}; {self.source})"
        return (
            f"log Z lies between {self.lower} and {self.upper} nats ({ends}; gap {self.gap:.4f}, {middle}; "
            f"{self.source})"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(replace(self, each=None)) | {"each": None if self.each is None else self.each.tolist()}

    @staticmethod
    def from_json(value: dict[str, Any]) -> LogZ:
        """What `to_json` made. Raises ValueError for anything else."""
        try:
            found = LogZ._read(value)
            str(found)  # every number in it is read there
        except (TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a stored log Z: {str(value)[:40]} ({type(error).__name__}: {error})") from None
        return found

    @staticmethod
    def _read(value: dict[str, Any]) -> LogZ:
        """What older files lack stays unknown."""
        names = ("value", "stderr", "source", "paired", "low", "high", "doubt")
        known: dict[str, Any] = {name: value[name] for name in names if name in value}
        for name in ("lower", "upper"):
            known[name] = None if value[name] is None else Estimate(**value[name])
        each, fixed = value.get("each"), value.get("certificate")
        each = None if each is None else torch.tensor(each, dtype=torch.float64)
        return LogZ(**known, each=each, certificate=None if fixed is None else tuple(fixed))


FEW_EFFECTIVE = 30
"""Effective draws of one prompt under which its log Z is a guess."""

FEW_REPEATS = f"fewer than {FEW} repeats, whose errors are themselves guesses"

ROUNDING = 1e-4
"""Nats that float32 densities may be off by."""


def refuse_crossed(lower: Tensor, upper: Tensor, paired: bool = False) -> None:
    """Raise ValueError where the mean of lower bounds [n] lies above that of upper ones by more than three errors.

    paired: both of a place are of one prompt, and how log Z itself varies over prompts is no error of the difference.
    """
    difference = mean((lower - upper).double())  # of the same repeat or prompt
    apart = mean(lower), mean(upper)
    if difference.n < 2:
        return
    stderr = max(difference.stderr, 0.0 if paired else math.hypot(apart[0].stderr, apart[1].stderr))
    if difference.value > errors(3, difference.n - 1) * stderr + ROUNDING:
        raise ValueError(
            f"the lower bounds of log Z ({apart[0]}) lie above the upper ones ({apart[1]}) by more than three errors: "
            + WRONG
        )
