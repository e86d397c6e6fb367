"""From a preset and the name of a stage to the recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from tiltlm.feeds import Draws as DrawSettings
from tiltlm.feeds import Feed
from tiltlm.feeds.rounds import BUILT
from tiltlm.methods import method, names
from tiltlm.mistakes import nearest
from tiltlm.problem import SPLITS, Split
from tiltlm.questions.protocols import protocol
from tiltlm.recipes.preset import Preset
from tiltlm.recipes.rounds import v_star
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
        _examined(preset, stage),
        _in_rounds(preset, stage),
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


def _examined(preset: Preset, stage: str) -> Recipe | None:
    """`METHOD@PROTOCOL`."""
    name, at, how = stage.partition("@")
    if not at or not (name in names() or name in preset.variants):
        return None
    protocol(how)
    return Examine.of(measured(preset, name), how)


PART = re.compile(r"(.+)-(round|answers)-([1-9]\d*)(?:-(valid|test))?")


def _in_rounds(preset: Preset, stage: str) -> Recipe | None:
    """`METHOD-round-2`: a chain of two; `METHOD-answers-2`: what its second round learns from (-valid, -test: that policy's
    answers to other prompts); `answers-valid`, `answers-test`."""
    if stage.startswith("answers-") and stage.removeprefix("answers-") in SPLITS:
        return Answers(preset.task, split=split_called(stage.removeprefix("answers-")), seed=preset.seed)
    found = PART.fullmatch(stage)
    if found is None:
        return None
    name, what, number, split = found[1], found[2], int(found[3]), found[4]
    last = _last_round(preset, name)
    if last is None or (what == "round" and split) or (what == "answers" and number == 1):
        return None
    last = replace(last, index=number - 1)
    return last if what == "round" else replace(last.answers, split=split_called(split or "train"))


def split_called(name: str) -> Split:
    return next(split for split in SPLITS if split == name)


def _last_round(preset: Preset, name: str) -> Round | None:
    """The end of the chain called `name`, where there is one."""
    if name in ("v-star", "v-star-verifier"):
        made = v_star(preset)
        return made.last if name == "v-star" else made.judge
    if name not in names() and name not in preset.variants:
        return None
    c = cell(preset, name)
    if not isinstance(c.feed, Feed) or c.method.trained().fed not in BUILT:
        return None
    return Round.last_of(preset.task, replace(c, feed=replace(c.feed, source="rounds")), name, preset.seed)


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
    "answers": lambda p: Answers(p.task, seed=p.seed),
    "v-star": v_star,
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
