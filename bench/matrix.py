"""Every method on some tasks, measured, and the page docs/matrix.md with it.

    python bench/matrix.py --jobs 2                     the whole page: hours of one core; what is done is found again
    python bench/matrix.py --tasks animals --seeds 1    a part of it, printed
    python bench/matrix.py --page                       the page anew from the runs there are

A cell that makes no sense has its reason in the page. CPU-seconds are those of training and measuring, without what all
methods of a task share (reference, reward model, draws, exact draws, log Z).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tiltlm.commands.launch.building import build_all
from tiltlm.commands.launch.settings import Launch
from tiltlm.commands.process import prepare, runs_root
from tiltlm.jsonl import read_json
from tiltlm.methods import names
from tiltlm.mistakes import MISTAKES, one_line
from tiltlm.progress import note
from tiltlm.recipes import preset_of
from tiltlm.recipes.stages import measured
from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.run import Run, ensure, find
from tiltlm.stages.measure import Measure

PAGE = Path(__file__).resolve().parents[1] / "docs" / "matrix.md"
MEASURED = {"animals": (0, 1, 2), "star-graph": (0,), "dialogues": (0,), "hh-small": (0,)}
"""The tasks of the page, and from which seeds each method is trained."""

METRICS = {
    "kl_to_target": "KL(q‖pi*)", "kl_to_target_at_least": "KL(q‖pi*) ≥", "kl_to_target_at_most": "KL(q‖pi*) ≤",
    "kl_to_reference": "KL(q‖ref)", "reward": "E[r]", "objective": "J",
}  # fmt: skip


def cells(task: str, seeds: Iterable[int]) -> dict[str, list[Measure] | str]:
    """method -> the recipes that measure it, one a seed; or why it cannot be used."""
    from dataclasses import replace

    found: dict[str, list[Measure] | str] = {}
    for name in names():
        value = measured(preset_of(task), name)
        why = value.cell.why_not(value.task.facts())
        found[name] = why or [replace(value, seed=seed) for seed in seeds]
    return found


def build(tasks: Iterable[str], seeds: int, jobs: int) -> None:
    """Train and measure everything that is not there yet; what fails is said, and the rest goes on."""
    for task in tasks:
        command = f"python bench/matrix.py --tasks {task}"
        for name, recipes in cells(task, MEASURED[task][:seeds]).items():
            for each in recipes if isinstance(recipes, list) else ():
                try:
                    build_all([find(each, runs_root())], Launch(jobs=jobs), command)
                    ensure(each, runs_root(), command)
                except MISTAKES as error:
                    note(f"[red]{task}/{name}: {one_line(error)}[/]")


def numbers(runs: list[Run[Any]]) -> dict[str, Estimate]:
    """The metrics of a cell: of one seed with its error over prompts, of several with that over seeds."""
    rows = [[r for r in read_json(run.folder / "report.json") if r["method"] == run.recipe.called] for run in runs]
    found: dict[str, Estimate] = {}
    import torch

    for metric in METRICS:
        own = [row for report in rows for row in report if row["metric"] == metric]
        if len(own) == len(runs) == 1:
            found[metric] = Estimate(own[0]["value"], own[0]["stderr"] or 0.0, own[0]["n"])
        elif own and len(own) == len(runs):
            found[metric] = mean(torch.tensor([row["value"] for row in own]))
    return found


def cost(runs: list[Run[Any]]) -> str:
    """CPU-seconds of training and measuring, mean over seeds; empty where some run noted none."""
    own = [[run, *([run.inputs["learnt"]] if "learnt" in run.inputs else [])] for run in runs]
    took = [read_json(r.folder / "provenance.json").get("cpu_seconds") for some in own for r in some]
    return "" if None in took else f"{sum(took) / len(runs):.0f}"


def shown(e: Estimate | None) -> str:
    return "" if e is None else f"{e.value:.3f}" + (f" ± {e.stderr:.3f}" if e.stderr > 0 else "")


def section(task: str) -> list[str]:
    """A task's table, of what there is; nothing where nothing was run."""
    lines = []
    for name, recipes in cells(task, MEASURED[task]).items():
        runs = [find(each, runs_root()) for each in recipes] if isinstance(recipes, list) else []
        done = [run for run in runs if run.done]
        if done:
            values = numbers(done)
            shown_values = " | ".join(shown(values.get(m)) for m in METRICS)
            lines.append(f"| {name} | {shown_values} | {cost(done)} | {len(done)} |")
        elif runs:
            lines.append(f"| {name} | not run |" + " |" * (len(METRICS) + 1))
    if not any("not run" not in line for line in lines):
        return []
    head = "| method | " + " | ".join(METRICS.values()) + " | CPU-s | seeds |"
    return [f"## {task}", "", LINES[task], "", head, "|---|" + "--:|" * (len(METRICS) + 2), *lines, ""]


LINES = {
    "animals": "Stories with animals, 12 tokens behind one prompt, beta 1; log Z by 40,000 draws of the reference.",
    "star-graph": "The walker on G(2,3), beta 0.1, 1000 test graphs; log Z exact.",
    "dialogues": "Dialogues of the project's own making, their reward model, beta 0.5, 128 test prompts; no log Z.",
    "hh-small": "Anthropic's HH with the 260K stories model and a reward model, beta 0.05, 128 test prompts; no log Z.",
}


def grid(tasks: Iterable[str]) -> list[str]:
    """Which cells there are: ✓, or the number of the reason below."""
    reasons: dict[str, int] = {}
    out = ["| method | " + " | ".join(tasks) + " |", "|---|" + ":-:|" * len(list(tasks))]
    made = {task: cells(task, (0,)) for task in tasks}
    for name in names():
        marks = []
        for task in tasks:
            found = made[task][name]
            marks.append(str(reasons.setdefault(found, len(reasons) + 1)) if isinstance(found, str) else "✓")
        out.append(f"| {name} | " + " | ".join(marks) + " |")
    return [*out, "", *[f"{k}. {why}" for why, k in reasons.items()], ""]


INTRO = """\
# Every task × every method

Written by `python bench/matrix.py`. A ✓ means that `tiltlm run TASK/METHOD` trains and measures it (a test walks all
cells at toy size); a number is the reason below why it does not. The tables behind it are at `-small` size on two CPU
cores: what each method reached with the settings it has by default, which no one tuned for most of them. ± is one
standard error: over prompts (or draws) of one trained model, over seeds where there are several. CPU-s: training and
measuring, without what all share; empty where the run noted none.
"""


def page(all_tasks: list[str]) -> str:
    """The page's text."""
    parts = [INTRO, "\n".join(grid(all_tasks)), *("\n".join(section(task)) for task in MEASURED)]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(MEASURED), choices=list(MEASURED))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    prepare()
    if not args.page:
        build(args.tasks, args.seeds, args.jobs)
    from tiltlm.recipes import tasks

    PAGE.write_text(page(list(tasks())), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
