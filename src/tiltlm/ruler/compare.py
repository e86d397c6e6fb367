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


WITHOUT_LOG_Z = {
    "kl_to_target": ("log_w", -1),
    "kl_from_target": ("log_w_exact", 1),
    "objective_gap": ("objective", -1),
}
"""KL(q‖pi*) = log Z − F and KL(pi*‖q) = G − log Z: their differences are those of F and G, whatever log Z was used."""


def paired(first: Measurement, second: Measurement) -> list[Difference]:
    """Differences of every metric both measurements have, paired by prompt (of a single prompt, draw by draw).

    Distances are compared without any log Z. Raises ValueError unless they measured equally many prompts.
    """
    shared = [name for name in first.values if name in second.values]
    if not shared:
        raise ValueError("these measurements share no metric")
    found = []
    for name in shared:
        source, sign = WITHOUT_LOG_Z.get(name, (name, 1))
        if source not in shared:
            source, sign = name, 1
        one, other = first.values[source], second.values[source]
        if len(one) != len(other):
            raise ValueError(f"paired comparison needs the same prompts; got {len(one)} and {len(other)} of them")
        if len(one) > 1:
            found.append(Difference(name, mean(sign * (one - other))))
    return found
