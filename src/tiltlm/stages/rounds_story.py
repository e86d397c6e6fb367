"""What a chain of rounds came to: one line a round, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiltlm.jsonl import read_json
from tiltlm.ruler.plots import rounds_plot
from tiltlm.ruler.table import cell, read_report
from tiltlm.run import Run
from tiltlm.stages.answers import GREEDY, OVER
from tiltlm.stages.reporting import Row, estimate
from tiltlm.stages.rounds import told

STORY, PICTURE = "rounds.json", "rounds.png"

FROM = ("train_accuracy", "always_right", "sometimes_right", "never_right", "rows")
"""What a round learnt from: drawn by the policy that the round before ended with, and told of that one."""

COLUMNS = {
    "train_accuracy": "right, drawn", "always_right": "always", "sometimes_right": "some", "never_right": "never",
    "rows": "rows", "accuracy[greedy]": "right, greedy", "accuracy[greedy, always right]": "of always right",
    "reward": "E[r]", "kl_to_reference": "KL(q‖ref)", "kl_to_target": "KL(q‖pi*)", "kl_from_target": "KL(pi*‖q)",
    "objective": "J",
}  # fmt: skip
"""Of a policy: its draws for training prompts, how many are right, of how many prompts all, some, none, and how many rows
the next round built of them; its greedy answers to validation prompts; the ruler, on test prompts."""


def write_story(run: Run[Any], curve: Sequence[Row], title: str) -> None:
    """rounds.json: every number with its round, the reference's under 0; rounds.png."""
    last = run.inputs["learnt"]
    rows = [*at_start(last), *told(last), *(row for row in curve if "round" in row)]
    run.write_json(STORY, rows)
    if any(row["round"] > 0 for row in curve):
        rounds_plot(rows, run.folder / PICTURE, f"{title}: {run.recipe.called}, round by round")


def at_start(last: Run[Any]) -> list[Row]:
    """The reference's greedy answers to validation prompts."""
    import torch

    if "valid" not in last.inputs:
        return []
    hit = torch.tensor(read_json(last.inputs["valid"].folder / GREEDY), dtype=torch.float64)
    return [estimate(last.recipe, "reference", "accuracy[greedy]", hit) | {"round": 0}]


def show_story(run: Run[Any]) -> None:
    """The table of rounds, why they ended early, and where the picture is."""
    rows = read_report(run.folder / STORY)
    present = [name for name in COLUMNS if any(row["metric"] == name for row in rows)]
    out = Table(title=f"{run.recipe.name}: round by round", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("round", *(COLUMNS[each] for each in present)):
        out.add_column(escape(name), justify="right", no_wrap=True)
    told = [row | {"round": row["round"] - (row["metric"] in FROM)} for row in rows]
    for number in sorted({row["round"] for row in told if row["metric"] in present}):
        found = {row["metric"]: row for row in told if row["round"] == number}
        out.add_row(str(number), *(cell(found.get(name)) for name in present))
    Console(width=170, highlight=False).print(out)
    over = run.inputs["learnt"].folder / OVER
    if over.is_file():
        print(f"ended after {read_json(over)['why']}")
    if (run.folder / PICTURE).is_file():
        print(f"picture: {run.folder / PICTURE}")
