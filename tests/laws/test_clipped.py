"""Where the clipped policy-gradient methods end: exact expected gradients over all groups of two or three draws.

A batch is one group of one prompt, drawn from the policy itself; the gradient is that of the loop's own reduction,
Σ loss / Σ weight, averaged over prompts. No pull, a pull in the reward and one in the loss end in three different places.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws.world import CLEARLY, N_PROMPTS, VOCAB, WORLDS, ZERO, World, flat_gradient, on_policy, perturbed
from tiltlm.clipped import k3
from tiltlm.models.table import TableLM
from tiltlm.policies.cispo import CISPO
from tiltlm.policies.dapo import DAPO
from tiltlm.policies.dr_grpo import DrGRPO
from tiltlm.policies.grpo import GRPO
from tiltlm.policies.gspo import GSPO
from tiltlm.policies.reinforce import reinforce_loss
from tiltlm.samples import Samples

FIXED, ENDING = "fixed length, graded", "with eos, graded"

BIASED = {
    GRPO: "test_grpo_without_std_ends_at_its_own_point_of_one_token_and_not_at_pi_star",
    DAPO: "test_without_a_pull_the_best_answers_alone_are_left",
    GSPO: "test_gspo_on_policy_is_grpo_without_its_pull",
    CISPO: "test_cispo_on_policy_is_reinforce",
}
"""Methods whose `optimum` says so, each with the test of precisely that claim."""


def test_every_claim_has_its_test():
    assert all(name in globals() for name in BIASED.values())


# ---- exact expected gradients ---------------------------------------------------------------------------------


def every_group(samples: Samples, p: Tensor, size: int) -> tuple[Samples, Tensor]:
    """All groups of `size` draws of one prompt, [B·size rows], each group a prompt of its own, and their chances [B]."""
    answers = len(samples) // N_PROMPTS
    places = torch.tensor(list(product(range(answers), repeat=size)))
    rows = torch.cat([places + x * answers for x in range(N_PROMPTS)])
    number = torch.arange(len(rows)).repeat_interleave(size)
    picked = samples.select(rows.flatten())
    prompts = samples.prompts.select(samples.prompt_index[rows[:, 0]])
    return replace(picked, prompts=prompts, prompt_index=number), (p * N_PROMPTS)[rows].prod(1) / N_PROMPTS


def of_groups(method: Any, w: World, model: nn.Module, size: int = 2, drawer: nn.Module | None = None) -> Tensor:
    """E[∇ Σ loss / Σ weight] over all batches of one group, drawn by the policy (or by `drawer`); flat."""
    groups, chance = every_group(*on_policy(w, drawer or model), size)
    batch = method.bound(w.beta).prepare(groups)
    loss = method.bound(w.beta).loss(model, batch).loss.reshape(-1, size)
    weight = method.weight(batch).reshape(-1, size)
    return flat_gradient((chance * loss.sum(1) / weight.sum(1)).sum(), model)


def of_dr_grpo(w: World, model: nn.Module) -> Tensor:
    return of_groups(DrGRPO(kl="reward"), w, model)


def one_token(beta: float = 0.6) -> World:
    """Two prompts, three answers of one token."""
    reference = TableLM(N_PROMPTS, VOCAB, 1).randomise(torch.Generator().manual_seed(5))
    rows = [(x, v) for x in range(N_PROMPTS) for v in range(VOCAB)]
    reward = torch.tensor([[0.0, 0.3, 1.0], [1.0, 0.5, -0.4]], dtype=torch.float64)
    return World(reference, rows, reward, (), beta)


def table(p: Tensor) -> TableLM:
    """The one-token policy with these probabilities, [P, V]."""
    policy = TableLM(N_PROMPTS, VOCAB, 1)
    policy.tables[0].data[:, 0] = p.log()
    return policy


def forward_pulled(w: World, b: float) -> Tensor:
    """argmax of E_p[r] − b·KL(pi_ref‖p): b·pi_ref/(λ − r), λ by bisection, [P, S]."""
    low, high = w.reward.max(1).values, w.reward.max(1).values + b
    for _ in range(200):
        middle = (low + high) / 2
        total = (b * w.p_ref() / (middle[:, None] - w.reward)).sum(1)
        low, high = torch.where(total > 1, middle, low), torch.where(total > 1, high, middle)
    return b * w.p_ref() / (high[:, None] - w.reward)


# ---- k3 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [FIXED, ENDING])
def test_k3_is_the_kl_as_a_number_and_the_other_kl_as_a_loss(place):
    """Of whole answers: E_p[k3] = KL(p‖ref); E_p[∇k3] = ∇KL(ref‖p), and not ∇KL(p‖ref)."""
    w = WORLDS[place]()
    policy = perturbed(w.optimum())
    samples, p = on_policy(w, policy)
    log_ref = samples.log_ref.sum(1)

    def log_p() -> Tensor:
        return policy.log_prob(samples).sum(1)

    number = (p * k3(log_p(), log_ref)).sum()
    asked_for = (log_p().exp() * (log_p() - log_ref)).sum() / N_PROMPTS
    other = (log_ref.exp() * (log_ref - log_p())).sum() / N_PROMPTS
    assert (number - asked_for).abs() < ZERO
    gradient, asked = flat_gradient(number, policy), flat_gradient(asked_for, policy)
    torch.testing.assert_close(gradient, flat_gradient(other, policy), atol=ZERO, rtol=0)
    assert (gradient - asked).norm() > CLEARLY


# ---- GRPO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_grpo_without_std_ends_at_its_own_point_of_one_token_and_not_at_pi_star(size):
    """b·pi_ref/(λ − r) with b = beta·G/(G − 1): zero there, not at pi*, nor at the point of b = beta (G without end)."""
    w, method = one_token(), GRPO(std=False)
    here = table(forward_pulled(w, w.beta * size / (size - 1)))
    assert of_groups(method, w, here, size).abs().max() < ZERO
    for p in (w.p_star(), forward_pulled(w, w.beta)):
        assert of_groups(method, w, table(p), size).norm() > CLEARLY
    assert (w.density(here) - w.p_star()).abs().max() > 0.02


@pytest.mark.parametrize("place", WORLDS)
def test_grpo_of_longer_answers_ends_at_neither(place):
    """Token by token, even b·pi_ref/(λ − r) of whole answers is no fixed point."""
    w = WORLDS[place]()
    for p in (w.p_star(), forward_pulled(w, 2 * w.beta)):
        assert of_groups(GRPO(std=False), w, w.table_of(p)).norm() > 1e-3


@pytest.mark.parametrize("size", [2, 3])
def test_dividing_by_the_group_s_std_moves_grpo_to_a_third_point(size):
    w = one_token()
    for b in (w.beta, w.beta * size / (size - 1)):
        assert of_groups(GRPO(), w, table(forward_pulled(w, b)), size).norm() > CLEARLY
    assert of_groups(GRPO(), w, table(w.p_star()), size).norm() > CLEARLY


def test_groups_of_two_with_std_know_the_order_of_rewards_alone():
    """Any increasing change of the rewards leaves the expected gradient as it is; without std it does not."""
    w, policy = one_token(), perturbed(table(one_token().p_star()))
    bent = replace(w, reward=w.reward.exp() * 3 + w.reward**3)
    same, moved = (
        of_groups(method, bent, policy) - of_groups(method, w, policy) for method in (GRPO(), GRPO(std=False))
    )
    assert same.abs().max() < 1e-4 and moved.norm() > CLEARLY  # EPSILON beside a std of 0.3: 1e-5


def coin(success: float) -> World:
    """One token, right or wrong; two prompts alike. The policy is the reference."""
    p = torch.tensor([[1 - success, success]] * N_PROMPTS, dtype=torch.float64)
    reference = TableLM(N_PROMPTS, 2, 1)
    reference.tables[0].data[:, 0] = p.log()
    rows = [(x, v) for x in range(N_PROMPTS) for v in range(2)]
    return World(reference, rows, torch.tensor([[0.0, 1.0]] * N_PROMPTS, dtype=torch.float64), (), 0.6)


def weight_of_prompt(success: float, size: int, std: bool) -> float:
    """What ∇(chance of success) is multiplied by in the expected gradient."""
    w = coin(success)
    pushed = of_groups(GRPO(std=std, kl="none"), w, w.reference, size)
    return -float(pushed[1] / (success * (1 - success) / N_PROMPTS))


def test_std_weighs_prompts_by_their_chance_of_success_in_groups_of_four_or_more():
    """Rewards 0 and 1. Without std 1 − 1/G, whatever the chance s. With it, E[A | right] − E[A | wrong]: for G = 2, where
    A = ±1/√2 in a mixed group, (1 − s)/√2 + s/√2; for G = 3 2/√3; for G = 4 1.5 − 3s(1 − s)(1.5 − (√3 + 1)/2)."""
    for s in (0.1, 0.5, 0.9):
        assert weight_of_prompt(s, 4, std=False) == pytest.approx(3 / 4, abs=1e-9)
        assert weight_of_prompt(s, 2, std=True) == pytest.approx(2**-0.5, abs=1e-5)
        assert weight_of_prompt(s, 3, std=True) == pytest.approx(2 / 3**0.5, abs=1e-5)
        by_hand = 1.5 - 3 * s * (1 - s) * (1.5 - (3**0.5 + 1) / 2)
        assert weight_of_prompt(s, 4, std=True) == pytest.approx(by_hand, abs=1e-5)


# ---- the pull in the reward: pi* for all ------------------------------------------------------------------------

PULLED = {
    "grpo": GRPO(kl="reward"),
    "grpo, std off": GRPO(std=False, kl="reward"),
    "dapo": DAPO(kl="reward"),
    "gspo": GSPO(kl="reward"),
    "cispo": CISPO(kl="reward"),
}


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("name", PULLED)
def test_with_the_pull_in_the_reward_all_have_pi_star_whatever_they_divide_by(name, place):
    """At pi* R = beta·log Z for every answer: every group is tied. Divisions by std and length bend the way alone."""
    w = WORLDS[place]()
    assert of_groups(PULLED[name], w, w.optimum()).abs().max() < 1e-8  # rounding, over EPSILON
    for point in (w.reference, perturbed(w.optimum())):
        assert of_groups(PULLED[name], w, point).norm() > CLEARLY


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("kl", ["reward", "none"])
def test_dr_grpo_climbs_the_objective_itself(place, kl):
    """E[∇L] = −(1 − 1/G)·∇J at any policy; GRPO with std off has another direction where lengths differ."""
    w = WORLDS[place]()
    policy, samples = perturbed(w.optimum()), w.samples()
    log_p, beta = policy.log_prob(samples).sum(1), w.beta if kl == "reward" else 0.0
    j = (log_p.exp() * (samples.reward - beta * (log_p - samples.log_ref.sum(1)))).sum() / N_PROMPTS
    climb = flat_gradient(j, policy)
    torch.testing.assert_close(of_groups(DrGRPO(kl=kl), w, policy), -climb / 2, atol=ZERO, rtol=0)
    divided = of_groups(GRPO(std=False, kl=kl), w, policy)
    parallel = -torch.nn.functional.cosine_similarity(divided, climb, dim=0)
    assert (parallel > 1 - 1e-9) == place.startswith("fixed")


# ---- no pull ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DAPO(), GSPO(), CISPO(), DrGRPO()], ids=lambda method: type(method).__name__)
def test_without_a_pull_the_best_answers_alone_are_left(method):
    """pi* of beta = 0.01 holds all but e^{-20} of its mass on the best answers: nothing is left to gain. At pi* there is;
    and of one token, the best answer gains on every other under any policy of full support."""
    w = WORLDS[FIXED]()
    assert of_groups(method, w, w.table_of(w.p_star(0.01))).abs().max() < 1e-6
    assert of_groups(method, w, w.optimum()).norm() > CLEARLY
    small = one_token()
    for seed in range(5):
        policy = TableLM(N_PROMPTS, VOCAB, 1).randomise(torch.Generator().manual_seed(seed))
        pushed = -of_groups(method, small, policy).reshape(N_PROMPTS, VOCAB) / small.density(policy)
        assert (pushed.argmax(1) == small.reward.argmax(1)).all()


@pytest.mark.parametrize("place", WORLDS)
def test_gspo_on_policy_is_grpo_without_its_pull(place):
    """∇s = mean of ∇log p: the same gradient, REINFORCE's with every row weighed by 1/length."""
    w = WORLDS[place]()
    policy = perturbed(w.optimum())
    found = of_groups(GSPO(), w, policy)
    torch.testing.assert_close(found, of_groups(GRPO(kl="none"), w, policy), atol=ZERO, rtol=0)
    groups, chance = every_group(*on_policy(w, policy), 2)
    batch = GSPO().prepare(groups)
    each = reinforce_loss(policy.log_prob(groups).sum(1), batch.advantage) / groups.mask.sum(1)
    by_hand = flat_gradient((chance.repeat_interleave(2) / 2 * each).sum(), policy)
    torch.testing.assert_close(found, by_hand, atol=ZERO, rtol=0)
    assert found.norm() > CLEARLY


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("std", [True, False])
def test_cispo_on_policy_is_reinforce(place, std):
    """−A·∇log p(y), A by the group, over the batch's tokens."""
    w = WORLDS[place]()
    policy = perturbed(w.optimum())
    groups, chance = every_group(*on_policy(w, policy), 2)
    batch = CISPO(std=std).prepare(groups)
    each = reinforce_loss(policy.log_prob(groups).sum(1), batch.advantage).reshape(-1, 2)
    by_hand = flat_gradient((chance * each.sum(1) / groups.mask.sum(1).reshape(-1, 2).sum(1)).sum(), policy)
    found = of_groups(CISPO(std=std), w, policy)
    torch.testing.assert_close(found, by_hand, atol=ZERO, rtol=0)
    assert found.norm() > CLEARLY


# ---- off policy -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:what draws and what is trained differ")
def test_cispo_below_its_cap_is_the_unclipped_step_off_policy():
    """Rows of the reference: ∇(−ρ·A) = −ρ·A·∇log p; a cap of 1.01 is another gradient."""
    w = WORLDS[FIXED]()
    policy = perturbed(w.optimum())
    wide, narrow = (of_groups(CISPO(clip_high=high), w, policy, drawer=w.reference) for high in (1e6, 0.01))
    groups, chance = every_group(*on_policy(w, w.reference), 2)
    batch = CISPO().prepare(groups)
    ratio = (policy.log_prob(groups) - groups.log_q).exp()
    step = (-ratio * batch.advantage[:, None]).sum(1).reshape(-1, 2).sum(1) / 6
    torch.testing.assert_close(wide, flat_gradient((chance * step).sum(), policy), atol=ZERO, rtol=0)
    assert (wide - narrow).norm() > 1e-3


@pytest.mark.parametrize("method", [GRPO(std=False, kl="none"), DrGRPO(), CISPO(std=False), GSPO(std=False)])
def test_weights_that_nothing_cuts_make_another_drawer_s_rows_the_policy_s_own(method):
    """One token, rows of the reference, `truncate` without effect: −(1 − 1/G)·∇E_p[r], as on policy; cut at 1 it is not."""
    w = one_token()
    policy = perturbed(table(w.p_star()))
    own = of_groups(method, w, policy)
    whole, cut = (of_groups(replace(method, truncate=c), w, policy, drawer=w.reference) for c in (1e6, 1.0))
    torch.testing.assert_close(whole, own, atol=ZERO, rtol=0)
    assert (cut - own).norm() > 1e-3
