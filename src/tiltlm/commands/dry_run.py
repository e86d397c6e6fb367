"""`tiltlm run TASK/STAGE --dry-run`: what is to be built, and the memory that each training takes of a process, before any
work. Nothing is written, no weight is read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiltlm.commands.footprint import footprint
from tiltlm.commands.options import by_flag, parsed
from tiltlm.memory.process import Process
from tiltlm.mistakes import MISTAKES, one_line
from tiltlm.run import Run, unfinished
from tiltlm.stages.learn import Learn
from tiltlm.stages.reward_model import TrainJudge
from tiltlm.stages.rounds import Round
from tiltlm.stages.sft import Sft

WORTH = 0.02
"""What saves less than this part of the most is not named."""

UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
TITLE = "Memory of a process, 1 GB = 10⁹ bytes: float32 weights, gradients, AdamW's moments; rows at their longest"


@dataclass(frozen=True)
class Change:
    """Settings that take less memory.

    words    what to type
    alike    whether the result stays the same
    """

    words: tuple[str, ...]
    alike: bool


@dataclass(frozen=True)
class Several:
    """How many processes train together, and whether they hold every network in parts (`--shard`)."""

    processes: int
    shard: bool = False


SHARD = "shard"
"""An option of the command, not of a recipe's."""

CHANGES = (
    Change(("fit.micro-batch", "1"), True),
    Change(("feed.judge.micro-batch", "1"), True),
    Change(("feed.judge.checkpointing",), True),
    Change(("net.checkpointing",), True),
    Change(("fit.shard",), True),
    Change((SHARD,), True),
    Change(("fit.precision", "bfloat16"), False),
    Change(("net.policy", "lora"), False),
    Change(("net.body", "lora"), False),
    Change(("feed.judge.lora-rank", "8"), False),
)
"""Of a method that learns; other stages have some of them under names of their own."""

OWN_NAMES: dict[type, dict[str, str]] = {
    Sft: {
        "fit.": "task.sft.",
        "net.checkpointing": "task.sft.checkpointing",
        "net.policy lora": "task.sft.lora 8",
    },
    TrainJudge: {"fit.": "task.judge."},
}


def dry_run(runs: Iterable[Run[Any]], processes: int, shard: bool = False) -> bool:
    """Print it for everything that is still to be built for `runs`; where training is shared out, by so many processes, who
    hold every network in parts if `shard`. Gives whether nothing is missing."""
    out = Console(width=130, highlight=False)
    found = {run.folder: run for top in runs for run in reversed(unfinished(top))}
    if not found:
        out.print("all is built already")
        return True
    out.print(
        f"To be built, in this order, with {processes} process{'es' if processes > 1 else ''} where one trains:\n"
    )
    troubles: dict[str, list[str]] = {}
    for run in found.values():
        out.print(f"{run.recipe.name}  ->  {run.folder}", soft_wrap=True)
        if why := trouble(run.recipe):
            troubles.setdefault(why, []).append(run.recipe.name)
    for why, names in troubles.items():
        out.print(f"\n[yellow]still missing[/] for {', '.join(names)}: {escape(why)}", soft_wrap=True)
    out.print(f"\n{TITLE}")
    for run in found.values():
        if isinstance(run.recipe, Round) or run.recipe.together:
            out.print("")
            _say(out, run.recipe, Several(processes, shard), troubles)
    return not troubles


def trouble(recipe: Any) -> str:
    """What a recipe says is missing; empty: nothing."""
    try:
        recipe.check()
    except MISTAKES as error:
        return one_line(error)
    return ""


def _say(out: Console, recipe: Any, several: Several, known: Collection[str]) -> None:
    """known: reasons that were said above, and are not said again."""
    try:
        needed = footprint(recipe, several.processes, several.shard)
        most = needed.most
    except MISTAKES as error:
        why = one_line(error)
        out.print(f"[bold]{recipe.name}[/]  {'see above' if why in known else escape(why)}", soft_wrap=True)
        return
    out.print(f"[bold]{recipe.name}[/]  {size(most)} at most, in {needed.when}")
    out.print(_networks(needed))
    out.print(_parts(needed))
    lower = list(savings(recipe, several, most))
    if lower:
        out.print(_lower(lower, most))


def _networks(needed: Process) -> Table:
    table = _table("held all the time", "weights", "gradients", "moments", "parameters", "trained", "in parts")
    for each in needed.held:
        parts = f"of {each.processes}" if each.processes > 1 else ""
        numbers = (each.weights, each.gradients, each.moments)
        counts = (each.parameters, each.copies * each.network.trained)
        table.add_row(each.name, *map(size, numbers), *map(count, counts), parts)
    return table


def _parts(needed: Process) -> Table:
    table = _table("beside it, in turn", "bytes", "rows", "tokens a row", "of it gathered")
    if needed.start:
        table.add_row(
            "(the start, all whole)"
            if any(each.undivided for each in needed.held)
            else "(the start, one of them whole)",
            size(needed.start),
        )
    for name, value in needed.parts.items():
        batch = next(use.batch for each in needed.held for use in each.uses if use.part == name)
        gathered = needed.gathered(name)
        table.add_row(name, size(value), str(batch.rows), str(batch.length), size(gathered) if gathered else "")
    return table


def _lower(found: Iterable[tuple[str, bool, int]], most: int) -> Table:
    table = _table("less with", "at most", "saved", "")
    for words, alike, value in found:
        table.add_row(words, size(value), size(most - value), "the same result" if alike else "another result")
    return table


def _table(*heads: str) -> Table:
    table = Table(show_edge=False, pad_edge=False, box=None, padding=(0, 3, 0, 0))
    for k, head in enumerate(heads):
        table.add_column(head, justify="right" if k else "left", min_width=26 if not k else None)
    return table


# ---- what would lower it ----------------------------------------------------------------------------------------


def savings(recipe: Any, several: Several, most: int) -> Iterator[tuple[str, bool, int]]:
    """(what to type, whether the result stays the same, the most bytes then) of every change that is worth it; the last one
    is all that keep the result."""
    together: list[list[str]] = []
    for change in CHANGES:
        words = words_of(recipe, change, several)
        value = _with(recipe, words, several) if words else None
        if value is None or value > (1 - WORTH) * most:
            continue
        yield " ".join(words), change.alike, value
        together += [words] if change.alike else []
    every = [word for words in together for word in words]
    if f"--{SHARD}" in every:  # which has the weights of what is trained in parts as well
        every = [word for word in every if not word.endswith(".shard")]
    value = _with(recipe, every, several) if len(together) > 1 else None
    if value is not None:
        yield " ".join(every), True, value


def words_of(recipe: Any, change: Change, several: Several) -> list[str]:
    """A change as options of this recipe; none where it has no such option, or only one process would have parts."""
    if change.words == (SHARD,):
        return [] if several.shard or several.processes == 1 else [f"--{SHARD}"]
    said = " ".join(change.words)
    for general, own in OWN_NAMES.get(type(recipe), {}).items():
        if said.startswith(general):
            said = said.replace(general, own)
            break
    name, *values = said.split()
    here = by_flag(recipe)
    if name not in here or (name.endswith(".shard") and (several.shard or several.processes == 1)):
        return []
    return [f"--{name}", *values] if all(str(each.value) != (values or ["True"])[0] for each in here[name]) else []


def _with(recipe: Any, words: list[str], several: Several) -> int | None:
    """The most bytes with these options; None where they do not go with the others."""
    try:
        changed = parsed(recipe, [word for word in words if word != f"--{SHARD}"])
        if isinstance(changed, Learn | Round) and changed.cell.why_not(changed.task.facts()):
            return None
        return footprint(changed, several.processes, several.shard or f"--{SHARD}" in words).most
    except MISTAKES:
        return None


# ---- numbers ----------------------------------------------------------------------------------------------------


def size(value: float) -> str:
    """Bytes as people read them."""
    return next(
        (f"{value / unit:.1f} {name}" for unit, name in UNITS if value >= unit), f"{value:.0f} B" if value else "–"
    )


def count(value: int) -> str:
    """How many, as people read it."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.2f} {name}"
    return str(value) if value else "–"
