"""Report rows as a table for people: one line per method, metrics across."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from tiltlm.jsonl import read_json
from tiltlm.ruler.agreement import possible
from tiltlm.ruler.estimate import Estimate, mean

HEADINGS = {
    "accuracy": "accuracy",
    "valid_rate": "valid arms",
    "reward": "E[r]",
    "kl_to_reference": "KL(q‖ref)",
    "kl_to_reference_at_most": "KL(q‖ref) ≤",
    "kl_to_target": "KL(q‖pi*)",
    "kl_to_target_at_least": "KL(q‖pi*) ≥",
    "kl_to_target_at_most": "KL(q‖pi*) ≤",
    "kl_from_target": "KL(pi*‖q)",
    "objective_gap": "J(pi*) − J(q)",
    "objective_at_least": "J(q) ≥",
    "labels": "labels bought",
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
    """value ± one standard error; an interval, or one end of it, where that says more; a dash where nothing was measured.

    Never a certainty that draws do not give: a rate of 1 in 1000 is "1.000 (≥ 0.996)", a number of a single draw "0.5 ±
    ?", of draws that are all alike "0.5 (all alike)". A star: the row has a doubt (`doubts`).
    """
    if row is None:
        return "–"
    return _plain(row) + ("*" if row.get("doubt") and _starred(row) else "")


def _plain(row: Mapping[str, Any]) -> str:
    value, stderr, low, high = row["value"], row["stderr"], row.get("low"), row.get("high")
    if row.get("unit") in COUNTS:
        return f"{value:.0f}"
    if "gap" in row:  # log Z is known less well than the distance: only the interval means something
        return f"[{_end(low)}, {_end(high)}]"
    if row.get("interval") == "none":
        return f"{value:.3f} ± ?" if row["n"] == 1 else f"{value:.3f} (all alike)"
    end, sign = (low, "≥") if value > 0.5 else (high, "≤")
    if (
        row.get("unit") == "rate"
        and end is not None
        and not (stderr or 0) >= 5e-4
        and f"{end:.3f}" != f"{value:.3f}"
    ):
        return f"{value:.3f} ({sign} {end:.3f})"
    if not (stderr or 0) > 0:
        return f"{value:.3f}"
    if stderr < 5e-5:
        return f"{value:.4f} ± <0.0001"
    digits = 3 if stderr >= 5e-4 else 4
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def _end(x: float | None) -> str:
    return "?" if x is None else f"{x:.3f}"


def _starred(row: Mapping[str, Any]) -> bool:
    """Whether the doubt is not plain to see in the cell itself."""
    return row.get("interval") != "none"


def doubts(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line for under a table: what the stars in it mean; empty where there is none."""
    found = dict.fromkeys(row["doubt"] for row in rows if row.get("doubt") and _starred(row))
    return "* its 95% interval may not hold: " + "; ".join(found) if found else ""


def reach(row: Mapping[str, Any]) -> list[list[float]]:
    """How far the 95% interval of a row goes below and above its value, as [[below], [above]] for error bars."""
    wide = 1.96 * (row["stderr"] or 0.0)
    low, high = (row["value"] + s * wide if row.get(e) is None else row[e] for e, s in (("low", -1), ("high", 1)))
    return [[max(0.0, row["value"] - low)], [max(0.0, high - row["value"])]]


def table(rows: Sequence[Mapping[str, Any]], title: str = "", headings: Mapping[str, str] = HEADINGS) -> Table:
    """One line per method (in the order of first appearance), the metrics of `headings` that any row has.

    Rows with none of those metrics are shown with all they have. Raises ValueError for a KL below 0 beyond chance.
    """
    if not any(row["metric"] in headings for row in rows):
        headings = {row["metric"]: row["metric"] for row in rows}
    present = [name for name in headings if any(row["metric"] == name for row in rows)]
    shown = [possible(row) for row in rows if row["metric"] in present]
    below = doubts(shown)
    out = Table(
        title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, caption=below or None,
        caption_justify="left", min_width=min(len(below), 100) or None,
    )  # fmt: skip
    out.add_column("method", no_wrap=True)
    for name in present:
        out.add_column(escape(headings[name]), justify="right", no_wrap=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["metric"]: row for row in rows if row["method"] == method}
        out.add_row(escape(method), *(cell(found.get(name)) for name in present))
    return out


ALONG = ("reward", "kl_to_reference", "objective")
"""Metrics of a curve's table."""


def curve_table(curve: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """One line per checkpoint of a measurement's curve, by updates: E[r], KL to the reference, J, with standard errors."""
    out = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    headings = HEADINGS | {"objective": "J(q)"}
    for name in ("updates", *(headings[each] for each in ALONG)):
        out.add_column(escape(name), justify="right", no_wrap=True)
    for updates in sorted({row["updates"] for row in curve}):
        found = {row["metric"]: possible(row) for row in curve if row["updates"] == updates}
        out.add_row(str(updates), *(cell(found.get(name)) for name in ALONG))
    return out


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same method and metric averaged over seeds.

    n is the number of seeds, stderr the spread over them, low to high Student's 95% interval. Where log Z is only
    bracketed (`gap`), low and high are Student's outer ends of the mean lower and the mean upper end, and the gap stays.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["metric"]), []).append(row)
    return [_merged(members) for members in groups.values()]


OF_ONE_SEED = ("gap", "stderr_log_z", "seed", "low", "high", "interval", "doubt", "certified")


def _merged(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    estimate = _over(members, "value")
    one = {name: x for name, x in members[0].items() if name not in OF_ONE_SEED}
    out = {**one, "value": estimate.value, "stderr": estimate.stderr, "n": estimate.n}
    if any("gap" in row for row in members):
        known = [row for row in members if row.get("low") is not None and row.get("high") is not None]
        ends = [_over(known, end).interval()[k] if known else math.nan for k, end in enumerate(("low", "high"))]
        out["gap"] = max(row.get("gap", 0.0) for row in members)
    else:
        ends = list(estimate.interval())
    low, high = (end if math.isfinite(end) else None for end in ends)
    if estimate.n == 1:
        return {**out, "stderr": None, "low": None, "high": None, "interval": "none", "doubt": "one seed"}
    alike = estimate.stderr == 0 and members[0].get("interval") not in (None, "exact")
    kind = {"interval": "none", "doubt": "all seeds alike"} if alike else {"interval": "Student's t"}
    return {**out, "low": None if alike else low, "high": None if alike else high, **kind}


def _over(members: Sequence[Mapping[str, Any]], name: str) -> Estimate:
    return mean(torch.tensor([row[name] for row in members], dtype=torch.float64))
