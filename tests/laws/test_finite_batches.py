"""Fixed points that hold for the population, and what a batch of a few rows makes of them.

Where a batch is divided by something it draws itself (its number of tokens, the spread of its advantages, the sum of
its weights), the expected gradient of *one batch* does not vanish at the optimum; it shrinks like 1/B. Where nothing
of the kind is divided by, it vanishes at every B. Both are claims of the methods' `optimum`, and both are worked out
here, over all batches.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws.test_fixed_points import CLEARLY, ZERO, OddCritic, on_policy
from laws.test_twist_objectives import star, under
from laws.world import COUNTED, WORLDS, Counted, World, flat_gradient
from tiltlm.policies.ppo import PPO, ActorCritic, Rollout, gae
from tiltlm.policies.reinforce import Reinforce
from tiltlm.policies.sft import SFT
from tiltlm.samples import Samples
from tiltlm.twists.ctl import CTL
from tiltlm.twists.dpg import DPGObjective
from tiltlm.twists.objective import Draws, prefix_weights
from tiltlm.twists.value import ValueLearning

FIXED, ENDING = "fixed length, binary", "with eos, binary"


def first_prompt(samples: Samples, p: Tensor) -> tuple[Samples, Tensor]:
    """The rows that answer prompt 0, and their probabilities."""
    rows = (samples.prompt_index == 0).nonzero()[:, 0]
    alone = samples.prompts.select(slice(0, 1))
    kept = samples.select(rows)
    return Samples(alone, kept.prompt_index, kept.tokens, kept.mask, **_columns(kept)), p[rows] / p[rows].sum()


def _columns(samples: Samples) -> dict[str, Tensor]:
    names = ("log_q", "log_ref", "log_psi", "log_w", "reward")
    return {name: x for name in names if (x := getattr(samples, name)) is not None}


def over_batches(
    objective: Any,
    model: nn.Module,
    samples: Samples,
    p: Tensor,
    b: int,
    made: Callable[[Samples], Any] = lambda x: x,
) -> Tensor:
    """E[∇ Σ loss / Σ weight] over every batch of b rows, each drawn with probability p; flat."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in product(range(len(p)), repeat=b):
        index = torch.tensor(rows)
        batch = objective.prepare(made(samples.select(index)))
        loss = objective.loss(model, batch).loss.sum() / objective.weight(batch).sum()
        total = total + p[index].prod() * loss
    return flat_gradient(total, model.policy if isinstance(model, ActorCritic) else model)


def of_tokens(objective: Any, model: nn.Module, samples: Samples, p: Tensor, b: int) -> Tensor:
    """The same for losses divided by the batch's tokens, for any b: b·Σ_y p(y)·g(y)·E[1/(n(y) + N_{b−1})], N_{b−1} the
    tokens of b − 1 further rows, whose law is a convolution."""
    loss = objective.loss(model, objective.prepare(samples)).loss
    lengths = samples.mask.sum(1)
    law = torch.zeros(int(lengths.max()) + 1, dtype=torch.float64).index_add(0, lengths, p)
    others = torch.ones(1, dtype=torch.float64)
    for _ in range(b - 1):
        others = torch.nn.functional.conv1d(
            others[None, None], law.flip(0)[None, None], padding=len(law) - 1
        ).flatten()
    share = torch.stack([(others / (n + torch.arange(len(others)))).sum() for n in lengths.tolist()])
    return flat_gradient((b * p * share * loss).sum(), model)


def sft(w: World) -> tuple[Any, nn.Module, Samples, Tensor]:
    return SFT(), w.optimum(), *first_prompt(w.samples(), w.p_star().flatten())


def values(w: World) -> tuple[Any, nn.Module, Samples, Tensor]:
    return ValueLearning(w.atoms), w.law(width=2), *first_prompt(w.samples(), w.p_ref().flatten())


def reinforce(w: World) -> tuple[Any, nn.Module, Samples, Tensor]:
    """REINFORCE without a baseline, on policy at pi*."""
    return Reinforce("none", w.beta), w.optimum(), *first_prompt(*on_policy(w, w.optimum()))


@pytest.mark.parametrize("method", [sft, values])
def test_dividing_by_tokens_is_exact_where_lengths_are_equal_and_biased_like_one_over_b_elsewhere(method):
    for b in (1, 2):
        assert over_batches(*method(WORLDS[FIXED]()), b).abs().max() < ZERO
    case = method(WORLDS[ENDING]())
    for b in (1, 2):
        torch.testing.assert_close(of_tokens(*case, b), over_batches(*case, b), atol=ZERO, rtol=0)
    bias = {b: float(of_tokens(*case, b).norm()) for b in (1, 16, 256)}
    assert bias[1] > CLEARLY and bias[16] < bias[1] / 4
    assert bias[16] / bias[256] == pytest.approx(16, rel=0.1)


def test_a_mean_over_rows_is_exact_in_every_batch():
    """REINFORCE divides by the number of rows, which nobody draws: zero at pi* with rows of unequal length too."""
    case = reinforce(WORLDS[ENDING]())
    for b in (1, 2):
        assert over_batches(*case, b).abs().max() < ZERO


# ---- whitened advantages ------------------------------------------------------------------------------------


def ppo_case(whiten: bool) -> tuple[PPO, ActorCritic, Samples, Tensor, Callable[[Samples], Rollout]]:
    w = WORLDS[FIXED]()
    policy, critic = w.optimum(), OddCritic()
    samples, p = first_prompt(*on_policy(w, policy))
    objective = PPO(w.beta, lam=1.0, whiten=whiten, value_weight=0.0)
    return (
        objective,
        ActorCritic(policy, critic),
        samples,
        p,
        lambda x: Rollout(x, critic.values_before(x)[..., 0].detach()),
    )


def by_token(log_p: Tensor, model: nn.Module) -> Tensor:
    """∇ of every token's number, [N·T, D]."""
    return torch.stack([_flat(x, model) for x in log_p.flatten()])


def _flat(x: Tensor, model: nn.Module) -> Tensor:
    grads = torch.autograd.grad(x, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def whitened_gradients(rows: Tensor, advantage: Tensor, gradients: Tensor, whiten: bool) -> Tensor:
    """Gradients [M, D] of M batches `rows` [M, B] by PPO's formula, all at once."""
    a = advantage[rows]
    if whiten:
        a = (a - a.mean((1, 2), keepdim=True)) / (a.std((1, 2), unbiased=False, keepdim=True) + 1e-8)
    t = advantage.shape[1]
    places = (rows[:, :, None] * t + torch.arange(t)).flatten(1)
    weight = torch.zeros(len(rows), advantage.numel(), dtype=torch.float64).scatter_add(1, places, a.flatten(1))
    return -weight @ gradients / (rows.shape[1] * t)


def ppo_in_numbers() -> tuple[Tensor, Tensor, Tensor]:
    """Advantages [N, T], gradients of log p [N·T, D] and probabilities [N] of the case."""
    objective, both, samples, p, made = ppo_case(False)
    advantage, _ = gae(objective.rewards(samples), made(samples).value, samples.mask, 1.0)
    return advantage, by_token(both.policy.log_prob(samples), both.policy), p


@pytest.mark.parametrize("whiten", [True, False])
def test_whitening_moves_ppo_off_pi_star_in_small_batches(whiten):
    """All 729 batches of two rows, by the method itself: exactly zero without whitening, clearly not with it."""
    found = over_batches(*ppo_case(whiten)[:4], 2, ppo_case(whiten)[4])
    assert (found.norm() > CLEARLY) if whiten else (found.abs().max() < ZERO)
    advantage, gradients, p = ppo_in_numbers()
    rows = torch.tensor(list(product(range(len(p)), repeat=2)))
    batches = whitened_gradients(rows, advantage, gradients, whiten)
    torch.testing.assert_close((p[rows].prod(1)[:, None] * batches).sum(0), found, atol=ZERO, rtol=0)


def test_what_whitening_does_fades_as_batches_grow():
    """Batches of 4 and of 64: the mean gradient falls at least fivefold, and as a part of a batch's spread too."""
    advantage, gradients, p = ppo_in_numbers()
    generator, norm, part = torch.Generator().manual_seed(3), {}, {}
    for b, m in ((4, 40_000), (64, 8_000)):
        rows = torch.multinomial(p.expand(m, -1), b, replacement=True, generator=generator)
        found = whitened_gradients(rows, advantage, gradients, True)
        spread = float(found.var(0).sum().sqrt())
        norm[b], part[b] = float(found.mean(0).norm()), float(found.mean(0).norm()) / spread
        assert norm[b] > 4 * spread / m**0.5 or b == 64
    assert norm[64] < norm[4] / 5 and part[64] < part[4] and part[4] > 0.05


# ---- weights that a batch normalises by itself --------------------------------------------------------------


def twist_case(drawer: str) -> tuple[Counted, nn.Module, Samples, Tensor]:
    """psi*, and every completion of prompt 0 as the reference draws it, or as psi*'s own proposal does."""
    w, at = COUNTED["fixed length"](), star(COUNTED["fixed length"]())
    p = {"reference": w.p_ref(), "own": w.p_star()}[drawer]
    samples = w.samples().with_(log_q=w.table_of(p).log_prob(w.samples()).detach())
    samples = under(at, samples.with_(log_w=(samples.log_ref - samples.log_q).sum(1) + samples.reward / w.beta))
    return w, at, *first_prompt(samples, p.flatten())


def as_draws(w: Counted) -> Callable[[Samples], Draws]:
    return lambda samples: Draws(1, w.beta, samples)


@pytest.mark.parametrize("method", ["ctl", "dpg"])
def test_weights_normalised_in_the_batch_are_exact_for_own_draws_alone(method):
    """All batches of two rows, at psi*: drawn by psi*'s own proposal every weight is the same, and the expectation zero;
    drawn by the reference it is not."""
    found = {}
    for drawer in ("own", "reference"):
        w, at, samples, p = twist_case(drawer)
        objective = CTL() if method == "ctl" else DPGObjective(w.reference)
        found[drawer] = over_batches(objective, at, samples, p, 2, as_draws(w))
    assert found["own"].abs().max() < ZERO and found["reference"].norm() > 1e-3


def test_ctl_s_bias_from_the_reference_s_draws_fades_as_k_grows():
    """By CTL's formula −Σ_t Σ_k (A_k − B_tk)·∇log psi_t/T, which is the method's own over all batches of two."""
    w, at, samples, p = twist_case("reference")
    gradients = by_token(at.values(samples)[..., 0], at).unflatten(0, samples.mask.shape)
    log_a, log_b = samples.log_w, prefix_weights(samples, w.beta)

    def batches(rows: Tensor) -> Tensor:
        weight = log_a[rows].softmax(1)[:, :, None] - log_b[rows].softmax(1)
        shape, t = (len(rows), *log_b.shape), log_b.shape[1]
        dense = torch.zeros(shape, dtype=torch.float64).scatter_add(1, rows[:, :, None].expand(-1, -1, t), weight)
        return -torch.einsum("mnt,ntd->md", dense, gradients) / t

    two = torch.tensor(list(product(range(len(p)), repeat=2)))
    exact = over_batches(CTL(), at, samples, p, 2, as_draws(w))
    torch.testing.assert_close((p[two].prod(1)[:, None] * batches(two)).sum(0), exact, atol=ZERO, rtol=0)
    generator, norm = torch.Generator().manual_seed(4), {}
    for k, m in ((4, 100_000), (64, 20_000)):
        found = batches(torch.multinomial(p.expand(m, -1), k, replacement=True, generator=generator))
        norm[k], error = float(found.mean(0).norm()), float(found.var(0).sum().sqrt()) / m**0.5
        assert norm[k] > 4 * error or k == 64
    assert norm[64] < norm[4] / 5
