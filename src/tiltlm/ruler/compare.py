"""Methods on the same prompts: compare differences, not intervals, and count how many were looked at.

    d_i = first_i − second_i         one a prompt i (of one prompt: one a draw)
    t = mean(d) / (sd(d)/√n)         under "no difference" Student's t with n − 1 degrees of freedom

Where every observation of both is 0 or 1 (one answer a question, right or wrong), p is that of McNemar's exact test
(`mcnemar.py`), which holds also where few questions tell the two apart.

The difference of two KLs to pi* needs no log Z (it cancels prompt by prompt), and pairing by prompt takes the
prompts' own spread out of the error. Of m comparisons shown together some look different by chance (of 91 pairs of
equal methods almost surely one), so their p-values are adjusted together by Holm's step-down rule: with the i-th
smallest p, max_{j≤i} (m − j + 1)·p_(j). The chance of *any* false verdict among them is then at most 5%, however they
depend on each other (Holm 1979, Scand. J. Statist. 6).

Each verdict also says what the comparison could have seen: the difference that would be shown four times in five. "No
difference shown" with a large one says little.

The prompts' spread is the error of a difference between two *trained models*. Whether the *methods* differ takes
several seeds of training: `over_seeds` makes one difference of several, whose error is their spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.ruler.intervals import of_mean, skewness
from tiltlm.ruler.mcnemar import McNemar, is_binary
from tiltlm.ruler.measure import Measurement

LEVEL = 0.05
"""The chance of any false verdict among comparisons that are shown together."""

POWER = 0.8
"""How often `Difference.least` would be shown."""


@dataclass(frozen=True)
class Difference:
    """first − second of one metric, paired; n of the estimate: prompts (or draws of one prompt), or seeds of training.

    p: two-sided, adjusted for being one of `together` comparisons, by the `test`; seeds: how many trainings of each method
    it rests on. doubt: why Student's t (error, interval, p if it is the test) may not hold: few, skewed or like
    observations; empty where nothing says so.
    """

    metric: str
    estimate: Estimate
    p: float
    together: int = 1
    seeds: int = 1
    doubt: str = ""
    test: Literal["Student's t", "exact McNemar"] = "Student's t"

    @property
    def verdict(self) -> str:
        """'higher', 'lower', 'no difference shown', 'identical'; any of the `together` is false with chance 5% at most."""
        if self.identical:
            return "identical"
        if not self.p <= LEVEL:
            return "no difference shown"
        return "higher" if self.estimate.value > 0 else "lower"

    @property
    def identical(self) -> bool:
        """Whether every observation agrees to the last bit: the same model twice, and nothing to be tested."""
        return self.estimate.value == 0 and self.estimate.stderr == 0

    @property
    def least(self) -> float:
        """The true difference that would be shown four times in five, were it the first of its comparisons to be shown.

        Approximate: the non-central t is taken as a shifted t. 0 where the differences have no spread.
        """
        if self.identical:
            return 0.0
        from scipy.special import stdtrit

        freedom = self.estimate.n - 1
        return float(
            (stdtrit(freedom, 1 - LEVEL / (2 * self.together)) + stdtrit(freedom, POWER)) * self.estimate.stderr
        )


def p_value(e: Estimate) -> float:
    """Two-sided p of "the mean is 0" by Student's t; NaN of a single observation.

    Without any spread t would call every difference certain. Then only signs count: n alike have chance 2^(1−n).
    """
    if e.n < 2:
        return float("nan")
    if e.stderr == 0:
        return 1.0 if e.value == 0 else 2.0 ** (1 - e.n)
    from scipy.special import stdtr

    return float(2 * stdtr(e.n - 1, -abs(e.value) / e.stderr))


def holm(found: Sequence[Difference]) -> list[Difference]:
    """The same differences, each p adjusted for all of them being shown together (see the module); identical ones are no
    comparisons, and do not count."""
    tested = [k for k, each in enumerate(found) if not each.identical]
    m, worst = len(tested), 0.0
    adjusted = [1.0] * len(found)
    for rank, k in enumerate(sorted(tested, key=lambda k: found[k].p)):
        worst = max(worst, min(1.0, (m - rank) * found[k].p))
        adjusted[k] = worst
    return [replace(each, p=p, together=m) for each, p in zip(found, adjusted, strict=True)]


WITHOUT_LOG_Z = {
    "kl_to_target": ("log_w", -1),
    "kl_from_target": ("log_w_exact", 1),
    "objective_gap": ("objective", -1),
}
"""KL(q‖pi*) = log Z − F and KL(pi*‖q) = G − log Z: their differences are those of F and G, whatever log Z was used."""


def paired(first: Measurement, second: Measurement) -> list[Difference]:
    """Differences of every metric both have, paired by prompt (of one prompt, draw by draw), each by itself.

    Distances are compared without any log Z, and left out where that cannot be: where one of the two is known by log Z
    alone. Raises ValueError unless they measured equally many prompts.
    """
    by_log_z = set(first.shares) ^ set(second.shares)
    shared = [name for name in first.values if name in second.values and name not in by_log_z]
    if not shared:
        raise ValueError("these measurements share no metric")
    found = []
    for name in shared:
        source, sign = WITHOUT_LOG_Z.get(name, (name, 1))
        if source not in shared:
            if name in WITHOUT_LOG_Z and (first.log_z or second.log_z):
                continue
            source, sign = name, 1
        one, other = sign * first.values[source], sign * second.values[source]
        if len(one) > 1 or len(one) != len(other):
            found.append(difference_of(name, one, other))
    return found


def difference_of(metric: str, first: Tensor, second: Tensor) -> Difference:
    """first − second of one metric, each [n]: the same prompts in the same order. Raises ValueError for other lengths."""
    if len(first) != len(second):
        raise ValueError(f"paired comparison needs the same prompts; got {len(first)} and {len(second)} of them")
    apart = first.double() - second.double()
    estimate = mean(apart)
    doubt = doubt_of(apart) if len(apart) > 1 else "one observation"
    if is_binary(first) and is_binary(second):
        return Difference(metric, estimate, McNemar.of(first, second).p, doubt=doubt, test="exact McNemar")
    return Difference(metric, estimate, p_value(estimate), doubt=doubt)


def doubt_of(apart: Tensor) -> str:
    """Why Student's t may not hold for these differences [n]; empty where nothing says so."""
    if float(apart.std()) == 0:  # all 0: the same model twice, and no doubt about it
        return "" if float(apart[0]) == 0 else f"all {len(apart)} differences are alike"
    said = of_mean(apart).doubt
    return said or ("skewed differences" if abs(skewness(apart.double())) > SKEWED else "")


SKEWED = 0.2
"""Skewness/√n from which Student's t is doubted."""


def over_seeds(found: Sequence[Difference]) -> Difference:
    """One difference of several, of the same metric after trainings from different seeds: n is the seeds."""
    if len(found) < 2 or len({each.metric for each in found}) != 1:
        raise ValueError(
            f"the same metric from at least two seeds is needed; got {[each.metric for each in found]}"
        )
    estimate = mean(torch.tensor([each.estimate.value for each in found], dtype=torch.float64))
    return Difference(found[0].metric, estimate, p_value(estimate), seeds=len(found))
