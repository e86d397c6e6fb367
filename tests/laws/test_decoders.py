"""What decoders without a density say of their distances, held against exact sums over small worlds."""

from __future__ import annotations

import math

import pytest
import torch
from world import HORIZON, N_PROMPTS, World, world

from tiltlm.decoders.best_of_n import BestOf, kl_of_counts, pseudo_values
from tiltlm.decoders.reference import Reference
from tiltlm.decoders.rejection import Rejection
from tiltlm.decoders.smc import SMCDecoding
from tiltlm.exact import kl
from tiltlm.method import Learner
from tiltlm.models.table import TableValues
from tiltlm.problem import Facts, Problem
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.samplers.best_of import kl_upper_bound
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.twists.ctl import CTL

NOTHING = Learner(None)
ENDS = [(), (2,)]


def problem_of(w: World, prompts: Tokens | None = None) -> Problem:
    prompts = w.prompts if prompts is None else prompts
    facts = Facts(w.beta, "one" if len(prompts) == 1 else "several", r_max=max(w.atoms), network=False)
    return Problem(w.target(), {"train": prompts, "test": prompts}, HORIZON, stream(0, "decoders"), facts)


def one(w: World, k: int = 1) -> Tokens:
    return w.prompts.select(slice(k, k + 1))


def ruler_of(problem: Problem, n: int, log_z: torch.Tensor | LogZ | None, seed: int = 1) -> Ruler:
    return Ruler(problem.target, problem.prompts["test"], HORIZON, stream(seed, "measure"), n=n, log_z=log_z)


def best_of_law(w: World, n: int) -> torch.Tensor:
    """The law of best-of-n over completions, [P, S]: within each reward pi_ref, each reward as often as it is the best."""
    p = w.p_ref()
    q = torch.zeros_like(p)
    for x in range(N_PROMPTS):
        below = 0.0
        for atom in w.reward[x].unique():
            here = w.reward[x] == atom
            mass = float(p[x, here].sum())
            q[x, here] = ((below + mass) ** n - below**n) * p[x, here] / mass
            below += mass
    return q


def frequencies(w: World, samples: Samples) -> torch.Tensor:
    """How often every completion was drawn, [P, S]."""
    place = {row: k for k, row in enumerate(w.rows)}
    asked, done = samples.row_prompts.lists(), samples.completions.lists()
    counts = torch.zeros(len(w.rows), dtype=torch.float64)
    for x, y in zip(asked, done, strict=True):
        counts[place[(*x, *y)]] += 1
    counts = counts.reshape(w.reward.shape)
    return counts / counts.sum(1, keepdim=True).clamp_min(1)


def near(found: float, stderr: float, truth: float, errors: float = 4.0) -> bool:
    return abs(found - truth) <= errors * stderr + 1e-9


# ---- best of n ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos_ids", ENDS)
@pytest.mark.parametrize("n", [1, 3, 8])
def test_best_of_n_tells_its_own_distances(n, eos_ids):
    w = world(eos_ids=eos_ids)
    q, p, star = best_of_law(w, n), w.p_ref(), w.p_star()
    assert torch.allclose(q.sum(1), torch.ones(N_PROMPTS, dtype=torch.float64))
    to_reference, to_target = kl(q.log(), p.log()), kl(q.log(), star.log())
    expected = (q * w.reward).sum(1)
    problem = problem_of(w, one(w))
    measured, samples = BestOf(n).measured(problem, NOTHING, ruler_of(problem, 3000, w.log_z()[1:]))
    e = measured.estimates()
    assert near(e["reward"].value, e["reward"].stderr, float(expected[1]))
    assert near(e["kl_to_reference"].value, e["kl_to_reference"].stderr, float(to_reference[1]))
    assert near(e["kl_to_target"].value, e["kl_to_target"].stderr, float(to_target[1]))
    objective = float(expected[1] - w.beta * to_reference[1])
    assert near(e["objective"].value, e["objective"].stderr, objective)
    assert e["kl_to_reference"].value <= kl_upper_bound(n) + 1e-9
    assert float((frequencies(w, samples)[1] - q[1]).abs().sum()) < 0.15


@pytest.mark.parametrize("n", [2, 5])
def test_without_many_groups_a_prompt_best_of_n_gives_bounds_that_hold(n):
    w = world()
    q, p, star = best_of_law(w, n), w.p_ref(), w.p_star()
    problem = problem_of(w, w.prompts.select(torch.arange(400) % 2))
    measured, _ = BestOf(n).measured(problem, NOTHING, ruler_of(problem, 1, w.log_z()[torch.arange(400) % 2]))
    e = measured.estimates()
    assert "kl_to_reference" not in e and "kl_to_target" not in e
    assert e["kl_to_reference_at_most"].value == pytest.approx(math.log(n) - (n - 1) / n)
    assert e["kl_to_reference_at_most"].value > float(kl(q.log(), p.log()).mean())
    most = e["kl_to_target_at_most"]
    assert most.value + 4 * most.stderr > float(kl(q.log(), star.log()).mean())
    least, truth = e["objective_at_least"], float(((q * w.reward).sum(1) - w.beta * kl(q.log(), p.log())).mean())
    assert least.value - 4 * least.stderr < truth
    rows = {row["metric"]: row for row in measured.rows("", "best of n", 0)}
    assert rows["kl_to_reference_at_most"]["low"] is None
    assert rows["kl_to_reference_at_most"]["high"] == pytest.approx(math.log(n) - (n - 1) / n)
    assert rows["kl_to_target_at_most"]["low"] is None and rows["kl_to_target_at_most"]["high"] > most.value
    assert rows["objective_at_least"]["high"] is None and rows["objective_at_least"]["low"] < least.value


def test_the_jackknife_is_leaving_out_group_by_group_and_its_error_is_the_spread_of_new_groups():
    own = stream(0, "jackknife")
    rewards = (own.uniform(range(40), 4) * 3).floor().double()
    pseudo = pseudo_values(rewards)

    def plug_in(x: torch.Tensor) -> float:
        return float(kl_of_counts(x.unique(return_counts=True)[1].double(), 4))

    left = torch.tensor([plug_in(torch.cat([rewards[:g], rewards[g + 1 :]])) for g in range(40)])
    assert torch.allclose(pseudo, 40 * plug_in(rewards) - 39 * left.double(), atol=1e-9)
    weights, groups = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64), 200
    truth = float(kl_of_counts(weights, 4))
    draws = (own.child("new").uniform(range(400), groups * 4)[..., None] > weights.cumsum(0)).sum(-1).double()
    found = [pseudo_values(row.reshape(groups, 4)) for row in draws]
    means = torch.stack([x.mean() for x in found])
    errors = torch.stack([x.std() / math.sqrt(groups) for x in found])
    assert abs(float(means.mean()) - truth) < 4 * float(means.std()) / math.sqrt(400)
    assert float(errors.mean()) == pytest.approx(float(means.std()), rel=0.15)


def test_without_ties_best_of_n_is_as_far_as_its_bound():
    rewards = stream(0, "no ties").uniform(range(500), 8).double()
    assert float(pseudo_values(rewards).mean()) == pytest.approx(kl_upper_bound(8), abs=1e-3)


# ---- rejection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos_ids", ENDS)
def test_rejection_is_pi_star_and_says_so(eos_ids):
    w = world(eos_ids=eos_ids)
    star, p = w.p_star(), w.p_ref()
    problem = problem_of(w)
    measured, samples = Rejection().measured(problem, NOTHING, ruler_of(problem, 4000, w.log_z()))
    assert float((frequencies(w, samples) - star).abs().sum(1).max()) < 0.1
    values = measured.values
    assert not values["kl_to_target"].any() and not values["kl_from_target"].any()
    assert torch.allclose(values["kl_to_reference"], kl(star.log(), p.log()), atol=0.1)
    assert torch.allclose(values["objective"], w.beta * w.log_z())
    rate = w.log_z() - max(w.atoms) / w.beta
    assert torch.allclose(values["tries"], (-rate).exp(), rtol=0.1)
    rows = {row["metric"]: row for row in measured.rows("", "rejection", 0)}
    assert rows["kl_to_target"]["interval"] == "exact" and rows["kl_to_target"]["high"] == 0


def test_rejection_with_a_log_z_that_errs_passes_the_error_on():
    w = world()
    problem = problem_of(w, one(w))
    log_z = LogZ(float(w.log_z()[1]), 0.05, source="a guess")
    measured, _ = Rejection().measured(problem, NOTHING, ruler_of(problem, 1000, log_z))
    rows = {row["metric"]: row for row in measured.rows("", "rejection", 0)}
    assert rows["kl_to_reference"]["stderr_log_z"] == pytest.approx(0.05)
    assert rows["objective"]["stderr"] == pytest.approx(0.05 * w.beta)
    assert rows["kl_to_target"]["high"] == 0


def test_rejection_without_a_bound_says_why_not():
    assert "upper bound" in (Rejection().why_not(Facts(1.0)) or "")
    assert "by construction" in (Rejection().why_not(Facts(1.0, "conditions")) or "")
    assert Rejection().why_not(Facts(1.0, r_max=1.0)) is None


# ---- sequential Monte Carlo -----------------------------------------------------------------------------------


def rough_twist(w: World) -> Learner:
    """Half of the optimal twist: a proposal that is off."""
    values: TableValues = w.twist({prefix: x / 2 for prefix, x in w.log_psi_star().items()})
    return Learner(values, values=values)


@pytest.mark.parametrize("eos_ids", ENDS)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("guided", [False, True])
def test_the_bound_of_smc_holds_and_closes_with_particles(guided, threshold, eos_ids):
    w = world(eos_ids=eos_ids, beta=0.3)
    star, p, n = w.p_star(), w.p_ref(), 6000
    problem, found = problem_of(w, one(w)), {}
    for k in (2, 16):
        method = SMCDecoding(k, threshold, CTL() if guided else None)
        learner = rough_twist(w) if guided else NOTHING
        ruler = ruler_of(problem, n, w.log_z()[1:])
        measured, samples = method.measured(problem, learner, ruler)
        q, e = frequencies(w, samples)[1], measured.estimates()
        chance = (q > 0).sum() / n  # what counting draws adds to an entropy, at most
        for metric, truth in (
            ("kl_to_target_at_most", float(kl(q.log(), star[1].log()))),
            ("kl_to_reference_at_most", float(kl(q.log(), p[1].log()))),
        ):
            assert e[metric].value + 4 * e[metric].stderr > truth - float(chance), metric
        objective = float((q * w.reward[1]).sum() - w.beta * kl(q.log(), p[1].log()))
        least = e["objective_at_least"]
        assert least.value - 4 * least.stderr < objective + w.beta * float(chance)
        assert near(e["reward"].value, 1e-6, float((q * w.reward[1]).sum()))
        found[k] = e["kl_to_target_at_most"].value
    assert 0 < found[16] < 0.3 * found[2]


def test_one_particle_is_a_draw_of_its_proposal_and_with_psi_star_of_pi_star():
    w = world(beta=0.3)
    problem = problem_of(w, one(w))
    ruler = ruler_of(problem, 4000, w.log_z()[1:])
    plain, drawn = SMCDecoding(1).measured(problem, NOTHING, ruler)
    assert float((frequencies(w, drawn)[1] - w.p_ref()[1]).abs().sum()) < 0.15
    values = w.twist(w.log_psi_star())
    best, _ = SMCDecoding(1, 0.5, CTL()).measured(problem, Learner(values, values=values), ruler)
    assert best.estimates()["kl_to_target_at_most"].value == pytest.approx(0, abs=1e-5)
    exact = float(kl(w.p_ref()[1].log(), w.p_star()[1].log()))
    e = plain.estimates()["kl_to_target_at_most"]
    assert near(e.value, e.stderr, exact)  # of one particle the bound is the distance itself


def test_batches_change_nothing():
    w = world()
    problem = problem_of(w)
    for method in (BestOf(4), SMCDecoding(4, 0.5), Reference()):
        found = [
            method.measured(problem, Learner(None, policy=w.reference), Ruler(
                problem.target, w.prompts, HORIZON, stream(3), n=30, batch_size=size, log_z=w.log_z()))[0].values
            for size in (7, 1000)
        ]  # fmt: skip
        assert found[0].keys() == found[1].keys()
        assert all(torch.allclose(found[0][name], found[1][name], equal_nan=True) for name in found[0])


def test_measurements_are_kept_whole(tmp_path):
    w = world()
    problem = problem_of(w, one(w))
    log_z = LogZ(float(w.log_z()[1]), 0.05, source="a guess")
    for method in (BestOf(4), SMCDecoding(4), Rejection()):
        measured, samples = method.measured(problem, NOTHING, ruler_of(problem, 50, log_z))
        measured.save(tmp_path / "measurement.safetensors")
        samples.save(tmp_path / "samples.safetensors")
        again = Measurement.load(tmp_path / "measurement.safetensors")
        by_metric = [{row["metric"]: row for row in each.rows("", "m", 0)} for each in (again, measured)]
        assert by_metric[0] == by_metric[1]
