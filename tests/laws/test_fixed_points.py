"""The law of every objective: its exact expected gradient vanishes where it says, and only there.

Populations are enumerated with their exact drawing probabilities, so nothing here is a matter of luck. Every
class with an `optimum` needs a law in `FIXED_POINTS` or in `BIASED`; a new method without one fails
`test_every_objective_has_a_law`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiltlm.policies
import tiltlm.twists
from families import VOCAB as HF_VOCAB
from families import build
from laws.test_clipped import BIASED as CLIPPED_BIASED
from laws.test_clipped import of_dr_grpo
from laws.test_twist_objectives import LAWS as TWIST_LAWS
from laws.world import (
    CLEARLY,
    N_PROMPTS,
    VOCAB,
    WORLDS,
    ZERO,
    World,
    all_batches,
    expected_gradient,
    flat_gradient,
    on_policy,
    perturbed,
    world,
)
from tiltlm.groups import Groups
from tiltlm.models.causal import copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.models.table import TableLM, TableValues
from tiltlm.policies.a_star_po import AStarPO, Valued
from tiltlm.policies.apo import APO, Anchor
from tiltlm.policies.cdpo import CDPO
from tiltlm.policies.d2po import D2PO
from tiltlm.policies.dpo import DPO
from tiltlm.policies.dpo_rw import DpoRw
from tiltlm.policies.dr_grpo import DrGRPO
from tiltlm.policies.exo_pref import ExoPref
from tiltlm.policies.exo_rw import ExoRw
from tiltlm.policies.hinge import Hinge
from tiltlm.policies.ipo import IPO
from tiltlm.policies.kto import KTO, Judged
from tiltlm.policies.log_variance import LogVariance
from tiltlm.policies.online_exo import OnlineDpoRw, OnlineExo
from tiltlm.policies.online_ipo import OnlineIPO
from tiltlm.policies.opo import OPO
from tiltlm.policies.orpo import ORPO
from tiltlm.policies.ppo import PPO, ActorCritic, Rollout
from tiltlm.policies.rebel import REBEL
from tiltlm.policies.reinforce import Advantages, Baseline, Reinforce
from tiltlm.policies.robust_dpo import RobustDPO
from tiltlm.policies.rpo import RPO
from tiltlm.policies.sft import SFT
from tiltlm.policies.simpo import SimPO
from tiltlm.policies.trajectory_balance import LearntTrajectoryBalance, TrajectoryBalance
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.twists.value import ValueLearning

Point = Callable[[World], nn.Module]


@dataclass(frozen=True)
class Law:
    """`gradient(world, model)` is exact; it vanishes at `optimum` and at none of `elsewhere`."""

    objective: type
    gradient: Callable[[World, nn.Module], Tensor]
    optimum: Point = World.optimum
    elsewhere: tuple[Point, ...] = (lambda w: w.reference, lambda w: perturbed(w.optimum()))
    worlds: tuple[str, ...] = tuple(WORLDS)


# ---- populations --------------------------------------------------------------------------------------------


def couples(w: World) -> tuple[Tensor, Tensor]:
    """The rows of every two completions of one prompt, in both orders and with themselves."""
    size = w.reward.shape[1]
    first = torch.arange(N_PROMPTS * size).repeat_interleave(size)
    return first, torch.arange(size).repeat(N_PROMPTS * size) + first // size * size


def preferences(w: World, *, hard: bool = False, turned: float = 0.0) -> tuple[Pairs, Tensor]:
    """Every (y1, y2) ~ pi_ref × pi_ref with both outcomes of the comparison, and the probability of each row.

    turned: the chance that a coin turns the label over afterwards.
    """
    samples, p_ref = w.samples(), w.p_ref().flatten() / N_PROMPTS**0.5
    first, second = couples(w)
    gap = samples.reward[first] - samples.reward[second]
    wins = (gap.sign() + 1) / 2 if hard else gap.sigmoid()
    wins = (1 - turned) * wins + turned * (1 - wins)
    p = p_ref[first] * p_ref[second]
    chosen, rejected = torch.cat([first, second]), torch.cat([second, first])
    return Pairs(samples.select(chosen), samples.select(rejected)), torch.cat([p * wins, p * (1 - wins)])


# ---- exact expected gradients -------------------------------------------------------------------------------


def of_sft(w: World, model: nn.Module) -> Tensor:
    return expected_gradient(SFT(), model, w.samples(), w.p_star().flatten() / N_PROMPTS)


def of_dpo(w: World, model: nn.Module, beta: float | None = None, hard: bool = False) -> Tensor:
    return expected_gradient(DPO(beta or w.beta), model, *preferences(w, hard=hard))


def groups_of_two(w: World, drawer: Tensor) -> tuple[Groups, Tensor]:
    """Every (y1, y2) ~ drawer × drawer ([P, S]), and the probability of each group."""
    first, second = couples(w)
    p = drawer.flatten() / N_PROMPTS**0.5
    return Groups(w.samples().select(torch.stack([first, second], 1).flatten()), 2), p[first] * p[second]


def of_groups(w: World, model: nn.Module, kind: type, beta_r: float = 0.5, evenly: bool = False) -> Tensor:
    """beta_r and beta_pi of which only the product is the world's beta."""
    drawer = torch.full_like(w.reward, 1 / w.reward.shape[1]) if evenly else w.p_ref()
    return expected_gradient(kind(beta_r, w.beta / beta_r), model, *groups_of_two(w, drawer))


def of_robust(w: World, model: nn.Module) -> Tensor:
    return expected_gradient(RobustDPO(w.beta, 0.2), model, *preferences(w, turned=0.2))


def of_ipo(w: World, model: nn.Module) -> Tensor:
    return expected_gradient(IPO(w.beta), model, *preferences(w))


def ipo_optimum(w: World) -> nn.Module:
    """pi* of the reward P(y ≻ Y'), Y' ~ pi_ref."""
    wins = (w.reward[:, :, None] - w.reward[:, None, :]).sigmoid()
    chance = (wins * w.p_ref()[:, None, :]).sum(2)
    tilted = w.p_ref() * (chance / w.beta).exp()
    return w.table_of(tilted / tilted.sum(1, keepdim=True))


def of_rpo(w: World, model: nn.Module, alpha: float, normalise: Any) -> Tensor:
    return expected_gradient(RPO(w.beta, alpha, normalise), model, *preferences(w))


def of_reinforce(w: World, model: nn.Module, baseline: Baseline, beta: float) -> Tensor:
    """Two samples of one prompt per batch, all such batches; the mean over prompts."""
    objective, size = Reinforce(baseline, beta), w.reward.shape[1]
    samples, p = on_policy(w, model)
    slots = [list(range(x * size, (x + 1) * size)) for x in range(N_PROMPTS)]
    parts = [batch_gradient(objective, model, samples, p * N_PROMPTS, [rows, rows]) for rows in slots]
    return torch.stack(parts).mean(0)


def batch_gradient(
    objective: Reinforce, model: nn.Module, samples: Samples, p: Tensor, slots: list[list[int]]
) -> Tensor:
    """Expected gradient of a batch with `slots`, each batch prepared by itself."""
    singles, index, chance = all_batches(samples, p, slots)
    advantage = torch.cat([objective.prepare(batch).advantage for batch in singles])
    every = Advantages(samples.select(index.flatten()), advantage)
    share = chance.repeat_interleave(len(slots)) / len(slots)
    return flat_gradient((share * objective.loss(model, every).loss).sum(), model)


def of_value(w: World, model: nn.Module) -> Tensor:
    return expected_gradient(ValueLearning(w.atoms), model, w.samples(), w.p_ref().flatten() / N_PROMPTS)


def values_law(worlds: tuple[str, ...], width: int) -> Law:
    return Law(
        ValueLearning,
        of_value,
        lambda w: w.law(width=width),
        (lambda w: fresh_values(width), lambda w: perturbed(w.law(width=width))),
        worlds,
    )


def fresh_values(width: int) -> TableValues:
    return TableValues(N_PROMPTS, VOCAB, 3, width)


def of_ppo(w: World, model: nn.Module) -> Tensor:
    """On policy, lambda = 1, no whitening: the policy's part of the exact expected gradient, under an odd critic."""
    samples, p = on_policy(w, model)
    objective = PPO(w.beta, lam=1.0, whiten=False, value_weight=0.0)
    critic = OddCritic()
    judged = objective.prepare(Rollout(samples, critic.values_before(samples)[..., 0].detach()))
    loss = objective.loss(ActorCritic(model, critic), judged).loss
    return flat_gradient((p * loss).sum(), model)


class OddCritic(nn.Module):
    """A critic that says something else in front of every token, and is wrong everywhere."""

    def values_before(self, samples: Samples) -> Tensor:
        before = torch.cat([samples.prompt_index[:, None], samples.tokens[:, :-1] + 1], 1).cumsum(1)
        return torch.where(samples.mask, (before.double() * 0.7).sin(), 0.0)[..., None]


# ---- groups of the policy's own, or of anybody's --------------------------------------------------------------


def live_groups(w: World, model: nn.Module, evenly: bool = False) -> tuple[Groups, Tensor]:
    """Every pair of completions of a prompt as `model` draws them, or each as likely; log_q is the model's in both."""
    drawer = torch.full_like(w.reward, 1 / w.reward.shape[1]) if evenly else w.density(model)
    groups, p = groups_of_two(w, drawer)
    return Groups(groups.samples.with_(log_q=model.log_prob(groups.samples).detach()), 2), p


def of_live(w: World, model: nn.Module, objective: Any, evenly: bool = False) -> Tensor:
    return expected_gradient(objective, model, *live_groups(w, model, evenly))


def of_a_star_po(w: World, model: nn.Module, error: float = 0.0, evenly: bool = False) -> Tensor:
    """error: of V̂*, in units of the reward."""
    groups, p = live_groups(w, model, evenly)
    value = w.beta * w.log_z()[groups.samples.prompt_index[::2]] + error
    return expected_gradient(AStarPO(w.beta), model, Valued(groups, value), p)


class PromptValues(nn.Module):
    """A critic that says one number of every prompt."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.clone())

    def values_before(self, samples: Samples) -> Tensor:
        return self.value[samples.prompt_index][:, None, None].expand(*samples.tokens.shape, 1)


def of_learnt_balance(w: World, model: nn.Module, evenly: bool) -> Tensor:
    """By the policy's parameters and by log Ẑ, which is right."""
    both = ActorCritic(model, PromptValues(w.log_z()))
    return expected_gradient(LearntTrajectoryBalance(w.beta), both, *live_groups(w, model, evenly))


def nash(w: World, beta_r: float = 1.0) -> nn.Module:
    """p ∝ pi_ref·exp(P(y ≻ Y')/beta), Y' ~ p, by iteration."""
    wins = ((w.reward[:, :, None] - w.reward[:, None, :]) / beta_r).sigmoid()
    h = torch.zeros_like(w.reward)
    for _ in range(200):
        p = (w.p_ref().log() + h).softmax(1)
        h = (h + (wins * p[:, None, :]).sum(2) / w.beta) / 2
    return w.table_of((w.p_ref().log() + h).softmax(1))


FIXED_POINTS = {
    "ppo": Law(PPO, of_ppo),
    "sft": Law(SFT, of_sft),
    "exo-rw": Law(ExoRw, lambda w, m: of_groups(w, m, ExoRw)),
    "exo-rw, groups drawn evenly": Law(ExoRw, lambda w, m: of_groups(w, m, ExoRw, 0.3, evenly=True)),
    "dpo-rw": Law(DpoRw, lambda w, m: of_groups(w, m, DpoRw)),
    "dpo-rw, groups drawn evenly": Law(DpoRw, lambda w, m: of_groups(w, m, DpoRw, 0.3, evenly=True)),
    "robust dpo": Law(RobustDPO, of_robust),
    "ipo": Law(IPO, of_ipo, ipo_optimum, (lambda w: w.reference, World.optimum)),
    "dpo": Law(DPO, of_dpo),
    "rpo with alpha = 0 (dpo)": Law(RPO, lambda w, m: of_rpo(w, m, 0.0, "sum")),
    "dr-grpo, pull in the reward": Law(DrGRPO, of_dr_grpo),
    "reinforce": Law(Reinforce, lambda w, m: of_reinforce(w, m, "none", w.beta)),
    "reinforce, batch_mean": Law(Reinforce, lambda w, m: of_reinforce(w, m, "batch_mean", w.beta)),
    "reinforce, leave_one_out": Law(Reinforce, lambda w, m: of_reinforce(w, m, "leave_one_out", w.beta)),
    "opo": Law(OPO, lambda w, m: of_live(w, m, OPO("soft", 0.5, w.beta / 0.5))),
    "opo, pairs drawn evenly": Law(OPO, lambda w, m: of_live(w, m, OPO("soft", 0.3, w.beta / 0.3), True)),
    "d2po, no verdict bought": Law(D2PO, lambda w, m: of_live(w, m, D2PO("soft", 0.5, w.beta / 0.5))),
    "online exo": Law(OnlineExo, lambda w, m: of_live(w, m, OnlineExo(0.5, w.beta / 0.5))),
    "online dpo-rw": Law(OnlineDpoRw, lambda w, m: of_live(w, m, OnlineDpoRw(0.5, w.beta / 0.5))),
    "online ipo": Law(
        OnlineIPO,
        lambda w, m: of_live(w, m, OnlineIPO("soft", w.beta)),
        nash,
        (lambda w: w.reference, World.optimum),
    ),
    "log-variance": Law(LogVariance, lambda w, m: of_live(w, m, LogVariance(w.beta))),
    "log-variance, drawn evenly": Law(LogVariance, lambda w, m: of_live(w, m, LogVariance(w.beta), True)),
    "trajectory balance": Law(TrajectoryBalance, lambda w, m: of_live(w, m, TrajectoryBalance(w.beta))),
    "trajectory balance, drawn evenly": Law(
        TrajectoryBalance, lambda w, m: of_live(w, m, TrajectoryBalance(w.beta), True)
    ),
    "trajectory balance, learnt": Law(LearntTrajectoryBalance, lambda w, m: of_learnt_balance(w, m, False)),
    "trajectory balance, learnt, drawn evenly": Law(
        LearntTrajectoryBalance, lambda w, m: of_learnt_balance(w, m, True)
    ),
    "rebel": Law(REBEL, lambda w, m: of_live(w, m, REBEL(w.beta))),
    "rebel, drawn evenly": Law(REBEL, lambda w, m: of_live(w, m, REBEL(w.beta, 0.3), True)),
    "a-star-po, V too low": Law(AStarPO, lambda w, m: of_a_star_po(w, m, -0.2)),
    "a-star-po, drawn evenly": Law(AStarPO, lambda w, m: of_a_star_po(w, m, 0.0, True)),
    "values, one logit": values_law(("fixed length, binary", "with eos, binary"), 1),
    "values, two atoms": values_law(("fixed length, binary", "with eos, binary"), 2),
    "values, four atoms": values_law(("fixed length, graded", "with eos, graded"), 4),
}

BIASED = {
    RPO: "test_rpo_is_biased_by_exactly_the_likelihood_of_the_chosen_answers",
    ExoPref: "test_exo_pref_asks_one_log_odds_of_every_pair",
    CDPO: "test_cdpo_is_dpo_on_labels_turned_over",
    Hinge: "test_hinge_pulls_every_pair_alike_and_stops_at_one",
    APO: "test_apo_pushes_each_side_by_itself",
    SimPO: "test_simpo_ends_at_pi_star_of_a_uniform_reference_when_gamma_is_zero",
    ORPO: "test_orpo_is_likelihood_plus_odds_ratio_and_knows_no_reference",
    KTO: "test_kto_pushes_by_the_sign_of_the_weighted_votes",
}
"""Objectives whose `optimum` says so, each with the test of precisely that claim (clipped ones: laws/test_clipped.py)."""


def in_each_world() -> list[Any]:
    pairs = [(name, place) for name, law in FIXED_POINTS.items() for place in law.worlds]
    return [pytest.param(*pair, id=" | ".join(pair)) for pair in pairs]


@pytest.mark.parametrize(("name", "place"), in_each_world())
def test_expected_gradient_is_zero_at_the_claimed_optimum_and_not_elsewhere(name, place):
    law, w = FIXED_POINTS[name], WORLDS[place]()
    assert law.gradient(w, law.optimum(w)).abs().max() < ZERO
    for point in law.elsewhere:
        assert law.gradient(w, point(w)).norm() > CLEARLY


# ---- the open set -------------------------------------------------------------------------------------------


def modules(package: ModuleType) -> list[ModuleType]:
    return [
        importlib.import_module(m.name) for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    ]


def objectives(module: ModuleType) -> list[type]:
    """The classes that `module` itself defines, that have a loss and name an optimum."""
    own = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
    return [x for x in own if getattr(x, "optimum", "") and hasattr(x, "loss")]


def lawless(found: list[type]) -> list[str]:
    lawful = {law.objective for law in [*FIXED_POINTS.values(), *TWIST_LAWS.values()]} | set(BIASED)
    lawful |= set(CLIPPED_BIASED)
    return [cls.__qualname__ for cls in found if cls not in lawful]


def test_every_objective_has_a_law():
    found = [x for package in (tiltlm.policies, tiltlm.twists) for m in modules(package) for x in objectives(m)]
    assert {SFT, DPO, RPO, Reinforce, ValueLearning} <= set(found)
    assert lawless(found) == [], "give each of these a Law in FIXED_POINTS, or a test of its bias in BIASED"


def test_every_policy_module_holds_an_objective():
    empty = [m.__name__ for m in modules(tiltlm.policies) if not objectives(m)]
    assert empty == [], "a module in policies/ is one method; it must hold a class with `optimum`"


def test_an_objective_without_a_law_is_found_out():
    class Newcomer:
        optimum = "somewhere"

    assert lawless([SFT, Newcomer]) == [Newcomer.__qualname__]


def test_what_calls_itself_biased_is_registered_as_biased_and_nothing_else_is():
    found = [x for package in (tiltlm.policies, tiltlm.twists) for m in modules(package) for x in objectives(m)]
    assert {x for x in found if x.optimum.startswith("biased")} == set(BIASED) | set(CLIPPED_BIASED)
    assert all(name in globals() for name in BIASED.values())


# ---- what the laws leave open -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", WORLDS)
def test_the_optimum_used_here_is_pi_star(place):
    """The table at which gradients vanish has density pi_ref·exp(r/beta)/Z, by plain multiplication."""
    w = WORLDS[place]()
    torch.testing.assert_close(w.density(w.optimum()), w.p_star(), atol=1e-12, rtol=0)
    assert (w.p_star() - w.p_ref()).abs().max() > 0.05


def test_sft_ends_at_whatever_the_completions_were_drawn_from():
    w = world()
    from_ref = w.p_ref().flatten() / N_PROMPTS
    assert expected_gradient(SFT(), w.reference, w.samples(), from_ref).abs().max() < ZERO
    assert expected_gradient(SFT(), w.optimum(), w.samples(), from_ref).norm() > CLEARLY


@pytest.mark.parametrize("place", WORLDS)
def test_dpo_ends_at_pi_star_of_its_own_beta_not_of_another(place):
    w = WORLDS[place]()
    other = 2 * w.beta
    assert of_dpo(w, w.optimum(), beta=other).norm() > CLEARLY
    assert of_dpo(w, w.table_of(w.p_star(other)), beta=other).abs().max() < ZERO


@pytest.mark.parametrize("place", WORLDS)
def test_dpo_on_hard_labels_does_not_end_at_pi_star(place):
    w = WORLDS[place]()
    assert of_dpo(w, w.optimum(), hard=True).norm() > CLEARLY


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("normalise", ["sum", "mean"])
def test_rpo_is_biased_by_exactly_the_likelihood_of_the_chosen_answers(place, normalise):
    """At pi* RPO's gradient is alpha·∇NLL of the chosen answers, whose law is Σ over rejected of the pairs'."""
    w, alpha = WORLDS[place](), 0.7
    policy = w.optimum()
    pairs, p = preferences(w)
    keys = [
        (x, *y) for x, y in zip(pairs.chosen.prompt_index.tolist(), pairs.chosen.completions.lists(), strict=True)
    ]
    share = dict.fromkeys(w.rows, 0.0)
    for key, chance in zip(keys, p.tolist(), strict=True):
        share[key] += chance
    length = torch.tensor([len(row) - 1 if normalise == "mean" else 1 for row in w.rows])
    q_chosen = torch.tensor([share[row] for row in w.rows], dtype=torch.float64)
    assert abs(q_chosen.sum() - 1) < 1e-12
    nll = -(q_chosen * policy.log_prob(w.samples()).sum(1) / length).sum()
    gradient = of_rpo(w, policy, alpha, normalise)
    torch.testing.assert_close(gradient, alpha * flat_gradient(nll, policy), atol=ZERO, rtol=0)
    assert gradient.norm() > CLEARLY


def clear(gradient: Tensor) -> bool:
    return bool(gradient.norm() > CLEARLY)


def margins(w: World, policy: nn.Module, pairs: Pairs, beta: float) -> Tensor:
    """z of every pair, with gradient."""
    chosen, rejected = ((policy.log_prob(side) - side.log_ref).sum(1) for side in (pairs.chosen, pairs.rejected))
    return beta * (chosen - rejected)


@pytest.mark.parametrize("place", WORLDS)
def test_exo_pref_asks_one_log_odds_of_every_pair(place):
    """Its gradient is E[q(1 − q)(z − c)·∇z]: not zero at pi*; zero for hard labels of a lone pair at z = c."""
    w, objective = WORLDS[place](), ExoPref(2.0, 0.05)
    policy, (pairs, p) = w.optimum(), preferences(w)
    z = margins(w, policy, pairs, 2.0)
    q = z.detach().sigmoid()
    by_hand = flat_gradient((p * q * (1 - q) * (z.detach() - math.log(19)) * z).sum(), policy)
    torch.testing.assert_close(expected_gradient(objective, policy, pairs, p), by_hand, atol=ZERO, rtol=0)
    assert clear(by_hand)
    lone, table = lone_pair(z=math.log(19) / 2.0)
    assert expected_gradient(objective, table, lone, torch.ones(1)).abs().max() < ZERO
    assert clear(expected_gradient(objective, lone_pair(z=0.0)[1], lone, torch.ones(1)))


def lone_pair(z: float) -> tuple[Pairs, TableLM]:
    """A prompt with two one-token answers, uniform reference, and the policy whose h(0) − h(1) is z."""
    table = TableLM(1, 2, 1)
    table.tables[0].data[0, 0] = torch.tensor([z, 0.0], dtype=torch.float64)
    side = Samples(
        Tokens.of([[0]]), torch.tensor([0]), torch.tensor([[0]]), torch.tensor([[True]]),
        log_ref=torch.tensor([[math.log(0.5)]], dtype=torch.float64),
    )  # fmt: skip
    return Pairs(side, side.with_(tokens=torch.tensor([[1]]))), table


@pytest.mark.parametrize("place", WORLDS)
def test_cdpo_is_dpo_on_labels_turned_over(place):
    w = WORLDS[place]()
    for policy in (w.optimum(), perturbed(w.optimum())):
        smoothed = expected_gradient(CDPO(w.beta, 0.2), policy, *preferences(w))
        turned = expected_gradient(DPO(w.beta), policy, *preferences(w, turned=0.2))
        torch.testing.assert_close(smoothed, turned, atol=ZERO, rtol=0)
    assert clear(expected_gradient(CDPO(w.beta, 0.2), w.optimum(), *preferences(w)))


@pytest.mark.parametrize("place", WORLDS)
def test_hinge_pulls_every_pair_alike_and_stops_at_one(place):
    """All |z| < 1 at pi* here (beta·h spans the rewards' range ≤ 1.5 times 0.6): the gradient is E[−∇z], far from 0."""
    w, beta = WORLDS[place](), 0.3
    policy, (pairs, p) = w.optimum(), preferences(w)
    z = margins(w, policy, pairs, beta)
    assert z.abs().max() < 1
    gradient = expected_gradient(Hinge(beta), policy, pairs, p)
    torch.testing.assert_close(gradient, flat_gradient(-(p * z).sum(), policy), atol=ZERO, rtol=0)
    assert clear(gradient)
    lone, beyond = lone_pair(z=1.1 / beta)
    assert (expected_gradient(Hinge(beta), beyond, lone, torch.ones(1)) == 0).all()
    assert clear(expected_gradient(Hinge(beta), lone_pair(z=0.9 / beta)[1], lone, torch.ones(1)))


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("anchor", ["zero", "down"])
def test_apo_pushes_each_side_by_itself(place, anchor: Anchor):
    """zero: −σ'(beta·h_c)·beta∇h_c + σ'(beta·h_r)·beta∇h_r; down: +σ'(beta·h_c)·beta∇h_c − σ'(z)·∇z; not 0 at pi*."""
    w = WORLDS[place]()
    policy, (pairs, p) = w.optimum(), preferences(w)
    h = [w.beta * (policy.log_prob(side) - side.log_ref).sum(1) for side in (pairs.chosen, pairs.rejected)]
    slope = [x.detach().sigmoid() * (-x.detach()).sigmoid() for x in (*h, h[0] - h[1])]
    zero, down = -slope[0] * h[0] + slope[1] * h[1], slope[0] * h[0] - slope[2] * (h[0] - h[1])
    by_hand = flat_gradient((p * (zero if anchor == "zero" else down)).sum(), policy)
    torch.testing.assert_close(
        expected_gradient(APO(w.beta, anchor), policy, pairs, p), by_hand, atol=ZERO, rtol=0
    )
    assert clear(by_hand)


@pytest.mark.parametrize("place", ["fixed length, graded", "fixed length, binary"])
def test_simpo_ends_at_pi_star_of_a_uniform_reference_when_gamma_is_zero(place):
    """p ∝ exp(3·r/beta) for answers of 3 tokens, whatever the reference; with gamma > 0 it does not stop there."""
    w, beta = WORLDS[place](), 2.0
    p = (3 * w.reward / beta).softmax(1)
    assert expected_gradient(SimPO(beta, 0.0), w.table_of(p), *preferences(w)).abs().max() < ZERO
    assert clear(expected_gradient(SimPO(beta, 1.0), w.table_of(p), *preferences(w)))
    assert clear(expected_gradient(SimPO(beta, 0.0), w.optimum(), *preferences(w)))


@pytest.mark.parametrize("place", WORLDS)
def test_orpo_is_likelihood_plus_odds_ratio_and_knows_no_reference(place):
    """∇L = ∇(−m_c) − alpha·σ(−d)·∇d with d = log odds_c − log odds_r, written out; the same without log_ref."""
    w = WORLDS[place]()
    policy, (pairs, p) = w.optimum(), preferences(w)
    m = [policy.log_prob(side).sum(1) / side.mask.sum(1) for side in (pairs.chosen, pairs.rejected)]
    d = m[0] - (1 - m[0].exp()).log() - m[1] + (1 - m[1].exp()).log()
    by_hand = flat_gradient((p * (-m[0] - 0.7 * (-d.detach()).sigmoid() * d)).sum(), policy)
    bare = Pairs(pairs.chosen.with_(log_ref=None), pairs.rejected.with_(log_ref=None))
    torch.testing.assert_close(expected_gradient(ORPO(0.7), policy, bare, p), by_hand, atol=ZERO, rtol=0)
    assert clear(by_hand)


@pytest.mark.parametrize("place", WORLDS)
def test_kto_pushes_by_the_sign_of_the_weighted_votes(place):
    """Answers of pi_ref, good with chance σ(r): ∇ = −E[σ'(u)·(w_good·P(good) − w_bad·P(bad))·beta·∇h], u = beta(h − z0).

    At pi* it is not zero; and along it no log-ratio has reason to stop, because the sign does not depend on h.
    """
    w, z0 = WORLDS[place](), 0.3
    policy, samples = w.optimum(), w.samples()
    p, good = w.p_ref().flatten() / N_PROMPTS, w.reward.flatten().sigmoid()
    both = samples.select(torch.arange(len(samples)).repeat(2))
    judged = Judged(both, torch.arange(len(both)) < len(samples), torch.full((len(both),), z0))
    gradient = expected_gradient(KTO(w.beta, 1.0, 2.0), policy, judged, torch.cat([p * good, p * (1 - good)]))
    h = (policy.log_prob(samples) - samples.log_ref).sum(1)
    u = w.beta * (h.detach() - z0)
    votes = good - 2 * (1 - good)
    by_hand = flat_gradient(-(p * u.sigmoid() * (-u).sigmoid() * votes * w.beta * h).sum(), policy)
    torch.testing.assert_close(gradient, by_hand, atol=ZERO, rtol=0)
    assert clear(gradient)


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("beta_r", [0.2, 0.6, 3.0])
def test_the_gap_is_zero_in_every_group_at_pi_star_of_the_product_and_nowhere_else(place, beta_r):
    """Groups of 4 drawn any way: KL(q‖p) < 1e-12 in each at pi*, and above it in most elsewhere."""
    w = WORLDS[place]()
    size = w.reward.shape[1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(size, generator=generator)[:4] + (g % 2) * size for g in range(40)])
    groups = Groups(w.samples().select(rows.flatten()), 4)
    objective = ExoRw(beta_r, w.beta / beta_r)
    gap = [objective.loss(model, groups).metrics["gap"] for model in (w.optimum(), w.reference)]
    assert gap[0].abs().max() < 1e-12
    assert (gap[1] > 1e-3).double().mean() > 0.8
    assert objective.loss(w.table_of(w.p_star(2 * w.beta)), groups).metrics["gap"].mean() > 1e-3


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_reinforce_climbs_the_objective(place, beta):
    """E[∇L] = −∇J, J = E_p[r] − beta·KL(p‖pi_ref) differentiated through the enumeration itself."""
    w = WORLDS[place]()
    policy = perturbed(w.optimum())
    samples = w.samples()
    log_p, log_ref = policy.log_prob(samples).sum(1), samples.log_ref.sum(1)
    j = (log_p.exp() * (samples.reward - beta * (log_p - log_ref))).sum() / N_PROMPTS
    torch.testing.assert_close(of_reinforce(w, policy, "none", beta), -flat_gradient(j, policy), atol=ZERO, rtol=0)


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("baseline", ["none", "batch_mean", "leave_one_out"])
def test_reinforce_without_beta_does_not_stop_at_pi_star(place, baseline):
    w = WORLDS[place]()
    assert of_reinforce(w, w.optimum(), baseline, 0.0).norm() > CLEARLY


@pytest.mark.parametrize("baseline", ["none", "batch_mean", "leave_one_out"])
def test_reinforce_without_beta_stops_on_the_best_answers(baseline):
    """pi* of beta = 0.01 holds all but e^{-70} of its mass on the best answers."""
    w = world()
    assert of_reinforce(w, w.table_of(w.p_star(0.01)), baseline, 0.0).abs().max() < ZERO


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_leave_one_out_leaves_the_expectation_alone_and_batch_mean_shrinks_it_by_one_nth(beta):
    w = world()
    policy = perturbed(w.optimum())
    plain = of_reinforce(w, policy, "none", beta)
    torch.testing.assert_close(of_reinforce(w, policy, "leave_one_out", beta), plain, atol=ZERO, rtol=0)
    torch.testing.assert_close(of_reinforce(w, policy, "batch_mean", beta), plain / 2, atol=ZERO, rtol=0)
    assert plain.norm() > CLEARLY


def test_baselines_with_two_prompts_in_one_batch():
    """Two samples of each of two prompts, one token each: 3^4 batches; batch_mean shrinks by 1 − 1/4."""
    reference = TableLM(N_PROMPTS, VOCAB, 1).randomise(torch.Generator().manual_seed(5))
    rows = [(x, v) for x in range(N_PROMPTS) for v in range(VOCAB)]
    reward = torch.tensor([[0.0, 0.3, 1.0], [1.0, 0.5, -0.4]], dtype=torch.float64)
    w = World(reference, rows, reward, (), 0.6)
    policy = TableLM(N_PROMPTS, VOCAB, 1).randomise(torch.Generator().manual_seed(6))
    samples, p = on_policy(w, policy)
    slots = [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]

    def gradient(baseline: Baseline) -> Tensor:
        return batch_gradient(Reinforce(baseline, w.beta), policy, samples, p * N_PROMPTS, slots)

    plain = gradient("none")
    torch.testing.assert_close(gradient("leave_one_out"), plain, atol=ZERO, rtol=0)
    torch.testing.assert_close(gradient("batch_mean"), 0.75 * plain, atol=ZERO, rtol=0)
    assert plain.norm() > CLEARLY


def test_values_are_learnt_under_the_reference_not_under_another_drawer():
    """Rollouts of pi* teach another law: the population matters."""
    w = world(binary=True)
    p_star = w.p_star().flatten() / N_PROMPTS
    gradient = expected_gradient(ValueLearning(), w.law(width=1), w.samples(), p_star)
    assert gradient.norm() > CLEARLY


def test_the_language_modelling_term_asks_the_body_for_the_reference():
    """lm_weight adds exactly lm_weight·∇NLL: zero in expectation at a body that is pi_ref, not elsewhere."""
    reference = build("gpt2")
    reference.model.double()
    ids = torch.arange(HF_VOCAB)[:, None]
    samples = Samples(
        Tokens.of([[4, 7]]), torch.zeros(HF_VOCAB, dtype=torch.int64), ids, torch.ones_like(ids, dtype=torch.bool),
        reward=(torch.arange(HF_VOCAB) % 2).double(),
    )  # fmt: skip
    p = reference.log_prob(samples).detach().sum(1).exp()

    def gradient(shift: float) -> Tensor:
        value = ValueHead(copy_of(reference))
        next(value.body.head.parameters()).data[:, 0] += shift * torch.arange(HF_VOCAB)
        parts = [expected_gradient_of_body(value, weight, samples, p) for weight in (0.0, 2.0)]
        return parts[1] - parts[0]

    assert gradient(0.0).abs().max() < ZERO
    assert gradient(0.1).norm() > CLEARLY


def expected_gradient_of_body(value: ValueHead, lm_weight: float, samples: Samples, p: Tensor) -> Tensor:
    objective = ValueLearning(lm_weight=lm_weight)
    total = (p * objective.loss(value, samples).loss).sum()
    used = torch.autograd.grad(total, list(value.body.parameters()), allow_unused=True)
    named = zip(used, value.body.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(x) if g is None else g).flatten() for g, x in named])
