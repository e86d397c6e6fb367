"""The figures of `recipes/mathematics.py`: every number by hand, by plain sums, or by another road to it."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tiltlm.cli import main
from tiltlm.commands.help import about
from tiltlm.data.letters import UNSURE, answers, paid
from tiltlm.exact import solve
from tiltlm.policies.dpo import dpo_loss
from tiltlm.policies.ipo import ipo_loss
from tiltlm.recipes import figures, recipe
from tiltlm.run import ensure
from tiltlm.samples import Tokens
from tiltlm.seeds import stream
from tiltlm.stages import aleatoric, baselines_solve
from tiltlm.stages.aleatoric_solve import STYLES, standing, tilted
from tiltlm.stages.baselines_solve import BASELINES, World
from tiltlm.stages.drift_solve import Drift, diversity, factor_of_drawn, of_accepted, of_drawn
from tiltlm.stages.margins_solve import dpo_margin, ipo_margin
from tiltlm.target import Target


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("mathematics")
    return {name: ensure(recipe(name), root) for name in figures()}


@pytest.fixture(scope="module")
def found(runs):
    """name of the figure -> (method, metric) -> value."""
    rows = {name: json.loads((run.folder / "report.json").read_text()) for name, run in runs.items()}
    return {name: {(r["method"], r["metric"]): r["value"] for r in of} for name, of in rows.items()}


# ---- rationales for an answer that is chance ------------------------------------------------------------------------


def test_every_rationale_is_right_one_time_in_four():
    for epsilon in (0.0, 0.01, 0.1, 0.6):
        p = answers(epsilon)
        torch.testing.assert_close(p.sum(1), torch.ones(5).double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(p.mean(1), torch.full((5,), 0.25, dtype=torch.float64), atol=1e-12, rtol=0)
    assert answers(0.3)[1].tolist() == pytest.approx([0.1, 0.7, 0.1, 0.1])


@pytest.mark.parametrize(
    ("epsilon", "beta", "p_unsure"),
    [(0, 0.1, 1), (0, 1, 1), (0, 10, 1), (0.01, 0.1, 1), (0.01, 1, 0.819), (0.01, 10, 0.250), (0.1, 0.1, 0.99997),
     (0.1, 1, 0.451), (0.1, 10, 0.220)],
)  # fmt: skip
def test_the_expected_reward_asks_for_the_unsure_rationale(found, epsilon, beta, p_unsure):
    """z* has E r = −ln 4; a letter ¼ ln(1 − eps) + ¾ ln(eps/3); P(z*) = 1/(1 + 4 exp((E r(letter) − E r(z*))/beta))."""
    value = found["aleatoric/solve"][f"E_y[r], eps {epsilon:g}", f"p_unsure/{beta:g}"]
    letter = (math.log(1 - epsilon) + 3 * math.log(epsilon / 3)) / 4 if epsilon else -math.inf
    assert value == pytest.approx(1 / (1 + 4 * math.exp((letter + math.log(4)) / beta)), abs=1e-12)
    assert value == pytest.approx(p_unsure, abs=5e-6 if p_unsure == 0.99997 else 5e-4)


@pytest.mark.parametrize(("beta", "p_unsure"), [(0.5, 1 / 17), (1.0, 1 / 5), (2.0, 1 / 3)])
def test_the_mean_of_the_tilts_by_hand(found, beta, p_unsure):
    """eps 0: E exp(r/beta) of a letter is ¼, of z* (¼)^(1/beta): P(z*) = 1/17, 1/5, 1/3."""
    value = found["aleatoric/solve"]["E_y[exp(r/beta)], eps 0", f"p_unsure/{beta:g}"]
    assert value == pytest.approx(p_unsure, abs=1e-12)


def test_the_log_of_the_mean_is_indifferent(found):
    """E_y p(y|z) = ¼ of every rationale, so r = −1.386 for all and pi* = pi_ref."""
    fixed = {k: v for k, v in found["aleatoric/solve"].items() if k[0].startswith("log E_y")}
    assert len(fixed) == 15 and all(value == pytest.approx(0.2, abs=1e-12) for value in fixed.values())
    assert answers(0.1).mean(1).log().tolist() == pytest.approx([-1.3863] * 5, abs=5e-5)


def test_matching_one_sample_and_every_one(found):
    """y = A, eps 0: p(A|z) = 1, 0, 0, 0, ¼, of sum 5/4: .8 and .2. Averaged over y every rationale has .2."""
    value = found["aleatoric/solve"]
    for epsilon in (0, 0.01, 0.1):
        one, every = (f"matched, {y}, eps {epsilon:g}" for y in ("y = A", "every y"))
        by_hand = {"p_a": 0.8 * (1 - epsilon), "p_b": 0.8 * epsilon / 3, "p_unsure": 0.2}
        assert {m: value[one, m] for m in by_hand} == pytest.approx(by_hand, abs=1e-12)
        assert [value[every, m] for m in by_hand] == pytest.approx([0.2] * 3, abs=1e-12)


def test_the_log_odds_of_one_sample_have_no_maximum_but_their_mean_has(found):
    """At .8/.2: .8 ln 4 + .2 ln ¼ = .6 ln 4. A weight of more than ½ is climbed without end. With .2 each, (1 − p_i) ≥
    4·(product of the others)^¼, so no policy passes the uniform one's ln ¼."""
    value = found["aleatoric/solve"]
    assert value["log-odds, y = A, matched, eps 0", "log_odds"] == pytest.approx(0.6 * math.log(4), abs=1e-12)
    assert value["log-odds, y = A, nearly sure, eps 0", "log_odds"] > 9
    even = torch.full((5,), 0.2, dtype=torch.float64)
    assert aleatoric.log_odds(even, even) == pytest.approx(math.log(0.25), abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 4.0):
        for pi in torch.randn(200, 5, generator=generator).double().mul(scale).softmax(1):
            assert aleatoric.log_odds(even, pi) <= math.log(0.25) + 1e-12


def test_the_marginal_likelihood_is_indifferent(found):
    """p(y) = ¼ under each of three policies, −1.386; EM moves none of them, and climbs from a lopsided one."""
    for name, pi in standing().items():
        method = f"one EM step from {name}, eps 0"
        value = found["aleatoric/solve"]
        assert value[method, "log_likelihood"] == pytest.approx(-math.log(4), abs=1e-12)
        assert value[method, "p_unsure"] == pytest.approx(pi[UNSURE].item(), abs=1e-12)
        assert value[method, "p_a"] == pytest.approx(pi[0].item(), abs=1e-12)
    p, lopsided = answers(0.1), torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    stepped = aleatoric.em_step(lopsided, p)
    assert stepped.sum().item() == pytest.approx(1) and not torch.allclose(stepped, lopsided, atol=1e-3)
    lower, higher = (aleatoric.log_likelihood(pi, p) for pi in (lopsided, stepped))
    assert lower + 1e-3 < higher < -math.log(4)


def test_bits_by_hand(found):
    """H(y) = 2; H(y|z*) = 2; H(y|letter) = h(eps) + eps log2 3: I = 1.6, 1.523, 1.098. Code saved: −∞, −3.340, −1.375."""
    value = found["aleatoric/solve"]
    table = {0: (1.6, None), 0.01: (1.523, -3.340), 0.1: (1.098, -1.375)}
    for epsilon, (information, code) in table.items():
        letter = -sum(x * math.log2(x) for x in (1 - epsilon, epsilon) if x) + epsilon * math.log2(3)
        method = f"eps {epsilon:g}"
        assert value[method, "information"] == pytest.approx(2 - 0.8 * letter - 0.2 * 2, abs=1e-12)
        assert value[method, "information"] == pytest.approx(information, abs=5e-4)
        assert value[method, "true_information"] == pytest.approx(0, abs=1e-12)
        if code is None:
            assert (method, "code_change") not in value
        else:
            assert value[method, "code_change"] == pytest.approx(code, abs=6e-4)
        letters = 2 + (math.log2(1 - epsilon) + 3 * math.log2(epsilon / 3)) / 4 if epsilon else -math.inf
        assert value.get((method, "code_change_letters"), -math.inf) == pytest.approx(letters, abs=1e-12)
        assert value[method, "code_change_unsure"] == pytest.approx(0, abs=1e-12)
    assert aleatoric.code_change(aleatoric.UNIFORM.exp(), answers(0.0)) == -math.inf


def test_the_best_model_ignores_the_rationale():
    """Gibbs: E_y log p(y|z) ≤ −ln 4, with equality only where p(y|z) is uniform. So no model's rationales save a bit."""
    pi, generator = aleatoric.UNIFORM.exp(), torch.Generator().manual_seed(0)
    assert aleatoric.code_change(pi, torch.full((5, 4), 0.25).double()) == pytest.approx(0, abs=1e-12)
    for scale in (0.1, 1.0, 4.0):
        for p in torch.randn(100, 5, 4, generator=generator).double().mul(scale).softmax(2):
            assert aleatoric.code_change(pi, p) < 0


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 10.0])
def test_where_the_answer_is_certain_the_three_objectives_are_one(beta):
    """y = A always, eps .01: every one tilts by p(A|z)^(1/beta), .99, .0033 (three), .25. At beta 1 z* has .2 as before."""
    weight = [x ** (1 / beta) for x in (0.99, 0.01 / 3, 0.01 / 3, 0.01 / 3, 0.25)]
    for tilt in STYLES:
        found = tilted(tilt, answers(0.01)[:, :1], beta)
        assert found.tolist() == pytest.approx([x / sum(weight) for x in weight], abs=1e-12)
    documented = {0.1: 1.0, 0.5: 0.940, 1.0: 0.792}
    assert found[0].item() == pytest.approx(documented.get(beta, found[0].item()), abs=5e-4)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_a_reward_model_of_the_mean_is_not_the_mean_over_single_rewards(beta):
    """Tilting by what a regression of r on z learns, E_y[r], or by each r(z, y) alone and averaging the policies: the
    latter is pi_ref·E_y[exp(r/beta)], as Z is the same for every y."""
    p = answers(0.01)
    single = torch.stack([tilted("E_y[r]", p[:, [y]], beta) for y in range(4)]).mean(0)
    torch.testing.assert_close(single, aleatoric.mean_of_tilts(p, beta), atol=1e-12, rtol=0)
    assert tilted("E_y[r]", p, beta)[UNSURE] > single[UNSURE] + 0.2


def test_j_is_beta_times_log_z_less_kl_by_plain_sums(found):
    """For random pi at every case to 1e-12; and one case by python's own sums. A reward off by 0.01 would be seen."""
    far = [v for (_, metric), v in found["aleatoric/solve"].items() if metric == "deviation"]
    assert len(far) == 10 and max(far) < 1e-12
    reward, pi, beta = [0.3, -1.0, 0.0, 2.0, 0.5], [0.1, 0.2, 0.3, 0.15, 0.25], 0.7
    z = sum(0.2 * math.exp(r / beta) for r in reward)
    star = [0.2 * math.exp(r / beta) / z for r in reward]
    j = sum(p * (r - beta * math.log(p / 0.2)) for p, r in zip(pi, reward, strict=True))
    kl = sum(p * math.log(p / q) for p, q in zip(pi, star, strict=True))
    assert j == pytest.approx(beta * (math.log(z) - kl), abs=1e-12)
    solution = aleatoric.solved(torch.tensor(reward, dtype=torch.float64), beta)
    assert solution.objective(torch.tensor(pi, dtype=torch.float64).log()[None]).item() == pytest.approx(
        j, abs=1e-12
    )
    wrong = replace(solution, reward=solution.reward + torch.tensor([0.01, 0, 0, 0, 0]))
    assert aleatoric.deviation(wrong, torch.Generator().manual_seed(0)) > 1e-4


def test_pi_star_of_a_right_or_wrong_answer_by_hand():
    """Success .35, beta .2: Z = 1 + .35(e⁵ − 1) = 52.594; accuracy .9876, KL .9756, log Z 3.9626, J .7925."""
    reference, _ = paid(torch.zeros(5))
    with torch.no_grad():
        reference.tables[0][0, 0] = torch.tensor(
            [0.35, 0.65 / 4, 0.65 / 4, 0.65 / 4, 0.65 / 4], dtype=torch.float64
        ).log()
    right = Target(reference, lambda samples: (samples.tokens[:, 0] == 0).double(), 0.2)
    found = solve(right, Tokens.of([[0]]), 1)
    log_star = found.log_pi_star
    assert found.log_z.item() == pytest.approx(3.9626, abs=5e-5)
    assert log_star[0, 0].exp().item() == pytest.approx(0.9876, abs=5e-5)
    assert (log_star.exp() * (log_star - found.log_ref)).sum().item() == pytest.approx(0.9756, abs=5e-5)
    assert found.objective(log_star).item() == pytest.approx(0.7925, abs=5e-5)


def test_preferences_between_chances_teach_nothing(found):
    """Every label: no gradient at pi_ref. One label: the pairs are ranked right, and on fresh labels half of them."""
    value = found["aleatoric/solve"]
    assert value["every label, eps 0", "slope"] < 1e-15 and value["every label, eps 0", "margin"] < 1e-12
    assert value["one label, eps 0", "slope"] > 0.01 and value["one label, eps 0", "margin"] > 5
    assert value["one label, eps 0", "train_ranking"] == 1
    assert value["one label, eps 0", "fresh_ranking"] == pytest.approx(0.5, abs=1e-12)


def test_one_pair_of_each_question_is_learnt_by_heart_and_says_nothing_of_another(runs):
    """Train ranking 1 of 1000 questions; of a held-out pair of each ½ within four errors."""
    rows = json.loads((runs["aleatoric/solve"].folder / "report.json").read_text())
    found = {r["metric"]: r for r in rows if r["method"] == "one pair each, eps 0"}
    assert found["train_ranking"]["value"] == 1 and found["train_ranking"]["n"] == 1000
    held_out = found["fresh_ranking"]
    assert 0 < held_out["stderr"] < 0.02 and abs(held_out["value"] - 0.5) < 4 * held_out["stderr"]


def test_drawn_pairs_are_those_of_the_preferences_and_their_margin_follows_dpo_by_hand():
    """Frequencies of 40,000 pairs; and a pair's margin by its recursion: m grows by 2·σ(−beta·m) a step at rate 1/beta."""
    wins, p = aleatoric.preferences(answers(0.1), range(4)), answers(0.1)
    drawn = aleatoric.one_pair_each(p, 40_000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.sum((1, 2)), torch.ones(40_000).double())
    torch.testing.assert_close(drawn.mean(0), wins / wins.sum(), atol=4 * math.sqrt(0.06 / 40_000), rtol=0)
    log_pi = aleatoric.learnt(drawn[:3], 0.1, 30)
    m = 0.0
    for _ in range(30):
        m += 2 / (1 + math.exp(0.1 * m))
    for one, learnt in zip(drawn[:3], log_pi, strict=True):
        chosen, rejected = one.nonzero()[0].tolist()
        assert (learnt[chosen] - learnt[rejected]).item() == pytest.approx(m, abs=1e-12)
    assert aleatoric.ranking(log_pi, drawn[:3].transpose(1, 2)).tolist() == [
        0,
        0,
        0,
    ]  # the labels the other way round


def test_preferences_and_dpo_s_slope_by_hand():
    """y = A, eps 0: "it is A" beats B surely and z* in ¾; z* beats B in ¼. The weights' sum: 3 + ¾ + ¾ = 4.5. At pi_ref
    every pair pulls beta/2 on its two logits: A gets −(beta/2)·3.75/4.5 (the softmax's own part cancels)."""
    wins = aleatoric.preferences(answers(0.0), [0])
    assert wins[0].tolist() == [0, 1, 1, 1, 0.75] and wins[4].tolist() == [0, 0.25, 0.25, 0.25, 0]
    assert wins.sum() == 4.5
    slope = aleatoric.slope(aleatoric.UNIFORM, wins, 0.1)
    assert slope[0].item() == pytest.approx(-0.05 * 3.75 / 4.5, abs=1e-12)
    assert slope[4].item() == pytest.approx(0.05 * (0.75 - 0.75) / 4.5, abs=1e-12)


def test_any_order_ranks_half_of_fresh_pairs_right():
    fresh = aleatoric.preferences(answers(0.1), range(4))
    torch.testing.assert_close(fresh, fresh.T)
    generator = torch.Generator().manual_seed(0)
    for log_pi in torch.randn(20, 5, generator=generator).double().log_softmax(1):
        assert aleatoric.ranking(log_pi, fresh) == pytest.approx(0.5, abs=1e-12)
    better = answers(0.1)
    better[0] = torch.tensor(
        [0.9, 0.9, 0.9, 0.9]
    )  # a rationale that is right more often: now an order is worth something
    aware = aleatoric.preferences(better, range(4))
    assert aleatoric.ranking(torch.arange(5, 0, -1).double().log_softmax(0), aware) > 0.6
    assert aleatoric.slope(aleatoric.UNIFORM, aware, 0.1).norm() > 1e-3


# ---- baselines ------------------------------------------------------------------------------------------------------


def brute_force(world: World, k: int, baseline) -> torch.Tensor:
    """E g by loops over tuples in plain numbers; baseline(returns, k) -> b."""
    pi, r = world.logits.softmax(0).tolist(), world.log_p.tolist()
    total = torch.zeros(len(pi)).double()
    for drawn in itertools.product(range(len(pi)), repeat=k):
        chance = math.prod(pi[z] for z in drawn)
        returns = [r[z] for z in drawn]
        for i, z in enumerate(drawn):
            score = torch.tensor([(s == z) - pi[s] for s in range(len(pi))], dtype=torch.float64)
            total += chance / k * (returns[i] - baseline(returns, i)) * score
    return total


def mean_exp(xs: list[float]) -> float:
    return math.log(sum(math.exp(x) for x in xs) / len(xs))


BY_HAND = {
    "none": lambda r, i: 0.0,
    "mean of the others": lambda r, i: (sum(r) - r[i]) / (len(r) - 1),
    "log-mean of the others": lambda r, i: mean_exp(r[:i] + r[i + 1 :]),
    "mean of all": lambda r, i: sum(r) / len(r),
    "log-mean of all": lambda r, i: mean_exp(r),
    "mean of all, clamped": lambda r, i: min(sum(r) / len(r), r[i]),
}
"""b_k by its definition; clamping R − b at 0 is a baseline that is never above R."""


def test_every_baseline_has_a_definition_of_its_own():
    assert list(BY_HAND) == list(BASELINES)


def test_advantages_of_one_tuple_by_hand():
    """p = .5, .1, .3, each R − b: of the first ln .5 − ½ ln .03, ln .5 − ln .2, ln .5 − ⅓ ln .015, ln .5 − ln .3."""
    returns = [math.log(p) for p in (0.5, 0.1, 0.3)]
    first = {"mean of the others": 0.03**0.5, "log-mean of the others": 0.2, "mean of all": 0.015 ** (1 / 3),
             "log-mean of all": 0.3, "mean of all, clamped": 0.015 ** (1 / 3), "none": 1.0}  # fmt: skip
    for name, advantage in BASELINES.items():
        found = advantage(torch.tensor([returns], dtype=torch.float64))[0].tolist()
        assert found[0] == pytest.approx(math.log(0.5 / first[name]), abs=1e-12)
        assert found == pytest.approx([r - BY_HAND[name](returns, i) for i, r in enumerate(returns)], abs=1e-12)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_expected_gradients_by_loops_over_all_tuples(name, k):
    world = World.random(3, seed=1)
    g, p = world.estimates(name, k)
    mean = p @ g
    torch.testing.assert_close(mean, brute_force(world, k, BY_HAND[name]), atol=1e-12, rtol=0)
    formula = world.formula(name, k)
    if formula is not None:
        torch.testing.assert_close(mean, formula, atol=1e-12, rtol=0)


def test_the_gradient_itself_by_differences():
    world, step = World.random(4, seed=2), 1e-6
    for z in range(4):
        up, down = (
            (world.logits + sign * step * torch.eye(4).double()[z]).softmax(0) @ world.log_p for sign in (1, -1)
        )
        assert world.slope()[z].item() == pytest.approx((up - down).item() / (2 * step), abs=1e-8)


def test_which_baselines_are_unbiased(found):
    """Length along ∇J: 1 without a baseline or with that of the others, (K − 1)/K with the mean of all."""
    value = found["baselines/solve"]
    for k in (2, 3, 4):
        for name in ("none", "mean of the others", "log-mean of the others", "mean of all", "log-mean of all"):
            assert value[f"{name}, K {k}", "apart"] < 1e-12
        for name in ("none", "mean of the others", "log-mean of the others"):
            assert value[f"{name}, K {k}", "length"] == pytest.approx(1, abs=1e-12)
        assert value[f"mean of all, K {k}", "length"] == pytest.approx((k - 1) / k, abs=1e-12)
        assert value[f"mean of all, K {k}", "cosine_least"] == pytest.approx(1, abs=1e-12)
        assert value[f"log-mean of all, K {k}", "cosine_least"] < 0.99
        assert value[f"mean of the others, K {k}", "spread"] < value[f"none, K {k}", "spread"]
    paper = [value[f"log-mean of all, K {k}", "cosine_least"] for k in (2, 3, 4)]
    code = [value[f"mean of all, clamped, K {k}", "cosine_least"] for k in (2, 3, 4)]
    assert paper == sorted(paper) and max(code) < 0.5  # the paper's goes away with K, the clamp does not
    typical = [value[f"mean of all, clamped, K {k}", "cosine_median"] for k in (2, 3, 4)]
    assert 0.98 > typical[0] > typical[1] > typical[2] > 0.9


def test_more_draws_do_not_cure_the_clamp():
    """One policy by plain loops over its tuples: the cosine falls, .981, .970, .964."""
    world = World.random(5, 0, 149)
    plain = [brute_force(world, k, BY_HAND["mean of all, clamped"]) for k in (2, 3, 4)]
    cosines = [torch.cosine_similarity(g, world.slope(), dim=0).item() for g in plain]
    assert cosines == pytest.approx([0.981, 0.970, 0.964], abs=6e-4)
    assert [world.cosine("mean of all, clamped", k) for k in (2, 3, 4)] == pytest.approx(cosines, abs=1e-12)


def test_a_baseline_that_sees_its_own_draw_is_noticed(monkeypatch):
    """Planted: "the others" that count the draw itself."""
    monkeypatch.setattr(baselines_solve, "others", lambda r: r.mean(1, keepdim=True))
    assert World.random(5, 0).measure("mean of the others", 3)["apart"] > 0.1


# ---- drift ----------------------------------------------------------------------------------------------------------


def test_the_recursion_s_table(found):
    """n = 20: .8, ·(19/20) = .76, ·(19/20)^5 = .619, ·(19/20)^10 = .479; the simulation within four errors."""
    value = found["drift/solve"]
    for t, expected in {0: 0.8, 1: 0.76, 5: 0.619, 10: 0.479}.items():
        assert value["20 accepted, exact", f"diversity/{t}"] == pytest.approx(expected, abs=5e-4)
        assert value["20 accepted, exact", f"diversity/{t}"] == pytest.approx(0.8 * 0.95**t, abs=1e-12)


def test_simulations_agree_with_the_recursion(runs):
    """Within four errors, of diversity and of P(z*); a neutral iteration of 10 instead of 20 would be seen."""
    rows = json.loads((runs["drift/solve"].folder / "report.json").read_text())
    found = {(r["method"], r["metric"]): r for r in rows}
    for kind in ("20 accepted", "80 drawn"):
        for metric in ("diversity/1", "diversity/5", "diversity/10", "p_unsure"):
            seen, exact = found[f"{kind}, simulated", metric], found[f"{kind}, exact", metric]["value"]
            assert abs(seen["value"] - exact) < 4 * seen["stderr"]
    ten = 0.8 * (1 - 1 / 10) ** 5
    assert abs(found["20 accepted, simulated", "diversity/5"]["value"] - ten) > 0.1


def test_one_iteration_of_two_accepted_by_enumeration():
    """pi = (.5, .3, .2, 0, 0), n 2: two draws differ with chance Σ_{i≠j} p_i p_j = .62, and then 1 − Σpi² = ½: .31."""
    pi = torch.tensor([0.5, 0.3, 0.2, 0, 0], dtype=torch.float64).expand(40_000, -1)
    after = of_accepted(pi, answers(0.1), 2, stream(0, "test-drift").generator())
    seen = diversity(after)
    assert abs(seen.mean().item() - 0.31) < 4 * seen.std().item() / 200
    assert diversity(pi[0]).item() * (1 - 1 / 2) == pytest.approx(0.31)
    assert after[:, 3:].sum() == 0


def test_of_two_draws_those_that_are_right_are_kept():
    """m of two draws binomial(2, ¼): P(0) = 9/16, P(1) = 6/16, P(2) = 1/16; factor 9/16 + 0 + ½·1/16 = 19/32."""
    assert factor_of_drawn(2) == pytest.approx(19 / 32, abs=1e-12)
    pi = torch.full((40_000, 5), 0.2, dtype=torch.float64)
    after = of_drawn(pi, answers(0.0), 2, stream(0, "test-drift").generator())
    seen = diversity(after)
    assert abs(seen.mean().item() - 0.8 * 19 / 32) < 4 * seen.std().item() / 200
    unmoved = (after == 0.2).all(1).double().mean().item()
    assert abs(unmoved - 9 / 16) < 4 * math.sqrt(9 / 16 * 7 / 16 / 40_000)


def test_where_a_rationale_is_right_more_often_it_wins():
    """The neutral model is a claim about success: with p(right) ½ for z* and ¼ for the others z* takes over."""
    p = answers(0.1)
    p[UNSURE] = 0.5
    pi, generator = torch.full((500, 5), 0.2, dtype=torch.float64), stream(0, "test-drift").generator()
    for _ in range(10):
        pi = of_accepted(pi, p, 20, generator)
    assert pi[:, UNSURE].mean() > 0.9


# ---- margins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("margin", "loss"), [(dpo_margin, dpo_loss), (ipo_margin, ipo_loss)])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_gradient_descent_on_the_library_s_losses_follows_the_flow(margin, loss, beta):
    """1000 steps at rate 1e-3 on the logits of two completions beside a third: t = 1."""
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    log_ref = logits.log_softmax(0)
    for _ in range(1000):
        logits.requires_grad_()
        h = logits.log_softmax(0) - log_ref
        (slope,) = torch.autograd.grad(loss(h[:1], h[1:2], beta).sum(), logits)
        logits = (logits - 1e-3 * slope).detach()
    h = logits.log_softmax(0) - log_ref
    assert (h[0] - h[1]).item() == pytest.approx(margin(beta, 1.0), rel=3e-3)


def test_margins_by_hand(found):
    """DPO: beta 1, t = (e)/2 has root 1: 1 + e = 1 + 2t. Ten times the time adds ln 10/beta at last. IPO ends at 5."""
    assert dpo_margin(1.0, math.e / 2) == pytest.approx(1, abs=1e-12)
    assert dpo_margin(0.1, 1e12) - dpo_margin(0.1, 1e11) == pytest.approx(math.log(10) / 0.1, abs=1e-3)
    value = found["margins/solve"]
    assert value["ipo, beta_pi 0.1", "margin/1e+08"] == pytest.approx(1 / (2 * 0.1), abs=1e-12)
    dpo = [value["dpo, beta_pi 0.1", f"margin/{t:g}"] for t in (1.0, 1e2, 1e4, 1e6, 1e8)]
    assert dpo == sorted(dpo) and dpo[-1] > 140
    for beta, t in itertools.product((0.1, 0.5), (1e-6, 1.0, 1e8)):
        x = beta * dpo_margin(beta, t)
        assert x + math.exp(x) == pytest.approx(1 + 2 * beta**2 * t, rel=1e-12)


# ---- figures that stand alone ---------------------------------------------------------------------------------------


def test_the_same_rows_twice_a_picture_and_a_table(runs, tmp_path, capsys):
    for name, run in runs.items():
        again = ensure(recipe(name), tmp_path)
        assert (again.folder / "report.json").read_bytes() == (run.folder / "report.json").read_bytes()
        picture = run.folder / f"{name.partition('/')[0]}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        run.recipe.show(run)
        assert picture.name in capsys.readouterr().out


def test_every_figure_is_listed_without_torch_says_what_it_is_and_has_the_name_it_is_called_by(tmp_path):
    script = "import sys; from tiltlm.cli import main; main(['list', 'solve']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, (_, line) in figures().items():
        assert recipe(name).name == name and f"  {name} " in done.stdout
        assert line.partition(":")[0].lower() in about(recipe(name)).lower()


def test_the_demo_shows_a_figure_alone(tmp_path, capsys):
    """The numbers of `tiltlm run drift/solve --seed 1`, under --out; what there is no demo of is said."""
    assert main(["demo", "drift", "--seed", "1", "--out", str(tmp_path / "demo")]) == 0
    assert "20 accepted, exact" in capsys.readouterr().out
    (report,) = (tmp_path / "demo/runs/drift/solve").glob("*/report.json")
    same = ensure(replace(recipe("drift/solve"), seed=1), tmp_path)
    assert report.read_bytes() == (same.folder / "report.json").read_bytes()
    assert main(["demo", "drifd", "--out", str(tmp_path / "demo")]) == 2
    assert "there is no demo 'drifd'. Did you mean drift?" in capsys.readouterr().err


def test_a_figure_has_no_other_stage(capsys):
    assert main(["run", "drift/dpo"]) == 2
    assert "there is no task 'drift'. Did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("aleatoric/solve", {"epsilons": (1.0,)}, "epsilon"),
        ("aleatoric/solve", {"betas": (0.0,)}, "betas 0 must be positive"),
        ("aleatoric/solve", {"betas": ()}, "one number"),
        ("aleatoric/solve", {"questions": 0}, "questions"),
        ("baselines/solve", {"sizes": (1,)}, "two draws"),
        ("baselines/solve", {"sizes": (9,)}, "too many"),
        ("drift/solve", {"accepted": 0}, "accepted"),
        ("drift/solve", {"shown": (50,)}, "0 to 40"),
        ("drift/solve", {"runs": 1}, "two runs"),
        ("margins/solve", {"betas": (-1.0,)}, "betas -1"),
        ("margins/solve", {"times": ()}, "one number"),
    ],
)
def test_impossible_settings_are_refused(name, wrong, said):
    with pytest.raises(ValueError, match=said):
        replace(recipe(name), **wrong)


def test_the_picture_s_settings_are_the_figure_s():
    assert Drift(shown=(0, 3), iterations=3).exact("accepted", 3) == pytest.approx(0.8 * 0.95**3)
