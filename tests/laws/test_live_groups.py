"""What online methods on groups claim beyond their fixed points (those stand in `test_fixed_points`), by enumeration."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from laws.test_fixed_points import (
    CLEARLY,
    ZERO,
    groups_of_two,
    ipo_optimum,
    live_groups,
    nash,
    of_a_star_po,
    of_live,
)
from laws.world import N_PROMPTS, WORLDS, World, expected_gradient, flat_gradient, perturbed, world
from tiltlm.groups import Groups
from tiltlm.models.table import TableLM
from tiltlm.policies.a_star_po import optimal_value
from tiltlm.policies.exo_rw import group_log_ratios
from tiltlm.policies.log_variance import LogVariance
from tiltlm.policies.online_ipo import OnlineIPO
from tiltlm.policies.opo import OPO, Labels
from tiltlm.policies.rebel import REBEL
from tiltlm.policies.reinforce import Reinforce
from tiltlm.policies.trajectory_balance import TrajectoryBalance
from tiltlm.samples import Samples, Tokens


def some_groups(w: World, size: int = 4, count: int = 20) -> Groups:
    """Groups of unlike completions, drawn any way; even ones of prompt 0, odd ones of prompt 1."""
    generator = torch.Generator().manual_seed(0)
    n = w.reward.shape[1]
    rows = [torch.randperm(n, generator=generator)[:size] + (g % N_PROMPTS) * n for g in range(count)]
    return Groups(w.samples().select(torch.cat(rows)), size)


# ---- log-variance, trajectory balance -------------------------------------------------------------------------


@pytest.mark.parametrize("place", WORLDS)
def test_on_policy_the_gradient_of_log_variance_times_beta_is_that_of_rloo_batch_by_batch(place):
    """Two prompts, four draws of each: any batch at all, not on average."""
    w = WORLDS[place]()
    policy = perturbed(w.optimum())
    groups = some_groups(w, 4, N_PROMPTS)
    drawn = groups.samples.with_(log_q=policy.log_prob(groups.samples).detach())
    rloo = Reinforce("leave_one_out", w.beta)
    each = torch.full((len(drawn),), 1 / len(drawn), dtype=torch.float64)
    expected = expected_gradient(rloo, policy, drawn, each)
    found = expected_gradient(LogVariance(w.beta), policy, Groups(drawn, 4), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(w.beta * found, expected, atol=ZERO, rtol=0)
    assert expected.norm() > CLEARLY


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("kind", [LogVariance, TrajectoryBalance])
def test_the_loss_itself_is_zero_at_pi_star_whoever_drew_and_its_metrics_say_so(place, kind):
    w = WORLDS[place]()
    groups = some_groups(w)
    at_optimum, before = (kind(w.beta).loss(model, groups) for model in (w.optimum(), w.reference))
    assert at_optimum.loss.abs().max() < 1e-24 and at_optimum.metrics["variance"].abs().max() < 1e-24
    log_z = w.log_z()[groups.samples.prompt_index[::4]]
    torch.testing.assert_close(at_optimum.metrics["log_z"], log_z, atol=ZERO, rtol=0)
    assert before.loss.mean() > 0.05
    another = kind(w.beta).loss(w.table_of(w.p_star(2 * w.beta)), groups)
    assert another.metrics["variance"].mean() > 0.01


def test_of_the_policy_s_own_draws_log_z_is_at_most_log_z_on_average():
    """E_p[r/beta − h] = log Z − KL(p‖pi*)."""
    w = world()
    policy = perturbed(w.optimum())
    groups, p = live_groups(w, policy)
    found = (p * LogVariance(w.beta).loss(policy, groups).metrics["log_z"]).sum()
    q = w.density(policy)
    kl = (q * (q / w.p_star()).log()).sum() / N_PROMPTS
    torch.testing.assert_close(found, w.log_z().mean() - kl, atol=ZERO, rtol=0)
    assert kl > 0.05


@pytest.mark.parametrize("place", WORLDS)
def test_trajectory_balance_by_the_group_is_log_variance_times_k_minus_one_over_k(place):
    w = WORLDS[place]()
    policy, groups = perturbed(w.optimum()), some_groups(w, 4)
    losses = [kind(w.beta).loss(policy, groups).loss for kind in (TrajectoryBalance, LogVariance)]
    torch.testing.assert_close(losses[0], 0.75 * losses[1])
    slopes = [flat_gradient(loss.sum(), policy) for loss in losses]
    torch.testing.assert_close(slopes[0], 0.75 * slopes[1])
    assert slopes[0].norm() > CLEARLY


@pytest.mark.parametrize("place", WORLDS)
def test_rloo_on_draws_that_are_not_the_policy_s_does_not_stop_at_pi_star(place):
    """Rows drawn evenly, R with the drawer's log-probabilities: E[(R_1 − R_2)·∇(log p_1 − log p_2)] is not 0 there."""
    w = WORLDS[place]()
    policy = w.optimum()
    groups, p = live_groups(w, policy, evenly=True)
    log_q = (
        -torch.full_like(groups.samples.log_ref, math.log(w.reward.shape[1])) / groups.samples.mask.sum(1)[:, None]
    )
    drawn = groups.samples.with_(log_q=torch.where(groups.samples.mask, log_q, 0.0))
    returns = Reinforce("leave_one_out", w.beta).returns(drawn).reshape(-1, 2)
    log_p = policy.log_prob(drawn).sum(1).reshape(-1, 2)
    gap = returns[:, 0] - returns[:, 1]
    assert flat_gradient(-(p * gap * (log_p[:, 0] - log_p[:, 1])).sum() / 2, policy).norm() > CLEARLY


# ---- OPO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", WORLDS)
def test_a_coin_of_that_chance_teaches_on_average_what_the_chance_does(place):
    w = WORLDS[place]()
    policy = perturbed(w.optimum())
    groups, p = live_groups(w, policy)
    soft, sampled = (OPO(labels, 0.5, w.beta / 0.5) for labels in ("soft", "sampled"))
    chance = ((groups.reward[:, 0] - groups.reward[:, 1]) / 0.5).sigmoid()
    first, second = (
        sampled.loss(policy, replace(groups, preferred=torch.full_like(chance, x))).loss for x in (1.0, 0.0)
    )
    by_coin = flat_gradient((p * (chance * first + (1 - chance) * second)).sum(), policy)
    torch.testing.assert_close(by_coin, expected_gradient(soft, policy, groups, p), atol=ZERO, rtol=0)
    assert by_coin.norm() > CLEARLY


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("beta_r", [0.2, 3.0])
def test_pi_star_of_the_product_is_the_optimum_in_every_pair_and_so_in_the_best_and_worst_of_larger_groups(
    place, beta_r
):
    w = WORLDS[place]()
    objective = OPO("soft", beta_r, w.beta / beta_r)
    for groups in (some_groups(w, 4), some_groups(w, 2)):
        found = objective.loss(w.optimum(), objective.prepare(groups))
        assert found.metrics["gap"].abs().max() < 1e-12
        other = objective.loss(w.table_of(w.p_star(2 * w.beta)), objective.prepare(groups))
        assert other.metrics["gap"].mean() > 1e-4


@pytest.mark.parametrize("place", [place for place in WORLDS if "graded" in place])
def test_online_ipo_s_optimum_moves_with_who_draws_where_wins_do_not_add_up(place):
    """Sharp labels: on its own pairs the Nash equilibrium, on others' IPO's optimum; the two are not one."""
    w, objective = WORLDS[place](), OnlineIPO("soft", WORLDS[place]().beta, beta_r=0.1)
    sharp = replace(w, reward=10 * w.reward)
    assert of_live(w, nash(w, 0.1), objective).abs().max() < ZERO
    by_reference = groups_of_two(w, w.p_ref())
    assert expected_gradient(objective, ipo_optimum(sharp), *by_reference).abs().max() < ZERO
    assert of_live(w, ipo_optimum(sharp), objective).norm() > CLEARLY
    assert expected_gradient(objective, nash(w, 0.1), *by_reference).norm() > CLEARLY


@pytest.mark.parametrize("place", WORLDS)
def test_the_nash_equilibrium_is_the_best_answer_to_itself(place):
    """max over q of E_q[P(y ≻ Y')] − beta·KL(q‖pi_ref), Y' ~ p: no other policy does better against p than p."""
    w = WORLDS[place]()
    p = w.density(nash(w))
    wins = (w.reward[:, :, None] - w.reward[:, None, :]).sigmoid()
    against = (wins * p[:, None, :]).sum(2)

    def payoff(q: Tensor) -> float:
        return float((q * (against - w.beta * (q / w.p_ref()).log())).sum())

    for other in (w.p_ref(), w.p_star(), w.density(perturbed(nash(w), scale=0.1))):
        assert payoff(p) > payoff(other) + 1e-4


REWARDS = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)
P_REF = (0.3, 0.25, 0.2, 0.12, 0.08, 0.05)


def six(beta: float) -> tuple[TableLM, Samples, Tensor]:
    """One prompt, six answers of one token: a policy that is the reference, all answers, pi*."""
    p_ref, reward = (torch.tensor(x, dtype=torch.float64) for x in (P_REF, REWARDS))
    policy = TableLM(1, 6, 1)
    policy.tables[0].data[0, 0] = p_ref.log()
    ids = torch.arange(6)[:, None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    samples = Samples(
        Tokens.of([[0]]), torch.zeros(6, dtype=torch.int64), ids, mask, reward=reward, log_ref=p_ref.log()[:, None]
    )
    return policy, samples, (p_ref.log() + reward / beta).softmax(0)


def descend(labels: Labels, steps: tuple[int, ...], on_policy: bool) -> list[Tensor]:
    """The policy after so many steps on the exact expected loss, beta_r 0.6, beta_pi 0.5."""
    policy, samples, _ = six(0.3)
    first, second = torch.arange(6).repeat_interleave(6), torch.arange(6).repeat(6)
    groups = Groups(samples.select(torch.stack([first, second], 1).flatten()), 2)
    objective = OPO(labels, 0.6, 0.5)
    optim, found = torch.optim.Adam(policy.parameters(), lr=0.05), []
    for step in range(max(steps) + 1):
        p = policy.log_prob(samples).detach().exp()[:, 0] if on_policy else torch.full((6,), 1 / 6).double()
        if step in steps:
            found.append(policy.log_prob(samples).detach().exp()[:, 0])
        optim.zero_grad()
        (p[first] * p[second] * objective.loss(policy, groups).loss).sum().backward()
        optim.step()
    return found


@pytest.mark.parametrize("on_policy", [True, False])
def test_soft_labels_reach_pi_star_and_hard_ones_run_away_from_it(on_policy):
    """Six answers, beta 0.3: hard labels' KL to the reference only grows, and J falls, past the reference's own."""
    _, samples, p_star = six(0.3)
    p_ref, reward = samples.log_ref[:, 0].exp(), samples.reward

    def kl(p: Tensor) -> float:
        return float(torch.special.xlogy(p, p / p_ref).sum())

    def j(p: Tensor) -> float:
        return float((p * reward).sum()) - 0.3 * kl(p)

    (soft,) = descend("soft", (1500,), on_policy)
    torch.testing.assert_close(soft, p_star, atol=1e-4, rtol=0)
    early, later, latest = descend("hard", (50, 300, 1500), on_policy)
    assert kl(p_star) < kl(early) < kl(later) < kl(latest)
    assert j(latest) < j(later) < j(early) < j(p_star) - 0.005
    assert j(latest) < j(p_ref)
    assert later[-1] > 0.9 > p_star[-1] + 0.2


@pytest.mark.parametrize("point", ["reference", "pi*", "pi* of beta 0.01"])
def test_hard_labels_have_no_finite_optimum(point):
    """Everywhere, moving log p along the reward still lowers the loss: its derivative is −Σ beta·σ(−z)·(r_w − r_l) < 0."""
    policy, samples, _ = six(0.3)
    for beta in {"pi*": (0.3,), "pi* of beta 0.01": (0.01,)}.get(point, ()):
        policy.tables[0].data[0, 0] += samples.reward / beta
    first, second = torch.combinations(torch.arange(6), 2).t()
    groups = Groups(samples.select(torch.stack([first, second], 1).flatten()), 2)
    slope = flat_gradient(OPO("hard", 1.0, 0.05).loss(policy, groups).loss.sum(), policy) @ samples.reward
    h = group_log_ratios(policy, groups).detach()
    by_hand = -0.05 * ((-0.05 * (h[:, 1] - h[:, 0])).sigmoid() * groups.reward.diff(dim=1)[:, 0]).sum()
    torch.testing.assert_close(slope, by_hand)
    assert slope < -1e-4


# ---- REBEL ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_one_batch_of_rebel_asks_for_a_step_from_the_last_policy(place, eta):
    """Its minimum is p_t·exp(eta·(r − beta·h_t)), normalised, whoever drew."""
    w = WORLDS[place]()
    last = perturbed(w.optimum())
    p_t = w.density(last)
    returns = w.reward - w.beta * (p_t / w.p_ref()).log()
    step = (p_t.log() + eta * returns).softmax(1)
    groups, p = groups_of_two(w, w.p_ref())
    asked = Groups(groups.samples.with_(log_q=last.log_prob(groups.samples).detach()), 2)
    objective = REBEL(w.beta, eta)
    assert expected_gradient(objective, w.table_of(step), asked, p).abs().max() < ZERO
    assert expected_gradient(objective, w.optimum(), asked, p).norm() > CLEARLY


@pytest.mark.parametrize("place", WORLDS)
def test_with_eta_one_over_beta_the_last_policy_drops_out_of_rebel(place):
    w = WORLDS[place]()
    policy, groups = perturbed(w.optimum()), some_groups(w, 4)
    expected = 4 * w.beta**2 * LogVariance(w.beta).loss(policy, groups).loss
    for last in (w.reference, w.optimum()):
        asked = Groups(groups.samples.with_(log_q=last.log_prob(groups.samples).detach()), 4)
        torch.testing.assert_close(REBEL(w.beta, 1 / w.beta).loss(policy, asked).loss, expected)


# ---- A*-PO ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", WORLDS)
def test_an_error_of_v_is_no_bias_on_policy_and_off_policy_it_is(place):
    """At pi* the gradient is 2·beta·error·E[∇ log p]: 0 under pi*'s own draws, not under others."""
    w, error = WORLDS[place](), -0.2
    policy = w.optimum()
    assert of_a_star_po(w, policy, error).abs().max() < ZERO
    even = policy.log_prob(w.samples()).sum(1).mean()
    expected = 2 * w.beta * error * flat_gradient(even, policy)
    torch.testing.assert_close(of_a_star_po(w, policy, error, evenly=True), expected, atol=ZERO, rtol=0)
    assert expected.norm() > CLEARLY


def mean_estimate(p: Tensor, reward: Tensor, n: int, beta: float) -> float:
    """E[V̂*] of n draws, by enumeration."""
    index = torch.tensor(list(product(range(len(p)), repeat=n)))
    return float(p[index].prod(1) @ optimal_value(reward[index], beta))


def test_v_is_too_low_on_average_and_by_less_with_more_draws():
    """n = 1: E[r]; then up towards beta·log Z, never above."""
    p, reward, beta = torch.tensor([0.6, 0.3, 0.1]).double(), torch.tensor([0.0, 0.5, 1.0]).double(), 0.4
    found = [mean_estimate(p, reward, n, beta) for n in (1, 2, 4, 8)]
    v_star = beta * float((p * (reward / beta).exp()).sum().log())
    assert abs(found[0] - float(p @ reward)) < 1e-12
    assert found == sorted(found) and found[-1] < v_star


@pytest.mark.parametrize(
    ("beta", "n", "low"), [(0.5, 8, 0.0419), (0.5, 32, 0.0101), (0.1, 8, 0.1354), (0.1, 32, 0.0078)]
)
def test_how_low_v_is_where_one_answer_in_five_is_right(beta, n, low):
    """r is 1 with chance 1/5, else 0: k right ones of n are binomial. The page on online methods has these numbers."""
    k = torch.arange(n + 1).double()
    count = torch.tensor([math.comb(n, int(i)) * 0.2 ** int(i) * 0.8 ** int(n - i) for i in k]).double()
    reward = (torch.arange(n)[None] < k[:, None]).double()
    v_star = beta * math.log(0.8 + 0.2 * math.exp(1 / beta))
    assert abs(v_star - float(count @ optimal_value(reward, beta)) - low) < 5e-5


def test_the_bias_of_v_goes_with_one_over_n():
    """beta·Var(exp(r/beta))/(2n·Z²), within a tenth at n = 200."""
    beta, n, s = 0.5, 200, 0.2
    k = torch.arange(n + 1).double()
    log_count = torch.lgamma(torch.tensor(n + 1.0).double()) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    p = (log_count + k * math.log(s) + (n - k) * math.log(1 - s)).exp()
    reward = (torch.arange(n)[None] < k[:, None]).double()
    z, spread = 1 - s + s * math.exp(1 / beta), s * (1 - s) * (math.exp(1 / beta) - 1) ** 2
    low = beta * math.log(z) - float(p @ optimal_value(reward, beta))
    assert abs(low / (beta * spread / (2 * n * z**2)) - 1) < 0.1


def test_live_groups_are_drawn_by_whom_they_say():
    """The populations above: probabilities of the model's own pairs sum to one for every prompt."""
    w = world(eos_ids=(2,))
    policy = perturbed(w.optimum())
    for evenly in (False, True):
        groups, p = live_groups(w, policy, evenly)
        assert abs(float(p.sum()) - 1) < 1e-12 and len(groups) == len(p)
    assert of_live(w, policy, LogVariance(w.beta)).norm() > CLEARLY
