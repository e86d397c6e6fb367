"""Report rows: {recipe, method, metric, value, stderr, n, unit, low, high, interval, seed}."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tiltlm.ruler.estimate import mean
from tiltlm.ruler.intervals import of_mean
from tiltlm.run import Recipe

Row = dict[str, Any]


def row(
    recipe: Recipe, method: str, metric: str, value: float, stderr: float | None = None, n: int = 1,
    unit: str = "rows", **more: Any,
) -> Row:  # fmt: skip
    """One line of a report."""
    head = {"recipe": recipe.name, "method": method, "metric": metric, "value": value}
    return {**head, "stderr": stderr, "n": n, "unit": unit, "seed": recipe.seed, **more}


def estimate(recipe: Recipe, method: str, metric: str, x: Tensor, unit: str = "rate") -> Row:
    """One line of a report: the mean of independent observations x [n], with its 95% interval."""
    e, own = mean(x), of_mean(x, unit == "rate")
    stderr = None if math.isnan(e.stderr) else e.stderr
    return row(recipe, method, metric, e.value, stderr, e.n, unit, **own.entries())
