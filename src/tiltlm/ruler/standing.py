"""Several models on the same questions: which of them can be the best.

All pairs are compared, and their p adjusted together by Holm, not those with the best alone: which one is best was chosen
from the same observations, and the best of many equal ones is no longer like the others (of nine equal ones, some is
"told apart" from the best one time in eight by Holm over eight). So the chance of *any* false verdict is 5% at most. The
top group is the best and whatever is not shown to differ from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tiltlm.ruler.compare import LEVEL, Difference, difference_of, holm
from tiltlm.ruler.estimate import mean
from tiltlm.ruler.intervals import Interval, of_mean


@dataclass(frozen=True)
class Standing:
    """One model among several.

    value      its mean over questions
    interval   of the value alone, 95%: Wilson's of a rate
    behind     value − the best one's, paired, p adjusted for all pairs; None for the best itself
    top        whether it is the best or not shown to differ from it
    """

    name: str
    value: float
    interval: Interval
    behind: Difference | None
    top: bool


def standings(values: Mapping[str, Tensor], metric: str = "accuracy") -> list[Standing]:
    """The models from the best down; values: name -> [n], one observation a question, the same questions in one order.

    Larger is better. Of 0 and 1 pairs are tested by exact McNemar, of averages by Student's t over questions. Raises
    ValueError for observations of different lengths.
    """
    order = sorted(values, key=lambda name: -float(values[name].double().mean()))
    pairs = list(itertools.combinations(order, 2))
    found = holm([difference_of(metric, values[worse], values[better]) for better, worse in pairs])
    behind = {worse: each for (better, worse), each in zip(pairs, found, strict=True) if better == order[0]}
    return [_standing(name, values[name], behind.get(name)) for name in order]


def _standing(name: str, x: Tensor, behind: Difference | None) -> Standing:
    return Standing(name, mean(x).value, of_mean(x, rate=True), behind, behind is None or not behind.p <= LEVEL)
