"""Completions listed down to a probability, and the ends of log Z that they leave."""

from __future__ import annotations

import math

import pytest
import torch

from laws.world import HORIZON, PROMPTS, world
from tiltlm.exact import solve
from tiltlm.jsonl import read_json
from tiltlm.ruler.log_z import LogZ
from tiltlm.run import ensure
from tiltlm.samplers.listing import listed
from tiltlm.stages.log_z import CommonLogZ, LogZSettings, ends_of_listing
from toy import HORIZON as TOY_HORIZON
from toy import Toy


@pytest.mark.parametrize("ends", [(), (1,)])
@pytest.mark.parametrize("floor", [1e-9, 0.04])
def test_what_is_listed_is_every_completion_of_that_probability(ends, floor):
    """Against all completions of a table, each with the probability that the table gives it."""
    w = world()
    w.reference.eos_ids = ends
    whole, log_p = listed(w.reference, PROMPTS, HORIZON, 1e-12)
    mass = torch.zeros(len(PROMPTS)).double().index_add(0, whole.prompt_index, log_p.exp())
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)
    torch.testing.assert_close(w.reference.log_prob(whole).sum(1).double(), log_p, rtol=0, atol=1e-5)
    some, log_some = listed(w.reference, PROMPTS, HORIZON, floor)
    rows = {
        (k, *ids): p
        for k, ids, p in zip(whole.prompt_index.tolist(), whole.completions.lists(), log_p, strict=True)
    }
    kept = {(k, *ids) for k, ids in zip(some.prompt_index.tolist(), some.completions.lists(), strict=True)}
    assert kept == {row for row, p in rows.items() if p >= math.log(floor)} and len(kept) == len(log_some)
    last = [ids[-1] for ids in some.completions.lists()]
    assert some.finished.tolist() == [not ends or token in ends for token in last]
    if floor > 0.01:
        assert 0 < len(kept) < len(rows)


def test_a_floor_that_is_no_probability_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        listed(world().reference, PROMPTS, HORIZON, 0)


def test_ends_by_hand():
    """Two completions of ¼ each, weights 1 and 4; the other half weighs 8 at most: log 1.25 and log 5.25."""
    samples, _ = listed(world().reference, PROMPTS.select(slice(0, 1)), 1, 1e-9)
    two = samples.select(slice(0, 2))
    log_p = torch.full((2,), 0.25).double().log()
    ends = ends_of_listing(two, log_p, log_p + torch.tensor([0.0, math.log(4)]), math.log(8))
    assert ends.flatten().tolist() == pytest.approx([math.log(1.25), math.log(5.25)])
    found = LogZ.of_listing(torch.tensor([0.0, 10.0]), torch.tensor([2.0, 11.0]), "by hand")
    assert found.value == 5.75 and found.certificate == (5.0, 6.5) and found.each.tolist() == [1.0, 10.5]
    with pytest.raises(ValueError, match="lower --log-z"):
        ends_of_listing(two.select(slice(0, 0)), log_p[:0], log_p[:0], 0.0)


@pytest.mark.parametrize("floor", [1e-9, 0.04])
def test_the_stage_s_ends_hold_log_z_whatever_is_left_out(floor, tmp_path):
    task = Toy()
    problem = task.problem({}, 0)
    exact = solve(problem.target, problem.prompts["test"], TOY_HORIZON).log_z
    made = CommonLogZ(task, LogZSettings(by="listing", floor=floor, batch_size=60))
    assert not made.inputs(), "no exact draws are searched for"
    found = LogZ.from_json(read_json(ensure(made, tmp_path).folder / "log_z.json"))
    low, high = found.certificate
    assert low - 1e-6 <= float(exact.mean()) <= high + 1e-6
    assert float((found.each - exact).abs().max()) < (1e-5 if floor < 0.01 else 1.0)
    assert (high - low < 1e-5) == (floor < 0.01)


def test_a_listing_without_a_bound_or_of_one_prompt_is_refused():
    for task in (Toy(one=True), Toy(bounded=False)):
        with pytest.raises(ValueError, match="a listing is of several prompts"):
            CommonLogZ(task, LogZSettings(by="listing")).check()
