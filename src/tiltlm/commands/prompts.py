"""A method prompt by prompt: how a metric spreads over prompts, and on which prompts it is worst.

A mean over prompts hides them: a policy can be near pi* on most prompts and nats away on a few. A prompt's number is
itself a mean over its few draws, so the extremes are partly luck: read the hardest prompts as places to look, not as
estimates.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from tiltlm.commands.compared import SHOWN, Contestant
from tiltlm.jsonl import read_rows
from tiltlm.ruler.measure import Measurement
from tiltlm.run import Run

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
FAR_IS_BAD = (
    "kl_to_target", "kl_to_target_at_least", "kl_to_target_at_most", "kl_from_target", "objective_gap", "kl_to_reference",
    "kl_to_reference_at_most",
)  # fmt: skip
"""Metrics that are worst where they are largest; of the others small is bad."""


def spread(found: Sequence[Contestant], metrics: Collection[str] = tuple(SHOWN)) -> Table:
    """Quantiles of every metric over prompts (over draws, where there is one prompt), a line each, of the first seed."""
    out = Table(title="over prompts", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in (
        "method",
        "metric",
        "n",
        *("least" if q == 0 else "most" if q == 1 else f"{q:.0%}" for q in QUANTILES),
    ):
        out.add_column(heading, justify="left" if heading in ("method", "metric") else "right")
    for each in found:
        for name, x in _values(first_run(each)).items():
            if name in metrics and name in SHOWN and len(x) > 1:
                cells = torch.quantile(x, torch.tensor(QUANTILES, dtype=x.dtype)).tolist()
                out.add_row(
                    escape(each.name), escape(SHOWN[name]), str(len(x)), *(f"{value:.3f}" for value in cells)
                )
    return out


def hardest(found: Sequence[Contestant], metrics: Collection[str], most: int) -> list[Table]:
    """For each contestant its `most` worst prompts by the first of `metrics` that it has, hardest first."""
    tables = []
    for each in found:
        run = first_run(each)
        values, prompts = _values(run), prompts_of(run)
        name = next((name for name in _ordered(metrics) if name in values), None)
        if name is None or len(prompts) < 2:  # of one prompt the numbers are draws
            continue
        order = values[name].argsort(descending=name in FAR_IS_BAD)[:most].tolist()
        title = f"{each.name}: worst by {SHOWN[name]}"
        made = Table(title=escape(title), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
        made.add_column("prompt", justify="right")
        made.add_column(escape(SHOWN[name]), justify="right")
        made.add_column("text", overflow="fold")
        for k in order:
            made.add_row(
                str(k),
                f"{float(values[name][k]):.3f}",
                escape(prompts[k][-300:] if k < len(prompts) else "(text not kept)"),
            )
        tables.append(made)
    return tables


def _ordered(metrics: Collection[str]) -> list[str]:
    """The metrics that say most of a prompt first: distance to pi*, then J."""
    first = [name for name in ("kl_to_target", "objective", "reward") if name in metrics]
    return first + [name for name in metrics if name not in first]


def first_run(each: Contestant) -> Run[Any]:
    """A contestant's run of its first seed."""
    return next(iter(each.runs.values()))


def _values(run: Run[Any]) -> dict[str, Tensor]:
    return dict(Measurement.load(run.folder / "measurement.safetensors").values)


def prompts_of(run: Run[Any]) -> list[str]:
    """The texts of a run's test prompts, in their order, as far as its samples.jsonl goes; [] without one."""
    path = run.folder / "samples.jsonl"
    if not path.is_file():
        return []
    return list(dict.fromkeys(str(row.get("prompt", "")) for row in read_rows(path, ())))
