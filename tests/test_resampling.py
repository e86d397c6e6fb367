"""Resampling schemes: unbiased, of small spread, and their conditional laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiltlm.samplers.resampling import (
    CONDITIONAL,
    SCHEMES,
    ancestors,
    conditional_ancestors,
    effective_sample_size,
)
from tiltlm.seeds import stream

WEIGHTS = torch.tensor([0.42, 0.03, 0.0, 0.35, 0.2], dtype=torch.float64)
K, R = len(WEIGHTS), 40_000


def log_w(repeats: int = R) -> Tensor:
    return WEIGHTS.log().expand(repeats, K)


def children(found: Tensor) -> Tensor:
    """How many children every particle has, [R, K]."""
    return torch.nn.functional.one_hot(found, K).sum(1)


def uniforms(columns: int, name: str) -> Tensor:
    return stream(0, name).uniform(range(R), columns)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_children_are_k_times_the_weight_on_average_and_none_of_weight_zero(scheme):
    count = children(ancestors(log_w(), uniforms(K, scheme), scheme)).double()
    error = count.std(0) / R**0.5
    assert ((count.mean(0) - K * WEIGHTS).abs() <= 4 * error + 1e-12).all()
    assert count[:, 2].sum() == 0


@pytest.mark.parametrize("scheme", ["systematic", "residual"])
def test_systematic_and_residual_resampling_keep_the_whole_part(scheme):
    count = children(ancestors(log_w(), uniforms(K, scheme), scheme))
    assert (count >= (K * WEIGHTS).floor()).all()
    if scheme == "systematic":
        assert (count <= (K * WEIGHTS).ceil()).all()


def test_spread_falls_from_multinomial_to_systematic():
    spread = {s: children(ancestors(log_w(), uniforms(K, s), s)).double().var(0).sum().item() for s in SCHEMES}
    assert spread["multinomial"] > spread["residual"] > spread["stratified"] > spread["systematic"]


@pytest.mark.parametrize("scheme", CONDITIONAL)
def test_the_conditional_law_is_the_free_one_given_the_pinned_child(scheme):
    """Free runs, slots shuffled, kept where slot 0 descends from particle 0, against the conditional form."""
    free = ancestors(log_w(), uniforms(K, f"free {scheme}"), scheme)
    order = uniforms(K, "shuffle").argsort(1)
    free = free.gather(1, order)
    kept = free[free[:, 0] == 0]
    held = conditional_ancestors(log_w(), uniforms(2 * K, f"held {scheme}"), scheme)
    assert (held[:, 0] == 0).all()
    for power in (1, 2):
        one, other = (children(found).double() ** power for found in (kept, held))
        error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() < 4 * error + 1e-12).all()
    slots = torch.nn.functional.one_hot(held[:, 1:], K).double().mean(0)  # the other slots are alike
    assert (slots.std(0) < 4 * 0.5 / R**0.5 * 2).all()


def test_overwriting_slot_0_of_a_free_systematic_run_is_not_the_conditional_law():
    """What a plausible mistake would give differs by many standard errors: the test above has power."""
    free = ancestors(log_w(), uniforms(K, "free"), "systematic")
    free[:, 0] = 0
    held = conditional_ancestors(log_w(), uniforms(2 * K, "held"), "systematic")
    one, other = children(free).double(), children(held).double()
    error = (one.var(0) / R + other.var(0) / R).sqrt().clamp_min(1e-12)
    assert ((one.mean(0) - other.mean(0)).abs() / error).max() > 6


@pytest.mark.parametrize("scheme", ["stratified", "residual"])
def test_schemes_without_a_conditional_form_say_so(scheme):
    with pytest.raises(ValueError, match=f"multinomial or systematic resampling; {scheme} has no"):
        conditional_ancestors(log_w(1), torch.rand(1, 2 * K), scheme)


def test_effective_sample_size_by_hand():
    """(¼, ¾): 1/(1/16 + 9/16) = 1.6; equal weights: K."""
    found = effective_sample_size(torch.tensor([[1.0, 3.0], [2.0, 2.0]]).log())
    torch.testing.assert_close(found, torch.tensor([1.6, 2.0], dtype=torch.float64))
