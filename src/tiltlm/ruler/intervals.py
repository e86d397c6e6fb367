"""95% intervals from independent observations: *estimates*. They lean on something (near-normal means, draws that showed
what there is); where that is in doubt, the interval says so in `doubt`. What leans on nothing is in `certificate.py`.

    Student's t     mean ± t·stderr: near-normal means, however few; the default
    Wilson          rates: all p whose own normal interval would hold the rate seen
    exact           rates with fewer than ten hits or ten misses (Clopper–Pearson: all p under which a rate so high, or so
                    low, has a chance of 2.5%), where Wilson's covers 92%; 1000 of 1000 gives [0.996, 1]
    bootstrap-t     skewed observations: quantiles of (mean* − mean)/stderr* over resamples take the place of ±t
                    (Efron & Tibshirani 1993, §12.5)

A rate is averaged prompt by prompt before it comes here. Its n is then the number of *independent* draws that would
spread as the prompts do, P·p(1 − p)/spread², but never less than the number of prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.ruler.student import t_975
from tiltlm.seeds import stream

SKEWED = 0.1
"""Skewness/√n from which Student's interval is replaced: it then misses about 1% too often, and ever more."""

HOPELESS = 0.5
"""Skewness/√n from which no interval of this kind is to be relied on."""

FEW = 10
"""Observations below which their spread (and skewness) is itself a guess."""

RARE = 15
"""Observations unlike the commonest one, below which the mean rests on how many of them there happen to be."""

RESAMPLES = 999


@dataclass(frozen=True)
class Interval:
    """A 95% interval [low, high]; kind: how it was made; doubt: why it may not hold, empty where nothing says so."""

    low: float
    high: float
    kind: str = "Student's t"
    doubt: str = ""

    def entries(self) -> dict[str, Any]:
        """Its entries of a report row; null: unknown."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return {"low": low, "high": high, "interval": self.kind} | ({"doubt": self.doubt} if self.doubt else {})


UNKNOWN = Interval(-math.inf, math.inf, "none", "one observation")


def student(e: Estimate) -> Interval:
    """mean ± t·stderr."""
    return UNKNOWN if e.n < 2 else Interval(*e.interval())


def of_mean(x: Tensor, rate: bool = False) -> Interval:
    """The interval of the mean of independent observations x [n]; rate: a rate's, if they all lie within [0, 1]."""
    x = x.double().cpu()
    if rate and bool(((x >= 0) & (x <= 1)).all()):
        return of_rate(x)
    e = mean(x)
    if e.n < 2:
        return UNKNOWN
    if e.stderr == 0:  # what was never seen may be anything
        return Interval(-math.inf, math.inf, "none", f"all {e.n} observations are alike")
    alike = int((x == x.mode().values).sum())
    other = e.n - alike
    if e.n >= FEW and other < RARE and alike >= max(3, e.n / 4):
        return Interval(*bootstrap_t(x), "bootstrap-t", f"all but {other} of {e.n} observations are alike")
    if e.n < FEW:
        return Interval(*e.interval(), doubt=f"fewer than {FEW} observations")
    skew = skewness(x)
    if abs(skew) < SKEWED:
        return Interval(*e.interval())
    low, high = bootstrap_t(x)
    return Interval(low, high, "bootstrap-t", "a few observations decide it" if abs(skew) > HOPELESS else "")


def skewness(x: Tensor) -> float:
    """Skewness/√n of x [n], which must spread: how much of it is left in the mean."""
    return float(((x - x.mean()) ** 3).mean() / x.var(unbiased=False) ** 1.5) / math.sqrt(len(x))


def bootstrap_t(x: Tensor) -> tuple[float, float]:
    """The bootstrap-t interval of the mean of x [n]. Resamples follow from n alone: same draws, same interval."""
    e, n = mean(x), len(x)
    found = []
    for k in range(0, RESAMPLES, 111):
        uniform = stream(0, "bootstrap-t", n).uniform(range(k, k + 111), n)
        again = x[(uniform * n).long().clamp_max(n - 1)]
        error = again.std(1) / math.sqrt(n)
        found.append(torch.where(error > 0, (again.mean(1) - e.value) / error, torch.inf))
    t = torch.cat(found).nan_to_num(posinf=1e9).sort().values
    most = 25 * t_975(n - 1)  # resamples without any spread say nothing
    low, high = (float(t[k].clamp(-most, most)) for k in (int(0.025 * RESAMPLES), int(0.975 * RESAMPLES)))
    return e.value - high * e.stderr, e.value - low * e.stderr


def of_rate(x: Tensor) -> Interval:
    """Wilson's interval of a rate, from x [n] within [0, 1]: draws, or the draws of each prompt averaged."""
    x = x.double()
    p, n = float(x.mean()), len(x)
    if bool(((x == 0) | (x == 1)).all()):
        return of_binary(p, n)
    if n < 2:
        return replace(of_binary(p, 1), doubt="one observation")
    spread = float(x.var(unbiased=True))
    independent = max(float(n), n * p * (1 - p) / spread) if spread > 0 else float(n)
    found = of_binary(p, independent, t_975(n - 1))
    return replace(found, doubt=f"fewer than {FEW} observations") if n < FEW else found


def of_binary(p: float, n: float, z: float = 1.959964) -> Interval:
    """The interval of a rate from p of n independent verdicts."""
    if min(p, 1 - p) * n < 10:
        return Interval(*exact(p, n), "exact")
    return Interval(*wilson(p, n, z), "Wilson")


def exact(p: float, n: float) -> tuple[float, float]:
    """Clopper and Pearson's interval: quantiles of beta distributions; n need not be whole."""
    from scipy.special import betaincinv

    hits, misses = p * n, (1 - p) * n
    low = 0.0 if hits < 1e-9 else float(betaincinv(hits, misses + 1, 0.025))
    return low, 1.0 if misses < 1e-9 else float(betaincinv(hits + 1, misses, 0.975))


def wilson(p: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    """All rates whose normal interval, z standard errors either way, would hold p seen in n."""
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
