"""Curves for the report page: metrics.jsonl and evals.jsonl of a training, curve.json of a measurement, thinned to what a
picture shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltlm.jsonl import read_json, read_rows

POINTS = 120
"""Points of a curve, at most: each is the mean of the steps it stands for."""

Curve = list[list[float]]


def curves(folder: Path) -> dict[str, Curve]:
    """Metric -> [[step, value], …] of a training run, those of evals.jsonl as "on the way: …", and of a measurement of
    several checkpoints as "measured: …"; {} without any."""
    found: dict[str, Curve] = {}
    for name, before in (("metrics.jsonl", ""), ("evals.jsonl", "on the way: ")):
        if (folder / name).is_file():
            rows = list(read_rows(folder / name, ()))
            found |= {before + metric: thinned(points) for metric, points in by_metric(rows).items()}
    return found | measured(folder / "curve.json")


def measured(path: Path) -> dict[str, Curve]:
    """The measurements of one method's checkpoints against updates; {} without, and for a comparison of several."""
    rows = read_json(path) if path.is_file() else []
    if len({row["method"] for row in rows}) != 1:
        return {}
    points = [{"step": row["updates"], f"measured: {row['metric']}": row["value"]} for row in rows]
    return by_metric(points)


def by_metric(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Rows {step, metric: value, …} as a list of [step, value] for every metric; what is no finite number is left out."""
    found: dict[str, Curve] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and _is_number(value) and _is_number(row.get("step")):
                found.setdefault(name, []).append([row["step"], value])
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def thinned(points: Curve) -> Curve:
    """At most POINTS points: means over equally many steps each."""
    size = math.ceil(len(points) / POINTS)
    parts = [points[k : k + size] for k in range(0, len(points), size)] if points else []
    return [[part[-1][0], float(f"{sum(y for _, y in part) / len(part):.5g}")] for part in parts]
