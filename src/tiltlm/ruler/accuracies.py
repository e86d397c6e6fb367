"""Rows of exams as a table for people: one line per model and protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

BESIDE = {"parsed": "read", "finished": "ended"}
"""What stands beside an accuracy, and over its column."""


def accuracies(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """Accuracy with its 95% interval (Wilson's, of 0 and 1) and the number of questions; the shares of answers that could
    be read, and that ended by themselves; what the best constant answer gets."""
    out = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("model", "protocol", "split"):
        out.add_column(heading, no_wrap=True)
    for heading in ("n", "accuracy [95%]", *BESIDE.values(), "constant"):
        out.add_column(escape(heading), justify="right", no_wrap=True)
    for (method, split, _), own in _exams(rows).items():
        for protocol in dict.fromkeys(name.partition("[")[2][:-1] for name in own if name.startswith("accuracy[")):
            if protocol == "constant":
                continue
            right = own[f"accuracy[{protocol}]"]
            beside = [rate(own.get(f"{name}[{protocol}]")) for name in BESIDE]
            always = rate(own.get("accuracy[constant]"))
            out.add_row(escape(method), protocol, split, str(right["n"]), with_interval(right), *beside, always)
    return out


def _exams(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], dict[str, Mapping[str, Any]]]:
    """Rows by model and questions, then by metric."""
    found: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        exam = row["method"], row.get("split", ""), row.get("questions", "")
        found.setdefault(exam, {})[row["metric"]] = row
    return found


def with_interval(row: Mapping[str, Any]) -> str:
    """value [low, high]."""
    low, high = ("?" if row.get(end) is None else f"{row[end]:.4f}" for end in ("low", "high"))
    return escape(f"{row['value']:.4f} [{low}, {high}]")


def rate(row: Mapping[str, Any] | None) -> str:
    return "–" if row is None else f"{row['value']:.3f}"


def subjects(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """Accuracy by subject, the worst first."""
    out = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    out.add_column("subject")
    for heading in ("n", "accuracy [95%]"):
        out.add_column(escape(heading), justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: (row["value"], row["subject"])):
        out.add_row(escape(row["subject"] or "(none)"), str(row["n"]), with_interval(row))
    return out


def chosen_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """Accuracies by the number of draws and how one of them was chosen; rows have `draws` and `chosen`."""
    own = {(row["draws"], row["chosen"]): row for row in rows if "chosen" in row}
    ways, numbers = (list(dict.fromkeys(key[k] for key in own)) for k in (1, 0))
    out = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("draws", *ways):
        out.add_column(escape(str(heading)), justify="right", no_wrap=True)
    for n in numbers:
        found = [own.get((n, way)) for way in ways]
        out.add_row(str(n), *("–" if row is None else with_interval(row) for row in found))
    return out


SHARES = {
    "accuracy": "right [95%]", "always_right": "always", "sometimes_right": "some", "never_right": "never",
    "unanswered": "unanswered", "pairs": "pairs", "reward": "E[r]", "parsed": "read", "finished": "ended",
}  # fmt: skip
"""What is told of answers to many prompts, and over its column."""


def answers_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """How many answers are right; of how many prompts all, some, none are, and how many have none; the (right, wrong) pairs
    of one prompt; the mean reward; the shares of answers that could be read, and that ended by themselves."""
    own = {row["metric"]: row for row in rows}
    out = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    shown = [name for name in SHARES if name in own]
    for name in ("prompts", *(SHARES[name] for name in shown)):
        out.add_column(escape(name), justify="right", no_wrap=True)
    out.add_row(str(own["reward"]["n"]), *(_told(own[name]) for name in shown))
    return out


def _told(row: Mapping[str, Any]) -> str:
    if row["metric"] == "accuracy":
        return with_interval(row)
    return rate(row) if row["metric"] in ("reward", "parsed", "finished") else str(row["value"])
