"""Two methods on the same prompts: compare differences, not intervals.

The difference of two KLs to pi* needs no log Z (it cancels prompt by prompt), and pairing by prompt takes the
prompts' own spread out of the error. When the interval of a difference covers 0, the methods are not called
different.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.ruler.measure import Measurement


@dataclass(frozen=True)
class Difference:
    """first − second of one metric, paired by prompt."""

    metric: str
    estimate: Estimate

    @property
    def verdict(self) -> str:
        """'higher', 'lower', or 'no difference shown' at 95% (1.96 standard errors)."""
        e = self.estimate
        if e.stderr == 0:
            return "no difference shown" if e.value == 0 else ("higher" if e.value > 0 else "lower")
        if not abs(e.value) > 1.96 * e.stderr:
            return "no difference shown"
        return "higher" if e.value > 0 else "lower"


def paired(first: Measurement, second: Measurement) -> list[Difference]:
    """Differences of every metric both measurements have, paired by prompt (of a single prompt, draw by draw).

    The common log Z cancels. Raises ValueError unless they measured equally many prompts.
    """
    shared = [name for name in first.values if name in second.values]
    if not shared:
        raise ValueError("these measurements share no metric")
    for name in shared:
        sizes = len(first.values[name]), len(second.values[name])
        if sizes[0] != sizes[1]:
            raise ValueError(f"paired comparison needs the same prompts; got {sizes[0]} and {sizes[1]} of them")
    several = [name for name in shared if len(first.values[name]) > 1]
    return [Difference(name, mean(first.values[name] - second.values[name])) for name in several]
