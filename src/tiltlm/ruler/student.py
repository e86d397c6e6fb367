"""Student's t: the law of a mean of n normal observations over its own standard error, with n − 1 degrees of freedom.

P(|t| > x) = I(f/(f + x²); f/2, 1/2), the regularised incomplete beta function, here by its continued fraction.
"""

from __future__ import annotations

import math
from functools import cache


def cdf(x: float, freedom: float) -> float:
    """P(t ≤ x) with `freedom` degrees of freedom. Raises ValueError below one."""
    if freedom < 1:
        raise ValueError(f"Student's t wants at least one degree of freedom; got {freedom}")
    if math.isinf(x):
        return float(x > 0)
    outside = incomplete_beta(freedom / (freedom + x * x), freedom / 2, 0.5) / 2
    return 1 - outside if x > 0 else outside


@cache
def quantile(p: float, freedom: float) -> float:
    """The x with P(t ≤ x) = p, by bisection."""
    if not 0 < p < 1:
        raise ValueError(f"a quantile wants a probability between 0 and 1; got {p}")
    if p < 0.5:
        return -quantile(1 - p, freedom)
    low, high = 0.0, 1.0
    while cdf(high, freedom) < p:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def t_975(freedom: int) -> float:
    """The 97.5% quantile: how many standard errors a 95% interval reaches to either side."""
    return quantile(0.975, freedom)


def errors(normal: float, freedom: int) -> float:
    """What `normal` standard errors of a known spread are worth when n = freedom + 1 observations tell the spread: 3 with
    19 degrees of freedom are 3.45."""
    return quantile((1 + math.erf(normal / math.sqrt(2))) / 2, freedom)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """I(x; a, b), the regularised incomplete beta function, by Lentz's way with its continued fraction."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1 / _kept(1 - (a + b) * x / (a + 1))
    total = d
    for k in range(1, 500):
        for numerator in (
            k * (b - k) * x / ((a + 2 * k - 1) * (a + 2 * k)),
            -(a + k) * (a + b + k) * x / ((a + 2 * k) * (a + 2 * k + 1)),
        ):
            d = 1 / _kept(1 + numerator * d)
            c = _kept(1 + numerator / c)
            total *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * total / a


def _kept(x: float) -> float:
    """`x`, kept away from 0, by which one cannot divide."""
    return x if abs(x) > 1e-300 else 1e-300
