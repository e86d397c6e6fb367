"""Every task × every method, at toy size: each cell trains a few steps and is measured, or refuses with a reason.

No cell is left out: the walk is over all names that there are. A new method or task is in it on the day it lands.
"""

from __future__ import annotations

import functools
import json
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from letters import letters
from tiltlm.methods import names
from tiltlm.recipes import preset_of, tasks
from tiltlm.recipes.preset import Preset
from tiltlm.recipes.stages import measured
from tiltlm.run import ensure
from tiltlm.stages.exact import ExactSettings
from tiltlm.stages.measure import Measure
from tiltlm.tasks.questions import OfQuestions

PAGE = Path(__file__).resolve().parents[1] / "docs" / "matrix.md"
WIDE = ("kl_to_target", "kl_to_target_at_least", "kl_to_target_at_most", "objective", "objective_at_least")
"""What a measured cell has at least one of."""


def small(preset: Preset, **task: Any) -> Preset:
    """A preset at toy size: `task` are settings of its task; few draws everywhere."""
    ruler = replace(preset.ruler, prompts=min(preset.ruler.prompts or 4, 4), n=8, exact=40, checkpoints=1, also=())
    log_z = replace(preset.log_z, draws=64, particles=(4,), repeats=2, prompts=4)
    return replace(
        preset, task=changed(preset.task, task), ruler=ruler, exact=ExactSettings(n=40, batch_size=64), log_z=log_z
    )


def changed(value: Any, settings: dict[str, Any]) -> Any:
    """`value` with settings named by their path: language.new_tokens."""
    for path, new in settings.items():
        head, _, rest = path.partition(".")
        value = replace(value, **{head: changed(getattr(value, head), {rest: new}) if rest else new})
    return value


def toy_cell(made: Measure) -> Measure:
    """A cell that trains three steps."""
    fit = replace(
        made.fit, steps=3, epochs=0.0, warmup=0, until=0.0, watch=(), checkpoints=0, keep=(), patience=0,
        evaluations=min(made.fit.evaluations, 1), batch_size=made.fit.batch_size if is_twist(made) else 8,
    )  # fmt: skip
    feed = made.feed
    if is_twist(made):
        feed = replace(feed, particles=4, prompts=min(feed.prompts, 2))
    elif made.feed.n:
        feed = replace(feed, n=min(feed.n, 4))
    shrunk = {"n": 4, "particles": 4} if made.method.trained().trains != "policy" else {}
    own = {f.name for f in fields(made.method)} if is_dataclass(made.method) else set()
    chosen = replace(made.method, **{k: v for k, v in shrunk.items() if k in own})
    twist = made.twist  # of log Z's bounds, where it is found by them
    assert twist is not None
    short = replace(
        twist, fit=replace(twist.fit, steps=2, keep=()), feed=replace(twist.feed, particles=4, prompts=2)
    )
    return replace(made, fit=fit, feed=feed, method=chosen, twist=short)


def is_twist(made: Measure) -> bool:
    return bool(made.method.trained().fed == "draws")


OWN = {"language.model": "", "language.stories": 60, "language.fit.steps": 2, "language.new_tokens": 3}
STAR = {
    "world.posttrain": 40, "world.test": 8, "base.steps": 3, "base.until": 0.0, "network.layers": 1, "network.width": 16,
    "network.mlp": 16, "rollouts.max_tries": 10,
}  # fmt: skip
TALK = {
    "dataset.own": 80, "dataset.valid_rows": 6, "dataset.test_rows": 6, "reader.most_tokens": 40, "reader.new_tokens": 5,
    "base.steps": 2, "sft.fit.epochs": 0.0, "sft.fit.steps": 2, "sft.fit.evaluations": 1, "judge.fit.epochs": 0.0,
    "judge.fit.steps": 2, "judge.fit.evaluations": 1,
}  # fmt: skip


def mine() -> dict[str, Any]:
    """Four prompts in a file, and a function of one's own that pays for short words."""
    folder = Path(tempfile.mkdtemp(prefix="tiltlm-matrix-"))
    starts = ("One day", "The dog", "Once upon", "A girl")
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in starts))
    (folder / "r.py").write_text(
        "def short(prompts, completions):\n    return [min(1.0, y.count(' ') / 4) for y in completions]\n"
    )
    more = {"prompts": str(folder / "p.jsonl"), "reward": f"{folder / 'r.py'}:short", "r_max": 1.0}
    return OWN | more


MINE = functools.cache(mine)
"""The same files for all cells: they count in the keys."""


MATRIX: dict[str, Callable[[], Preset]] = {
    "animals": lambda: small(preset_of("animals"), **OWN),
    "toxicity-small": lambda: small(
        preset_of("toxicity-small"),
        **OWN,
        **{"classify.data": (), "classify.classes": (), "classify.fit.steps": 2},
    ),
    "infill15-small": lambda: small(preset_of("infill15-small"), **OWN | {"condition_tokens": 2}),
    "continuation": lambda: small(preset_of("continuation"), **OWN, kind="probability"),
    "dialogues": lambda: small(preset_of("dialogues"), **TALK),
    "distill-small": lambda: small(
        preset_of("distill-small"),
        **OWN
        | {
            "language.layers": 1,
            "larger.layers": 2,
            "larger.fit.steps": 2,
            "prompts": "stories:6",
            "test_rows": 2,
        },
    ),
    "mine": lambda: small(preset_of("mine"), **MINE()),
    "sums": lambda: small(replace(preset_of("sums"), task=letters())),
    "star-graph": lambda: small(preset_of("star-graph"), **STAR),
    "tree": lambda: small(preset_of("tree")),
    "modes": lambda: small(preset_of("modes")),
}
"""A task of every kind."""


def walk() -> list[Any]:
    return [pytest.param(task, name, id=f"{task}/{name}") for task in MATRIX for name in names()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.mark.parametrize(("task", "name"), walk())
def test_a_cell_is_measured_or_says_why_not(task, name, root):
    made = toy_cell(measured(MATRIX[task](), name))
    why = made.cell.why_not(made.task.facts())
    if why is not None:
        assert len(why) > 20 and "\n" not in why
        with pytest.raises(ValueError, match=re.escape(why[:40])):
            made.check()
        return
    run = ensure(made, root)
    rows = {row["metric"]: row for row in json.loads((run.folder / "report.json").read_text())}
    assert set(WIDE) & set(rows), f"{task}/{name} measures {sorted(rows)}"
    assert all(math.isfinite(rows[metric]["value"]) for metric in WIDE if metric in rows)
    trains = made.method.trained().trains
    assert (trains == "nothing") == ("learnt" not in run.inputs)
    if trains != "nothing":
        lines = (run.inputs["learnt"].folder / "metrics.jsonl").read_text().splitlines()
        assert len(lines) >= 3


def test_every_kind_of_task_is_in_the_walk():
    """Every class of task in the catalogue; questions are one kind, whatever they are read from."""

    def kind(preset: Preset) -> type:
        return OfQuestions if isinstance(preset.task, OfQuestions) else type(preset.task)

    assert {kind(make()) for make in MATRIX.values()} == {kind(preset_of(name)) for name in tasks()}


def test_the_page_has_every_cell_and_its_reason():
    """docs/matrix.md is what the catalogue says today (its numbers are measured by bench/matrix.py)."""
    text = PAGE.read_text(encoding="utf-8")
    lines = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")]
    heads = [cell.strip() for cell in lines[0].strip("|").split("|")][1:]
    assert heads == list(tasks())
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.M))
    shown = {row[0]: row[1:] for row in ([c.strip() for c in line.strip("|").split("|")] for line in lines[1:])}
    assert set(shown) == set(names())
    for name in names():
        for task, mark in zip(heads, shown[name], strict=True):
            why = measured(preset_of(task), name).cell.why_not(preset_of(task).task.facts())
            assert (reasons.get(mark) if mark != "✓" else None) == why, f"{task}/{name}"
