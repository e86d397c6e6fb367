"""Certificates of log Z: intervals that hold with probability 1 − α whatever the twist, the reward, the number of
particles or of runs. Nothing is taken to be normal.

Free runs give Ẑ_1, Ẑ_2, … with E[Ẑ_i] = Z, conditional ones Ẑᶜ_1, … with E[1/Ẑᶜ_i] = 1/Z (`bounds.py`). So Ẑ_i/Z and
Z/Ẑᶜ_i are nonnegative, independent, and have mean 1; their running products

    M_R = Π_{i≤R} Ẑ_i/Z,        M'_R = Π_{i≤R} Z/Ẑᶜ_i

are nonnegative martingales that start at 1. Ville's inequality, P(M_R ≥ 1/a for any R) ≤ a, with a = α/2 for each, and
the logarithm of it divided by R: with probability 1 − α at least, *for all R at once*,

    log Z ≥ mean_R log Ẑ − ln(2/α)/R,        log Z ≤ mean_R log Ẑᶜ + ln(2/α)/R.

For all R at once: one may look after every run and stop when the interval is narrow enough (`stopping.py`); what was
looked at cannot harm it. Taking the best of m settings costs ln(m)/R, each being certified at α/m (the union bound).
Over P prompts the product runs over prompts too, Π_p Π_i Ẑ_{p,i}/Z_p: the *mean over these prompts* of log Z is
certified with R·P in the place of R. As a statement about other prompts it is none: that is what a standard error over
prompts is for.

Two things it does need: every conditional run has an exact draw of its own, and twist and proposal did not learn from
those draws (they are fixed when the draws are made).

The price is width: Jensen's gap E[log Ẑ] ≤ log Z, which more particles close, and ln(2/α)/R = 3.7/R on either side, which
more runs close. Twenty runs of a good twist: 0.37 nats.

Grosse, Ghahramani & Adams 2015 (arXiv:1511.02543) have the one-run form of both sides, by Markov's inequality; Howard,
Ramdas, McAuliffe & Sekhon 2021 (arXiv:1810.08240) Ville's inequality and confidence sequences; Grünwald, de Heide &
Koolen 2024 (arXiv:1906.07801) e-values, nonnegative variables of mean at most 1, their products and stopping at will.
"""

from __future__ import annotations

import math

from torch import Tensor

ALPHA = 0.05
"""How often, at most, a certificate may miss."""

SURE = ALPHA / 20
"""A contradiction whose chance is less than this is no chance."""


def certified(lower: Tensor, upper: Tensor, alpha: float = ALPHA, choices: int = 1) -> tuple[float, float]:
    """The certificate (low, high) of log Z, or of its mean over prompts, from log Ẑ and log Ẑᶜ [R] or [R, P] each, nats.

    choices: among how many settings this one was chosen after seeing them. Where the two ends contradict each other (one
    of them is then a miss) the interval is that of α/20; raises ValueError if nothing is left of that one either.
    """
    low, high = one_sided(lower, "lower", alpha / choices), one_sided(upper, "upper", alpha / choices)
    if low > high and alpha > SURE:
        return certified(lower, upper, SURE, choices)
    if low > high:
        raise ValueError(
            f"certified from below at {low:.4f} and from above at {high:.4f}, which cannot be (chance: {alpha:g} at most); "
            + WRONG
        )
    return low, high


def one_sided(runs: Tensor, side: str, alpha: float = ALPHA) -> float:
    """The end of a certificate on one side, "lower" or "upper", from runs [R] or [R, P]; it errs with chance α/2."""
    cost = math.log(2 / alpha) / runs.numel()
    return float(runs.double().mean()) + (cost if side == "upper" else -cost)


def runs_for(width: float, gap: float, alpha: float = ALPHA) -> float:
    """Runs of either side after which a certificate is `width` wide, given the gap between the two means; inf if never."""
    return math.ceil(2 * math.log(2 / alpha) / (width - gap)) if width > max(gap, 0.0) else math.inf


WRONG = (
    "the exact draws may belong to another target (beta, reward, reference, prompt) or not be exact, or a proposal may "
    "give no chance to what pi* draws"
)
"""What is to be suspected where lower and upper bounds contradict each other."""
