"""Report rows as a table for people: one line per method, metrics across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from tiltlm.jsonl import read_json
from tiltlm.ruler.estimate import Estimate, mean

HEADINGS = {
    "accuracy": "accuracy",
    "valid_rate": "valid arms",
    "reward": "E[r]",
    "kl_to_reference": "KL(q‖ref)",
    "kl_to_target": "KL(q‖pi*)",
    "kl_to_target_at_least": "KL(q‖pi*) ≥",
    "kl_from_target": "KL(pi*‖q)",
    "objective_gap": "J(pi*) − J(q)",
}
"""Metrics of the standard table, in its order, and what stands over them."""


COUNTS = {"rows", "updates"}
"""Units of whole numbers."""


REPORT: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "metric": str,
    "value": (int, float),
    "n": (int, float),
}
"""What every row of a report has, and what that is."""


def read_report(path: Path) -> list[dict[str, Any]]:
    """The rows of a report.json. Raises ValueError, naming the file, where they are none."""
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: a report is a list of rows; {ANEW}")
    for k, row in enumerate(rows, 1):
        for name, kind in REPORT.items():
            if not isinstance(row.get(name), kind):
                raise ValueError(f"{path}: {name!r} of row {k} is {row.get(name)!r:.40}; {ANEW}")
        if bad := [name for name in ("stderr", "low", "high", "gap") if not _number_or_none(row.get(name))]:
            raise ValueError(f"{path}: {bad[0]!r} of row {k} is {row[bad[0]]!r:.40}; {ANEW}")
    return rows


ANEW = "remove the run's folder, and the same command builds it again"


def _number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def cell(row: Mapping[str, Any] | None) -> str:
    """value ± stderr, or a dash where nothing was measured."""
    if row is None:
        return "–"
    if "gap" in row:  # log Z is known less well than the distance: only the interval means something
        return f"[{row['low']:.3f}, {row['high']:.3f}]"
    if row.get("unit") in COUNTS:
        return f"{row['value']:.0f}"
    value = f"{row['value']:.3f}"
    return value if not (row["stderr"] or 0) > 0 else f"{value} ± {row['stderr']:.3f}"


def table(rows: Sequence[Mapping[str, Any]], title: str = "", headings: Mapping[str, str] = HEADINGS) -> Table:
    """One line per method (in the order of first appearance), the metrics of `headings` that any row has.

    Rows with none of those metrics are shown with all they have.
    """
    if not any(row["metric"] in headings for row in rows):
        headings = {row["metric"]: row["metric"] for row in rows}
    present = [name for name in headings if any(row["metric"] == name for row in rows)]
    out = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    out.add_column("method", no_wrap=True)
    for name in present:
        out.add_column(escape(headings[name]), justify="right", no_wrap=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["metric"]: row for row in rows if row["method"] == method}
        out.add_row(escape(method), *(cell(found.get(name)) for name in present))
    return out


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same method and metric averaged over seeds.

    n is the number of seeds, stderr the spread over them, low to high Student's 95% interval. Where log Z is only
    bracketed (`gap`), low and high are the mean ends instead, and the gap stays.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["metric"]), []).append(row)
    return [_merged(members) for members in groups.values()]


def _merged(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    estimate = _over(members, "value")
    one = {name: x for name, x in members[0].items() if name not in ("gap", "stderr_log_z", "seed")}
    (low, high) = estimate.interval()
    out = {**one, "value": estimate.value, "stderr": estimate.stderr, "n": estimate.n, "low": low, "high": high}
    if any("gap" in row for row in members):
        ends = {name: _over(members, name).value for name in ("low", "high")}
        return {**out, **ends, "gap": max(row.get("gap", 0.0) for row in members)}
    return out


def _over(members: Sequence[Mapping[str, Any]], name: str) -> Estimate:
    return mean(torch.tensor([row[name] for row in members], dtype=torch.float64))
