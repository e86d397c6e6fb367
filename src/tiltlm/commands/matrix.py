"""`tiltlm list --matrix`: which methods make sense on which tasks, and why the others do not."""

from __future__ import annotations

import textwrap

from tiltlm import methods
from tiltlm.recipes import preset_of, tasks

WIDTH = 118


def matrix(word: str = "") -> int:
    """Print ✓ or – for every task and method (of tasks, or else methods, whose name contains `word`), then the reasons."""
    rows = [name for name in tasks() if word in name]
    columns = [*methods.names()] if rows else [name for name in methods.names() if word in name]
    rows = rows or [*tasks()]
    if not columns:
        raise ValueError(f"no task and no method has {word!r} in its name")
    verdicts = {task: verdicts_of(task, columns) for task in rows}
    reasons: dict[str, dict[str, list[str]]] = {}
    for task, found in verdicts.items():
        for name, why in found.items():
            if why is not None:
                reasons.setdefault(why, {}).setdefault(task, []).append(name)
    width = max(map(len, rows)) + 2
    for k in range(max(map(len, columns))):  # names stand upright
        print(" " * width + " ".join(name.ljust(max(map(len, columns)))[k] for name in columns))
    for task in rows:
        print(f"{task:<{width}}" + " ".join("–" if verdicts[task][name] else "✓" for name in columns))
    for why, where in reasons.items():
        print(f"\n– {why}")
        alike: dict[str, list[str]] = {}
        for task, names in where.items():
            alike.setdefault(", ".join(names), []).append(task)
        for those, some in alike.items():
            text = f"{', '.join(some)}: {those}"
            print(textwrap.fill(text, WIDTH, initial_indent="    ", subsequent_indent="      "))
    return 0


def verdicts_of(task: str, names: list[str]) -> dict[str, str | None]:
    """Method -> why it makes no sense on a task, with the settings that it has there; None where it does."""
    preset = preset_of(task)
    facts = preset.task.facts()
    return {name: preset.cell(name, methods.method(name)).why_not(facts) for name in names}
