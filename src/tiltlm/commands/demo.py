"""`tiltlm demo`: pre-train, seven roads, one ruler, on a laptop CPU."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from tiltlm.commands.options import parsed
from tiltlm.commands.process import prepare
from tiltlm.recipes import recipe
from tiltlm.ruler.table import read_report
from tiltlm.run import ensure


@dataclass(frozen=True)
class Demo:
    """Star graph and the two-branch tree, from nothing to a table and a picture, in minutes."""

    out: Path = Path("demo")
    """Folder for report.json, frontier.png and the runs; an interrupted demo goes on there."""

    seed: int = 0
    """Every random choice follows from this number."""


def demo(args: list[str]) -> int:
    """Run `star-graph/evaluate` and `tree/solve` under `--out`, and put report and picture there."""
    settings = tyro.cli(Demo, prog="tiltlm demo", args=args)
    prepare()
    command, runs = shlex.join(["tiltlm", "demo", *args]), settings.out / "runs"
    tree = ensure(recipe("tree/solve"), runs, command)
    star = ensure(parsed(recipe("star-graph/evaluate"), [f"--seed={settings.seed}"]), runs, command)
    star.recipe.show(star)
    print()
    tree.recipe.show(tree)
    rows = [read_report(run.folder / "report.json") for run in (star, tree)]
    (settings.out / "report.json").write_text(json.dumps(rows[0] + rows[1], indent=1) + "\n", encoding="utf-8")
    shutil.copy(star.folder / "frontier.png", settings.out / "frontier.png")
    print(f"\nthe same numbers: {settings.out / 'report.json'}\nthe picture:      {settings.out / 'frontier.png'}")
    return 0
