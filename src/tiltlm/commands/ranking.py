"""Several finished measurements over the same questions, by accuracy: the table a sweep ends in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from tiltlm.commands.compare import p_shown
from tiltlm.commands.observed import Observed, of_runs, shared
from tiltlm.progress import note
from tiltlm.ruler.standing import Standing, standings
from tiltlm.run import Run

ACCURACIES = ("accuracy", "reward")
"""Metrics that are shares of right answers where they lie between 0 and 1, the first that all have."""


def ranked(runs: Sequence[tuple[Run[Any], str]]) -> Table | None:
    """The table of (run, what to call it); None where there are fewer than two, of several seeds (their
    worlds may differ, and their trainings do), or where not all measured an accuracy.

    Runs that share no question are not ranked, and that is said.
    """
    if len(runs) < 2 or len({run.recipe.seed for run, _ in runs}) > 1:
        return None
    found = of_runs([run for run, _ in runs])
    if _accuracy(found) is None:
        return None
    try:
        joined = shared(found)
    except ValueError as error:
        note(f"not ranked: {error}")
        return None
    metric = _accuracy(joined)
    if metric is None:
        return None
    called = [name for _, name in runs]
    names = [name if called.count(name) == 1 else f"{name} [{run.key}]" for run, name in runs]
    values = {name: each.measurement.values[metric] for name, each in zip(names, joined, strict=True)}
    return _table(standings(values, metric), f"{len(joined[0].questions):,} shared {joined[0].unit}")


def _accuracy(found: Sequence[Observed]) -> str | None:
    """The metric to rank by."""

    def is_share(x: Tensor | None, n: int) -> bool:
        return x is not None and len(x) == n and bool(((x >= 0) & (x <= 1)).all())

    for name in ACCURACIES:
        if all(is_share(each.measurement.values.get(name), len(each.questions)) for each in found):
            return name
    return None


def _table(found: Sequence[Standing], on: str) -> Table:
    title = f"by accuracy on {on} (p by Holm over all pairs; *: the top group)"
    out = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    out.add_column("")
    out.add_column("method", overflow="fold")
    for heading in ("accuracy", "95% interval", "less the best", "p", "would show"):
        out.add_column(heading, justify="right", no_wrap=True)
    for each in found:
        behind = each.behind
        out.add_row(
            "*" if each.top else "",
            escape(each.name),
            f"{each.value:.4f}",
            f"{each.interval.low:.4f} to {each.interval.high:.4f}",
            "–" if behind is None else f"{behind.estimate.value:+.4f} ± {behind.estimate.stderr:.4f}",
            "–" if behind is None else p_shown(behind.p),
            "–" if behind is None else f"{behind.least:.4f}",
        )
    return out
