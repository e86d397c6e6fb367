"""What cannot be is an error, not a result: a KL below 0, exact draws whose rewards are not those of pi*."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from tiltlm.ruler.estimate import Estimate
from tiltlm.ruler.student import errors

DIVERGENCES = {"kl_to_reference", "kl_to_target", "kl_from_target", "objective_gap"}
"""Metrics that are at least 0 by mathematics; an estimate of them may be below within its error."""

R = TypeVar("R", bound=Mapping[str, Any])


def possible(row: R) -> R:
    """`row` as it is. Raises ValueError for a divergence that lies below 0 by more than three errors, log Z's included."""
    value, stderr = row["value"], row["stderr"]
    if row["metric"] not in DIVERGENCES or stderr is None or not value < 0:
        return row
    below = row.get("high")
    beyond = value + errors(3, max(row["n"] - 1, 1)) * stderr < -1e-3
    if beyond and (below is None or below < 0):
        raise ValueError(
            f"{row['metric']} of {row['method']} is {value:.4f} ± {stderr:.4f}, but a KL cannot be below 0: the exact "
            "draws or the log Z belong to another target (beta, reward, reference, prompt), or log Z is wrong; measure "
            "again with a log Z by bounds and exact draws of this very target"
        )
    return row


def refuse_disagreement(exact: Estimate, weighted: Estimate, spread: float) -> None:
    """Raise ValueError where E[r] under pi* by exact draws and by weighted ones of one target differ by more than four
    errors.

    spread: the standard deviation of r under pi* by the weighted draws. Few exact draws may miss a rare low reward, and
    their own spread with it.
    """
    stderr = math.hypot(max(exact.stderr, spread / math.sqrt(exact.n)), weighted.stderr)
    if exact.n < 2 or weighted.n < 2 or not math.isfinite(stderr):
        return
    apart = abs(exact.value - weighted.value)
    if apart > errors(4, min(exact.n, weighted.n) - 1) * stderr + 1e-3 * max(1.0, abs(exact.value)):
        raise ValueError(
            f"E[r] under pi* is {exact} by the exact draws and {weighted} by weighted ones: one of the two is not of this "
            "target. Draw the exact draws again for this beta, reward, reference and prompt"
        )
