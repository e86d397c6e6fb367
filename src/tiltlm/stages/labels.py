"""Labels: gold verdicts that a training took. One is a verdict on one pair, two rows that gold scored.

    a judge             what its ledger says, step by step
    rows of every step  as many as are drawn, DAPO's further draws of tied groups with them
    stored draws        all before the first step

What measurements, and evaluations along the way, ask of gold is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiltlm.feeds import NEW, Feed, TwistFeed, rows_drawn, source_of
from tiltlm.jsonl import read_rows
from tiltlm.problem import Facts
from tiltlm.run import Run
from tiltlm.stages.cells import Cell

Log = Sequence[Mapping[str, float]]
"""Every step's metrics."""


def uncounted(cell: Cell, facts: Facts) -> str | None:
    """Why it is not known how many labels such a training takes, or None."""
    method = cell.method.trained()
    if method.trains == "nothing":
        return "nothing is trained, so no labels are taken"
    if isinstance(cell.feed, TwistFeed) or method.fed == "answers":
        return "it learns from exact or weighted draws, whose verdicts nobody counts"
    if cell.feed.judge.url:
        return "its judge runs elsewhere, and the ledger there is of all who ask it"
    if method.asks:
        return "it asks the reward of further draws of its own, which nobody counts"
    if source_of(facts, method, cell.feed) in ("own", "rounds"):
        return (
            "it learns from the data's own rows or from rounds, whose verdicts nobody counts: --feed.source stored"
        )
    return None


def labels_at(learnt: Run[Any], log: Log, updates: int) -> float:
    """Labels that a training (`stages.learn`) had taken after so many updates; log: what it logged."""
    made = learnt.recipe
    feed: Feed = made.feed
    if feed.judge.kind != "none":
        return log[updates - 1]["labels_bought"] if updates else feed.judge.warm
    facts = made.task.facts()
    if source_of(facts, made.method, feed) not in NEW:
        return _stored(learnt.inputs["label"]) / 2
    prompts = len(made.problem(learnt).prompts["train"]) if facts.prompts == "several" else 1
    rows = rows_drawn(facts, made.method, feed, made.fit.batch_size, prompts)
    return rows * sum(1 + round(line.get("redraws", 0)) for line in log[:updates]) / 2


def _stored(label: Run[Any]) -> int:
    """Rows of the training split that have been labelled."""
    return sum(len(row["rewards"]) for row in read_rows(label.folder / "train.jsonl", ("rewards",)))
