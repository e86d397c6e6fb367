"""The figure of labels bought: what counts as a label, and curves over seeds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from torch import Tensor

from tiltlm.feeds import Draws, Feed, TwistFeed
from tiltlm.fit import Fit
from tiltlm.jsonl import read_json, read_rows
from tiltlm.judges.settings import Judging
from tiltlm.methods import method
from tiltlm.policies.a_star_po import AStarPO
from tiltlm.policies.d2po import D2PO
from tiltlm.policies.dpo import DPO
from tiltlm.policies.opo import OPO
from tiltlm.run import ensure
from tiltlm.samples import Samples
from tiltlm.stages.budget import Budget
from tiltlm.stages.cells import Cell
from tiltlm.stages.exact import ExactSettings
from tiltlm.stages.labels import labels_at, uncounted
from tiltlm.stages.learn import Learn
from tiltlm.stages.measure import RulerSettings
from toy import Toy, twos

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
    learnt = {name: run.inputs[f"{name}/0"].inputs["learnt"] for name in CELLS}
    assert {name: labels_at(each, [], 0) for name, each in learnt.items()} == {
        "gold": 0,
        "judge": 5,
        "offline": 12,
    }
    report = json.loads((run.inputs["judge/0"].folder / "report.json").read_text())
    assert [r["value"] for r in report if r["metric"] == "labels"] == [11]


@pytest.mark.parametrize(
    ("name", "feed", "batch_size", "one", "rows"),
    [
        ("opo", Feed(n=4), 10, False, 16), ("opo", Feed(n=1, size=4), 10, False, 24), ("opo", Feed(), 5, True, 10),
        ("rloo", Feed(n=2), 40, False, 12), ("dapo", Feed(n=2), 7, False, None), ("dpo", Feed("fresh", n=1), 4, False, 8),
        ("kto", Feed("fresh", n=3), 7, False, 12),
    ],
)  # fmt: skip
def test_labels_are_half_the_rows_that_gold_was_asked_about(
    name, feed, batch_size, one, rows, tmp_path, monkeypatch
):
    """Batches that do not divide, more of them than prompts, groups, one prompt, groups that are drawn again."""
    asked = []

    def counting(samples: Samples) -> Tensor:
        asked.append(len(samples))
        return twos(samples)

    monkeypatch.setattr("toy.twos", counting)
    cell = Cell(method(name), feed, replace(FIT, batch_size=batch_size))
    run = ensure(Learn.of(Toy(one=one), cell, name, ExactSettings(), 0), tmp_path)
    log = list(read_rows(run.folder / "metrics.jsonl"))
    assert len(log) == 4 and uncounted(cell, Toy(one=one).facts()) is None
    assert labels_at(run, log, 4) == sum(asked) / 2 and (rows is None or sum(asked) == 4 * rows)
    assert rows is not None or any(line["redraws"] > 0 for line in log)


def test_what_it_cannot_count_is_refused():
    served = replace(JUDGE, url="http://127.0.0.1:9")
    for cell, why in (
        (Cell(AStarPO(), Feed(n=1), FIT), "further draws of its own"),
        (Cell(DPO(), Feed("own"), FIT), "the data's own rows or from rounds"),
        (Cell(method("sft"), Feed("fresh"), FIT), "exact or weighted draws"),
        (Cell(method("ctl"), TwistFeed(), Fit()), "exact or weighted draws"),
        (Cell(D2PO(), Feed(n=1, judge=served), FIT), "its judge runs elsewhere"),
        (Cell(method("reference")), "nothing is trained"),
    ):
        with pytest.raises(ValueError, match=f"mine cannot stand in a figure of labels.*{why}"):
            Budget(Toy(), {"mine": cell}, RULER).check()
    with pytest.raises(ValueError, match="two checkpoints"):
        Budget(Toy(), CELLS, replace(RULER, checkpoints=1))
