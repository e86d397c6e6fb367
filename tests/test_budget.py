"""The figure of labels bought: what counts as a label, and curves over seeds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tiltlm.feeds import Draws, Feed
from tiltlm.fit import Fit
from tiltlm.jsonl import read_json
from tiltlm.judges.settings import Judging
from tiltlm.policies.d2po import D2PO
from tiltlm.policies.dpo import DPO
from tiltlm.policies.opo import OPO
from tiltlm.run import ensure
from tiltlm.stages.budget import Budget
from tiltlm.stages.cells import Cell
from tiltlm.stages.measure import RulerSettings
from toy import Toy

FIT = Fit(lr=0.05, steps=4, batch_size=6)
JUDGE = Judging("reward-model", budget=11, warm=5, window=24, relabels=4, monitor=True)
CELLS = {
    "gold": Cell(OPO(), Feed(n=1), FIT),
    "judge": Cell(D2PO(), Feed(n=1, judge=JUDGE), FIT),
    "offline": Cell(DPO(), Feed("stored", Draws(4, 6), size=4, pairing="all"), FIT),
}
RULER = RulerSettings(n=20, absolute=False, checkpoints=2)


def test_labels_are_counted_and_averaged_over_seeds(tmp_path):
    """Six pairs a step without a judge; with one five at first, then two a step until eleven; a pair of two draws each."""
    run = ensure(Budget(Toy(), CELLS, RULER, seeds=2), tmp_path)
    rows = read_json(run.folder / "curve.json")
    found = {(r["method"], r["updates"]): r for r in rows if r["metric"] == "labels"}
    labels = {key: row["value"] for key, row in found.items()}
    assert {k: v for k, v in labels.items() if k[0] == "gold"} == {("gold", 2): 12, ("gold", 4): 24}
    assert {k: v for k, v in labels.items() if k[0] == "judge"} == {("judge", 2): 9, ("judge", 4): 11}
    assert {v for k, v in labels.items() if k[0] == "offline"} == {12}
    assert found["judge", 4]["n"] == 2 and found["judge", 4]["stderr"] == 0
    rewards = [
        {
            (r["updates"], r["metric"]): r["value"]
            for r in read_json(run.inputs[f"gold/{seed}"].folder / "curve.json")
        }
        for seed in (0, 1)
    ]
    mean = next(r for r in rows if (r["method"], r["metric"], r["updates"]) == ("gold", "reward", 4))
    assert mean["value"] == pytest.approx(sum(each[4, "reward"] for each in rewards) / 2)
    assert (
        any(r["metric"] == "judge_accuracy" for r in rows) and (run.folder / "budget.png").stat().st_size > 10_000
    )
    report = json.loads((run.inputs["judge/0"].folder / "report.json").read_text())
    assert [r["value"] for r in report if r["metric"] == "labels"] == [11]


def test_what_it_cannot_count_is_refused():
    endless = replace(CELLS["offline"], feed=Feed("stored", Draws(4)))
    with pytest.raises(ValueError, match="of how many prompts"):
        Budget(Toy(), {"offline": endless}, RULER).check()
    with pytest.raises(ValueError, match="two checkpoints"):
        Budget(Toy(), CELLS, replace(RULER, checkpoints=1))
