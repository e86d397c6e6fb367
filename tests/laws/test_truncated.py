"""Policy gradient on rows that another distribution drew: weighed by p/q, the expected gradient is the on-policy one."""

from __future__ import annotations

import pytest
import torch
from world import (
    CLEARLY,
    N_PROMPTS,
    WORLDS,
    ZERO,
    World,
    all_batches,
    expected_gradient,
    flat_gradient,
    on_policy,
    perturbed,
)

from tiltlm.policies.reinforce import Advantages, Baseline, Reinforce
from tiltlm.samples import Samples

pytestmark = pytest.mark.parametrize("place", WORLDS)


def objective_gradient(w: World, model: torch.nn.Module) -> torch.Tensor:
    """∇J(p), J = E_p[r] − beta·KL(p‖pi_ref), from plain sums."""
    samples = w.samples()
    log_p = model.log_prob(samples).sum(1)
    log_ratio = log_p - samples.log_ref.sum(1)
    return flat_gradient((log_p.exp() * (samples.reward - w.beta * log_ratio)).sum() / N_PROMPTS, model)


def test_weighed_rows_have_the_gradient_of_the_objective(place):
    """q is another table than p. Without weights, or without the bracket that turns log q into log p, it is another one."""
    w = WORLDS[place]()
    p, q = perturbed(w.reference, seed=1), perturbed(w.reference, seed=2)
    drawn, chance = on_policy(w, q)
    wanted = -objective_gradient(w, p)
    found = expected_gradient(Reinforce("none", w.beta, truncate=1e9), p, drawn, chance)
    assert (found - wanted).norm() < ZERO
    assert (expected_gradient(Reinforce("none", w.beta), p, drawn, chance) - wanted).norm() > CLEARLY


def test_truncated_weights_on_policy_change_nothing(place):
    w = WORLDS[place]()
    p = perturbed(w.reference, seed=1)
    drawn, chance = on_policy(w, p)
    plain = expected_gradient(Reinforce("none", w.beta), p, drawn, chance)
    assert (expected_gradient(Reinforce("none", w.beta, truncate=1.5), p, drawn, chance) - plain).norm() < ZERO


def test_the_leave_one_out_baseline_stays_without_effect_under_weights(place):
    """Two rows of the first prompt, every pair with its chance under q."""
    w = WORLDS[place]()
    p, q = perturbed(w.reference, seed=1), perturbed(w.reference, seed=2)
    drawn, chance = on_policy(w, q)
    first = drawn.prompt_index.eq(0).nonzero()[:, 0].tolist()
    batches, _, chances = all_batches(drawn, chance * N_PROMPTS, [first, first])

    def expected(baseline: Baseline) -> torch.Tensor:
        how = Reinforce(baseline, w.beta, truncate=1e9)
        losses = torch.stack([mean_loss(how, p, batch) for batch in batches])
        return flat_gradient((chances * losses).sum(), p)

    assert (expected("leave_one_out") - expected("none")).norm() < ZERO


def mean_loss(how: Reinforce, model: torch.nn.Module, batch: Samples) -> torch.Tensor:
    prepared: Advantages = how.prepare(batch)
    return how.loss(model, prepared).loss.mean()
