"""`tiltlm calibrate`: how often this library's intervals hold, counted in worlds whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tiltlm.commands.arguments import settings_from
from tiltlm.commands.process import prepare
from tiltlm.jsonl import write_whole
from tiltlm.progress import steps
from tiltlm.ruler.calibrate import Cell, bounds_cells, importance_cells, method_cells, rate_cells, table
from tiltlm.seeds import Stream, stream


@dataclass(frozen=True)
class Calibrate:
    """Measure worlds with a known truth again and again, and count how often each kind of interval held it.

    An estimate has to hold in 93% of the runs at least, among those that do not say themselves that it may not; a
    certificate in 95%. The full table takes some minutes on one core.
    """

    kinds: Annotated[tuple[str, ...], tyro.conf.Positional] = ("bounds", "importance", "methods", "rates")
    """What to measure: bounds, importance, methods, rates."""

    runs: int = 300
    """Runs for every line of the table."""

    sizes: tuple[int, ...] = (3, 5, 20, 50)
    """Runs of a bound, draws or prompts."""

    draws: tuple[int, ...] = (50, 200, 2000)
    """Draws of the reference, for log Z by importance and by rejection."""

    particles: tuple[int, ...] = (4, 16, 64)
    betas: tuple[float, ...] = (1.0, 0.3, 0.1)
    twists: tuple[str, ...] = ("exact", "near", "noisy", "none")
    rates: tuple[float, ...] = (0.5, 0.95, 0.99)
    prompts: tuple[int, ...] = (5, 40)
    """Prompts that are measured at once, beside the `sizes`."""

    seed: int = 0
    out: Path | None = None
    """Write the table to this file as well (markdown)."""

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(KINDS)
        if unknown:
            raise ValueError(f"unknown kinds {sorted(unknown)}; there are {', '.join(KINDS)}")
        if min(self.runs, *self.sizes, *self.draws, *self.particles, *self.prompts) < 1 or min(self.betas) <= 0:
            raise ValueError("runs, sizes, draws, particles and prompts are 1 or more, betas positive")


KINDS: dict[str, Callable[[Calibrate, Stream], Iterator[Cell]]] = {
    "bounds": lambda s, own: bounds_cells(s.runs, s.sizes, s.particles, s.twists, s.betas, own),
    "importance": lambda s, own: importance_cells(s.runs, s.draws, s.betas, own),
    "methods": lambda s, own: method_cells(s.runs, s.sizes, s.prompts, s.betas, own),
    "rates": lambda s, own: rate_cells(s.runs, s.sizes, s.rates, own),
}


def calibrate(args: list[str]) -> int:
    """Run the command."""
    settings = settings_from(args, Calibrate, "calibrate")
    prepare()
    found: list[Cell] = []
    with steps("calibrate") as on_step:

        def note_down(cell: Cell) -> None:
            found.append(cell)
            on_step(len(found), len(found), {})

        own = stream(settings.seed, "calibrate")
        cells = (cell for kind in settings.kinds for cell in KINDS[kind](settings, own))
        lines = table(cells, note_down)
    if settings.out is not None:
        write_whole(settings.out, "\n".join(lines) + "\n")
    print("\n".join(lines))
    weak = [f"{c.what} ({c.setting})" for c in found if not c.sound]
    print(f"\n{len(found)} lines of {settings.runs} runs; below what was claimed by more than three errors of the count: "
          f"{len(weak) or 'none'}")  # fmt: skip
    for each in weak:
        print(f"  {each}")
    return 0
