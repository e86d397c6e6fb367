"""What a run asks of a reward that costs money beside its judge, whose budget bounds that judge's purchases alone."""

from __future__ import annotations

from functools import cache

from tiltlm.feeds import Feed
from tiltlm.progress import note
from tiltlm.rewards.gold.judge import CEILING
from tiltlm.stages.cells import Cell
from tiltlm.stages.watched import WATCHED


def by_training(cell: Cell) -> str:
    """What a training asks of the reward itself, in words; empty: nothing."""
    judged = isinstance(cell.feed, Feed) and cell.feed.judge.kind != "none"
    found = [] if judged else ["every row that it learns from, for no judge stands between"]
    if cell.fit.evaluations:
        found.append(f"up to {WATCHED} answers at every evaluation (--fit.evaluations {cell.fit.evaluations})")
    return " and ".join(found)


@cache
def say_once(name: str, asked: str) -> None:
    """Say before any work, and once, what will be asked."""
    note(
        f"[yellow]{name}: the reward costs money, and will be asked about {asked}[/]: no judge's budget bounds that, only "
        f"${CEILING}"
    )
