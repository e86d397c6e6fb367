"""Online methods side by side at equal draws: the table of docs/methods/online.md.

    python bench/online_methods.py --jobs 2                      all tasks, three seeds; what is done is found again
    python bench/online_methods.py --tasks animals --seeds 1     a part of it
    python bench/online_methods.py --page                        the tables from the runs there are

Every method draws `rows` completions a step, `steps` times, at one learning rate a task; all else is its default. Methods
on groups of K learn from rows / K of them. Means over seeds, ± one standard error between them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tiltlm.commands.launch.building import build_all
from tiltlm.commands.launch.settings import Launch
from tiltlm.commands.process import prepare, runs_root
from tiltlm.feeds import Feed
from tiltlm.fit import Fit
from tiltlm.jsonl import read_json
from tiltlm.methods import method
from tiltlm.mistakes import MISTAKES, one_line
from tiltlm.progress import note
from tiltlm.recipes import preset_of
from tiltlm.recipes.stages import measured
from tiltlm.ruler.estimate import mean
from tiltlm.run import Run, ensure, find
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import Measure

METHODS = (
    "rloo", "ppo", "grpo", "dr-grpo", "dr-grpo-kl", "dapo", "gspo", "cispo", "opo", "opo-sampled", "opo-hard", "online-ipo",
    "online-exo", "online-dpo-rw", "rebel", "log-variance", "trajectory-balance", "trajectory-balance-learnt", "a-star-po",
)  # fmt: skip
GROUP = 4
"""Completions of a prompt in a step; those of methods on groups are all in one, but pairs are two."""

METRICS = {
    "reward": "E[r]", "kl_to_reference": "KL(q‖ref)", "kl_to_target": "KL(q‖pi*)", "kl_from_target": "KL(pi*‖q)",
    "objective": "J",
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """How much each method draws, and how fast it learns."""

    rows: int
    steps: int
    lr: float


TASKS = {
    "tree": Budget(64, 500, 0.03),
    "animals": Budget(64, 100, 1e-4),
    "sums-small": Budget(64, 100, 2e-4),
    "star-graph": Budget(64, 400, 3e-4),
    "dialogues": Budget(64, 100, 1e-4),
    "math-small": Budget(64, 100, 1e-4),
}


ESTIMATED = ("dialogues", "math-small")
"""Where log Z is estimated, of 64 prompts, by 2000 draws of the reference for each."""


def variant(name: str) -> Any:
    """The method of a row of the table."""
    base, _, labels = name.partition("-") if name.startswith("opo-") else (name, "", "")
    found: Any = method(base)
    return replace(found, labels=labels) if labels else found


def made(task: str, name: str, seed: int) -> Measure:
    """The recipe that measures a method on a task at the task's budget."""
    preset, how, chosen = preset_of(task), TASKS[task], variant(name)
    called = name.removesuffix("-sampled").removesuffix("-hard")
    recipe = measured(preset, called)
    one = preset.task.facts().prompts == "one"
    pairs, groups = (
        chosen.fed == "pairs" or name.startswith(("opo", "online-ipo", "rebel")),
        chosen.fed == "groups",
    )
    size = 2 if pairs else GROUP
    rows = how.rows // size if groups or pairs else how.rows
    n = 0 if one else GROUP // size if groups or pairs else GROUP
    fit = Fit(lr=how.lr, steps=how.steps, batch_size=rows, decay="none", warmup=5)
    if task in ESTIMATED:
        ruler = replace(recipe.ruler, prompts=64, n=8, absolute=True)
        recipe = replace(recipe, ruler=ruler, log_z=LogZSettings(by="reference", draws=2000, prompts=64))
    return replace(
        recipe, method=chosen, feed=Feed(size=size, n=n), fit=fit, net=replace(recipe.net, policy="full"), called=called,
        seed=seed, ruler=replace(recipe.ruler, checkpoints=1, also=()),
    )  # fmt: skip


def reference(task: str, seed: int) -> Measure:
    """The recipe that measures the reference, by the same ruler."""
    like = made(task, "rloo", seed)
    return replace(measured(preset_of(task), "reference"), seed=seed, ruler=like.ruler, log_z=like.log_z)


def build(tasks: Sequence[str], names: Sequence[str], seeds: int, jobs: int) -> None:
    """Train and measure what is not there yet; what fails is said, and the rest goes on."""
    for seed in range(seeds):
        for task in tasks:
            command = f"python bench/online_methods.py --tasks {task}"
            recipes = [made(task, name, seed) for name in names]
            recipes.append(reference(task, seed))
            for each in recipes:
                try:
                    build_all([find(each, runs_root())], Launch(jobs=jobs), command)
                    ensure(each, runs_root(), command)
                except MISTAKES as error:
                    note(f"[red]{task}/{each.called}, seed {seed}: {one_line(error)}[/]")


def line(name: str, runs: Sequence[Run[Any]]) -> str:
    """A row of the table: means over the seeds that there are."""
    reports = [read_json(run.folder / "report.json") for run in runs]
    cells = []
    for metric in METRICS:
        own = [
            r["value"]
            for rows in reports
            for r in rows
            if (r["method"], r["metric"]) == (runs[0].recipe.called, metric)
        ]
        e = mean(torch.tensor(own, dtype=torch.float64)) if len(own) == len(runs) else None
        cells.append("" if e is None else f"{e.value:.3f}" + (f" ± {e.stderr:.3f}" if e.stderr > 0 else ""))
    return f"| {name} | " + " | ".join(cells) + f" | {len(runs)} |"


def page(tasks: Sequence[str], names: Sequence[str], seeds: int) -> list[str]:
    """The tables, in Markdown."""
    out: list[str] = []
    for task in tasks:
        how, lines = TASKS[task], []
        for name in ("reference", *names):
            recipes = [made(task, name, s) if name != "reference" else reference(task, s) for s in range(seeds)]
            done = [run for run in (find(each, runs_root()) for each in recipes) if run.done]
            lines += [line(name, done)] if done else []
        head = "| method | " + " | ".join(METRICS.values()) + " | seeds |"
        said = f"{how.steps} steps of {how.rows} completions, learning rate {how.lr:g}."
        out += [f"### {task}", "", said, "", head, "|---|" + "--:|" * (len(METRICS) + 1), *lines, ""]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--page", action="store_true", help="build nothing")
    args = parser.parse_args()
    prepare()
    if not args.page:
        build(args.tasks, args.methods, args.seeds, args.jobs)
    print("\n".join(page(args.tasks, args.methods, args.seeds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
