"""log Z from plain draws of the reference: by their weights w = exp(r/beta), or by how many of them rejection keeps.

Ẑ is the mean weight, log Ẑ its logarithm, its error by the delta method. That error is made of the weights that were
*met*. At a small beta Z may rest on completions that n draws never meet; their weights look light, their effective
sample size is large, and log Ẑ is nats too low with a small error. Nothing in the draws can tell. A bound w ≤ w_max (the
reward's upper bound, which rejection needs too) can: what was never met in n draws has a chance of at most about 3/n, so
Z may be higher by 3·w_max/n. Hence, with x = w/w_max within [0, 1], the interval is

    mean ± 1.96·stderr of x with two draws of 0 and two of 1 added,

the rule that makes an honest interval of a *rate* (Agresti & Coull 1998), for weights between. Where the draws say
enough it is the usual one; where they do not, it is as wide as what is not known. The certificate is betting's
(`betting.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.ruler.betting import interval_of_mean
from tiltlm.ruler.intervals import of_binary
from tiltlm.ruler.weights import trust

NO_BOUND = "no upper bound of the weights was given, so rare draws that matter may have been missed"


@dataclass(frozen=True)
class Known:
    """What draws say of log Z: value ± stderr, the 95% interval of the estimate, the certificate; nats."""

    value: float
    stderr: float
    source: str
    low: float | None = None
    high: float | None = None
    certificate: tuple[float, float] | None = None
    doubt: str = ""


def of_weights(log_w: Tensor, source: str, log_w_max: float | None) -> Known:
    """From log-weights [n] of independent draws, at most `log_w_max`. Raises ValueError where one is above it."""
    log_w = log_w.double().cpu()
    n, value = len(log_w), float(log_w.logsumexp(0)) - math.log(len(log_w))
    stderr = float((log_w - value).exp().std()) / math.sqrt(n)
    source = f"{n} {source}; {trust(log_w)}"
    if log_w_max is None:
        return Known(value, stderr, source, doubt=NO_BOUND)
    over = float(log_w.max()) - log_w_max
    if over > 1e-5 * max(1.0, abs(log_w_max)):
        raise ValueError(
            f"a weight lies above its bound: log w = {log_w.max().item():.6g}, bound {log_w_max:.6g}; state the reward's "
            "upper bound (r_max; of a task --task.r-max)"
        )
    log_x = (log_w - log_w_max).clamp_max(0)
    sure = interval_of_mean(log_x)
    low, high = plus_four(log_x)
    low, high = max(low, sure[0]) + log_w_max, min(high, sure[1]) + log_w_max
    return Known(value, stderr, source, low, high, (sure[0] + log_w_max, sure[1] + log_w_max))


def plus_four(log_x: Tensor) -> tuple[float, float]:
    """The 95% interval of log E[x] for x [n] within [0, 1]: mean ± 1.96·stderr with two draws of 0 and two of 1 added."""
    x = torch.cat([log_x.double().exp(), torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)])
    middle, half = float(x.mean()), 1.96 * float(x.std()) / math.sqrt(len(x))
    return _log(middle - half), min(0.0, _log(middle + half))


def of_counts(accepts: int, tries: int, log_w_max: float) -> Known:
    """From rejection: `accepts` of `tries` draws of the reference were kept, each with chance w/w_max."""
    if not 0 <= accepts <= tries or tries < 1:
        raise ValueError(f"kept draws are some of those tried; got {accepts} of {tries}")
    rate = accepts / tries
    value = _log((accepts or 0.5) / tries) + log_w_max  # of none: anywhere below one
    stderr = math.sqrt((1 - rate) / accepts) if accepts else math.inf
    ends = of_binary(rate, tries)
    low, high = (_log(p) + log_w_max for p in (ends.low, ends.high))
    sure = _of_bernoulli(accepts, tries)
    source = f"{accepts} of {tries} draws of the reference kept by rejection"
    return Known(value, stderr, source, low, high, (sure[0] + log_w_max, sure[1] + log_w_max))


def of_successes(successes: int, n: int, beta: float) -> Known:
    """For one prompt and a reward of 0 or 1: log Z = log(1 + p·(e^(1/beta) − 1)) from `successes` in `n` draws."""
    if not 0 <= successes <= n or n < 1 or not beta > 0:
        raise ValueError(f"need successes within 0 and n, and beta > 0; got {successes}, {n} and {beta}")
    rate, sure = successes / n, _of_bernoulli(successes, n)
    both = of_binary(rate, n)
    low, high = (_tilted(_log(p), beta) for p in (both.low, both.high))
    value = _tilted(_log(rate), beta)
    slope = math.exp(1 / beta - value) - math.exp(-value)  # d log Z / d p
    stderr = math.sqrt(rate * (1 - rate) / n) * slope
    ends = (_tilted(sure[0], beta), _tilted(sure[1], beta))
    return Known(value, stderr, f"{successes} of {n} draws of the reference rewarded", low, high, ends)


def _of_bernoulli(successes: int, n: int) -> tuple[float, float]:
    """Betting's interval of log p."""
    return interval_of_mean(torch.tensor([0.0, -math.inf]), torch.tensor([successes, n - successes]))


def _tilted(log_p: float, beta: float) -> float:
    """log(1 − p + p·e^(1/beta))."""
    p = torch.tensor(min(log_p, 0.0), dtype=torch.float64)
    return float(torch.logaddexp(p + 1 / beta, torch.log1p(-p.exp())))


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
