"""The card of an exported model: target, method, numbers with their errors, data, command, versions."""

from __future__ import annotations

import json
from typing import Any

from tiltlm.jsonl import read_json
from tiltlm.ruler.table import HEADINGS, cell, doubts, read_report
from tiltlm.run import Run

NUMBERS = HEADINGS | {"objective": "J(q) = E[r] − beta·KL(q‖ref)"}


def card(run: Run[Any], title: str) -> str:
    """README.md of the folder that `run` is exported to."""
    stored, made = read_json(run.folder / "config.json"), read_json(run.folder / "provenance.json")
    settings = stored["settings"]
    method = str(settings.get("called") or stored["recipe"].rpartition("/")[2])
    return "\n\n".join(
        [
            "---\nlibrary_name: transformers\npipeline_tag: text-generation\n" + f"tags: [tiltlm, {method}]\n---",
            f"# {title}",
            target(run, method),
            numbers(run),
            f"## Task and data\n\n{code(settings['task'])}",
            f"## Method\n\n{code({name: settings[name] for name in ('method', 'feed', 'fit', 'net') if name in settings})}",
            how(made),
        ]
    ) + "\n"  # fmt: skip


def target(run: Run[Any], method: str) -> str:
    beta = getattr(run.recipe.task, "beta", None)
    return (
        f"A policy trained by `{method}` on the task `{run.recipe.task.name}`, towards\n\n"
        f"    pi*(y|x) ∝ pi_ref(y|x) · exp(r(x, y) / beta),    beta = {beta:g}\n\n"
        "Draw with the settings of its generation_config: they bend nothing, so that the numbers below are its own."
    )


def numbers(run: Run[Any]) -> str:
    """The measurement as a table, one standard error behind each; or that there is none."""
    report = run.folder / "report.json"
    rows = [row for row in read_report(report) if row["metric"] in NUMBERS] if report.is_file() else []
    if not rows:
        return (
            "## Numbers\n\nNot measured here. (`tiltlm run TASK/METHOD` measures; a card of its run has numbers.)"
        )
    lines = [
        f"| {NUMBERS[row['metric']]} | {cell(row)} | {row.get('unit', '')} | {row['n']:.0f} |" for row in rows
    ]
    table = "\n".join(["| | value ± standard error | unit | n |", "|---|---|---|---|", *lines])
    return "\n\n".join(filter(None, ["## Numbers", table, doubts(rows)]))


def how(made: dict[str, Any]) -> str:
    """Command, seed and versions."""
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    command = f"    {made['command']}\n\n" if made["command"] else ""
    made_of = f"Seed {made['seed']}; commit {made['commit']}; Python {made['python']}; {versions}."
    return f"## How it was made\n\n{command}{made_of}"


def code(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=1, ensure_ascii=False)}\n```"
