"""From a preset and the name of a stage to the recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from tiltlm.feeds import Draws as DrawSettings
from tiltlm.feeds import Feed
from tiltlm.methods import method, names
from tiltlm.mistakes import nearest
from tiltlm.problem import Split
from tiltlm.questions.protocols import protocol
from tiltlm.recipes.preset import Preset
from tiltlm.run import Recipe
from tiltlm.stages.answers import Answers
from tiltlm.stages.bounds import Bounds, BoundsSettings
from tiltlm.stages.budget import Budget
from tiltlm.stages.cells import Cell
from tiltlm.stages.draws import Draws, Labels
from tiltlm.stages.evaluate import Evaluate
from tiltlm.stages.exact import Exact
from tiltlm.stages.examine import Examine
from tiltlm.stages.frontier import BETAS, Frontier
from tiltlm.stages.learn import Learn
from tiltlm.stages.log_z import CommonLogZ
from tiltlm.stages.measure import Measure
from tiltlm.stages.qualitative import Qualitative, Shown
from tiltlm.stages.reach import Reach, ReachSettings
from tiltlm.stages.rounds import Round


def stage_of(preset: Preset, stage: str, compared: Sequence[str] | None = None) -> Recipe:
    """The recipe of a stage. Unknown names raise, naming the nearest."""
    if stage in names() or stage in preset.variants:
        return measured(preset, stage)
    own = preset.task.stages(preset.seed)
    for made in (
        own.get(stage),
        _common(preset, stage, compared),
        _training(preset, stage),
        _round(preset, stage),
        _examined(preset, stage),
    ):
        if made is not None:
            return made
    known = [*names(), *preset.variants, *own, *COMMON, "value"]
    what = f"{preset.task.name} has no stage {stage!r}, and there is no method of that name."
    raise ValueError(f"{what}{nearest(stage, known)} `tiltlm list` shows them all.")


def cell(preset: Preset, name: str) -> Cell:
    """The settings of the method, or the variant of one, called `name` on a preset's task."""
    return preset.variants[name] if name in preset.variants else preset.cell(name, method(name))


def measured(preset: Preset, name: str) -> Measure:
    """The recipe that measures a method."""
    c = cell(preset, name)
    return Measure(
        preset.task, c.method, c.feed, c.fit, c.net, preset.ruler, preset.exact, preset.log_z, cell(preset, "ctl"), name,
        preset.seed,
    )  # fmt: skip


def _training(preset: Preset, stage: str) -> Recipe | None:
    """`METHOD-policy`, `METHOD-twist`; `value`, as Q# has it."""
    if stage == "value":
        c = cell(preset, "q-sharp")
        return Learn(preset.task, c.method.trained(), c.feed, c.fit, c.net, preset.exact, "value", preset.seed)
    name, _, kind = stage.rpartition("-")
    if kind not in ("policy", "twist") or not (name in names() or name in preset.variants):
        return None
    c = cell(preset, name)
    if c.method.trained().trains != kind:
        trains = c.method.trained().trains
        raise ValueError(f"{name} trains {'nothing' if trains == 'nothing' else f'a {trains}'}, no {kind}")
    if isinstance(c.feed, Feed) and c.feed.source == "rounds":
        return Round.last_of(preset.task, c, name, preset.seed)
    return Learn(preset.task, c.method.trained(), c.feed, c.fit, c.net, preset.exact, name, preset.seed)


def _round(preset: Preset, stage: str) -> Recipe | None:
    """`METHOD-round-2`, `METHOD-answers-2` (what its second round learns from), `answers` (of the reference, for a first
    round), each of the latter two also with `-valid`."""
    found = re.fullmatch(
        r"answers(-valid)?|(?P<name>.+)-(?P<what>round|answers)-(?P<number>[1-9]\d*)(-valid)?", stage
    )
    if found is None:
        return None
    split: Split = "valid" if stage.endswith("-valid") else "train"
    name, number = found["name"], int(found["number"] or 1)
    if name is None:
        return Answers(preset.task, split=split, seed=preset.seed)
    if not (name in names() or name in preset.variants):
        return None
    c = cell(preset, name)
    if not isinstance(c.feed, Feed):
        raise ValueError(f"{name} trains a {c.method.trained().trains}, which is not learnt in rounds")
    feed = replace(c.feed, source="rounds", rounds=replace(c.feed.rounds, count=number))
    last = Round.last_of(preset.task, replace(c, feed=feed), name, preset.seed)
    if found["what"] == "answers":
        return replace(last.answers, split=split) if last.index else None
    return last if split == "train" else None


def _examined(preset: Preset, stage: str) -> Recipe | None:
    """`METHOD@PROTOCOL`."""
    name, at, how = stage.partition("@")
    if not at or not (name in names() or name in preset.variants):
        return None
    protocol(how)
    return Examine.of(measured(preset, name), how)


def _draws(preset: Preset) -> DrawSettings:
    found = cell(preset, "exo-rw").feed
    return found.draws if isinstance(found, Feed) else DrawSettings()


def _log_z(preset: Preset) -> CommonLogZ:
    return CommonLogZ(preset.task, preset.log_z, preset.exact, cell(preset, "ctl"), preset.seed)


COMMON: dict[str, Callable[[Preset], Recipe]] = {
    "exact": lambda p: Exact(p.task, p.exact, seed=p.seed),
    "log-z": _log_z,
    "generate": lambda p: Draws(p.task.untilted(), _draws(p), p.seed),
    "label": lambda p: Labels.of(p.task, _draws(p), p.seed),
    "bounds": lambda p: Bounds(p.task, cell(p, "ctl"), p.figures.get("bounds", BoundsSettings()), p.exact, p.seed),
    "reach": lambda p: Reach(p.task, cell(p, "ctl"), p.figures.get("reach", ReachSettings()), p.exact, p.seed),
    "budget": lambda p: Budget(
        p.task,
        dict(p.variants) or {name: cell(p, name) for name in ("opo", "d2po")},
        replace(p.ruler, absolute=False, checkpoints=10),
        seed=p.seed,
    ),
    "qualitative": lambda p: Qualitative(
        p.task, cell(p, "ctl"), p.figures.get("qualitative", Shown()), p.exact, p.seed
    ),
}
"""Stages that every task has."""


def _compared(preset: Preset, chosen: Sequence[str], kind: type[Evaluate], at: tuple[float, ...] = ()) -> Evaluate:
    cells, ruler = {name: cell(preset, name) for name in chosen}, preset.ruler
    if at:  # no exact draws: at a small beta they may be out of reach, and reward against KL wants none
        ruler = replace(ruler, absolute=False)
    return kind(
        preset.task, tuple(chosen), cells, ruler, preset.exact, preset.log_z, cell(preset, "ctl"), at, preset.seed
    )


def _common(preset: Preset, stage: str, compared: Sequence[str] | None) -> Recipe | None:
    if stage == "evaluate":
        return _compared(preset, compared or preset.methods, Evaluate)
    if stage == "frontier":
        return _compared(preset, compared or ("ctl", "ppo"), Frontier, BETAS)
    return COMMON[stage](preset) if stage in COMMON else None
