"""Progress on long work: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tiltlm import ranks

OnStep = Callable[[int, int, dict[str, float]], None]
"""Called after every step with (steps done, step limit, metrics)."""

console = Console(stderr=True, highlight=False, quiet=not ranks.is_first())
"""Where progress goes: standard error, so that standard output holds results alone. Of several processes the first one
speaks."""

QUIET_SECONDS = 10.0


def note(text: str) -> None:
    """One line for whoever watches."""
    console.print(text, soft_wrap=True)


@contextmanager
def steps(name: str) -> Iterator[OnStep]:
    """Progress of a stage that counts steps; yields what to call after each."""
    if console.is_terminal:
        with _live(name) as on_step:
            yield on_step
    else:
        yield _lines(name)


@contextmanager
def _live(name: str) -> Iterator[OnStep]:
    columns = [TextColumn("{task.description:<28}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TextColumn("{task.fields[now]}"), console=console, transient=False) as bar:
        task = bar.add_task(name, total=None, now="")

        def on_step(step: int, limit: int, metrics: dict[str, float]) -> None:
            bar.update(task, completed=step, total=limit, now=_now(metrics))

        yield on_step
        bar.update(task, total=bar.tasks[0].completed)


def _lines(name: str) -> OnStep:
    last = [time.monotonic()]

    def on_step(step: int, limit: int, metrics: dict[str, float]) -> None:
        if time.monotonic() - last[0] > QUIET_SECONDS:
            last[0] = time.monotonic()
            note(f"{name}: {step} of at most {limit}  {_now(metrics)}")

    return on_step


def _now(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in ("loss", "width") if name in metrics)
