"""The law of every twist objective: its exact expected gradient vanishes where it says, and only there.

Populations list every completion with exact importance weights, so self-normalised weights are exact too and nothing
is a matter of luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import build
from laws.world import HORIZON, N_PROMPTS, PROMPTS, VOCAB, WORLDS, Prefix, World, flat_gradient, perturbed, world
from tiltlm.engine import Engine, Optim
from tiltlm.exact import solve
from tiltlm.models.table import TableLM, TableValues
from tiltlm.samplers.guided import Guided
from tiltlm.samplers.scenes import OnePrompt, infilling
from tiltlm.samplers.smc import IMPORTANCE, smc
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.target import Target
from tiltlm.train import fit
from tiltlm.twists.ctl import CTL
from tiltlm.twists.dpg import DPGObjective
from tiltlm.twists.draws import TwistDraws, along, rollouts_behind, weighed_as_mixture
from tiltlm.twists.fudge import FudgeLearning
from tiltlm.twists.learned import LearnedTwist
from tiltlm.twists.mixture import Mixture
from tiltlm.twists.objective import Draws, Rows, positive_weights
from tiltlm.twists.sixo import SIXO
from tiltlm.twists.soft_q import SoftQ, mean_backups

ZERO, CLEARLY = 1e-10, 1e-3
FIXED = ("fixed length, graded", "fixed length, binary")
EOS = ("with eos, graded", "with eos, binary")


def by_step(prefix: Prefix, log_psi: float) -> float:
    """psi* times a constant per step."""
    return log_psi + 0.7 * math.sin(5 * len(prefix))


def by_prefix(prefix: Prefix, log_psi: float) -> float:
    """psi* times a factor of the prefix in front of the last token."""
    return log_psi + math.sin(3.0 * sum((k + 1) * (v + 1) for k, v in enumerate(prefix[:-1])))


def twist(w: World, of: Callable[[Prefix, float], float] = lambda prefix, log_psi: log_psi) -> TableValues:
    """The table of log psi*, or of a function of prefix and log psi*."""
    return w.twist(
        {prefix: of(prefix, log_psi) for prefix, log_psi in w.log_psi_star().items() if len(prefix) > 1}
    )


def exact_draws(w: World, model: TableValues, squashed: bool = False) -> Draws:
    """Every completion with exact weights towards pi*, and what the twist says along it."""
    rows = w.evenly()
    log_psi = model.values(rows)[..., 0].detach()
    proposal = rows.with_(log_psi=torch.nn.functional.logsigmoid(log_psi) if squashed else log_psi)
    reference = rows.with_(log_w=None, log_q=None)
    return Draws(N_PROMPTS, w.beta, proposal, None, reference)


def p_ref_of(samples: Samples) -> Tensor:
    """What each row of an even population stands for under the reference, within its prompt, [N]."""
    assert samples.log_ref is not None
    p = samples.log_ref.sum(1).exp() * float(VOCAB) ** -(HORIZON - samples.mask.sum(1)).double()
    return p / torch.zeros(N_PROMPTS).double().index_add(0, samples.prompt_index, p)[samples.prompt_index]


def gradient(objective: Any, w: World, model: TableValues) -> Tensor:
    """Exact expected gradient; rows that stand for reference draws get the reference's probabilities."""
    draws = exact_draws(w, model)
    if isinstance(objective, SoftQ):
        walked = along(w.reference, LearnedTwist(model), draws.proposal, HORIZON)
        backups = mean_backups(w.reference, LearnedTwist(model), walked)
        draws = replace(draws, proposal=walked, backups=backups)
    rows = objective.prepare(draws)
    if isinstance(objective, SIXO | FudgeLearning):
        rows = as_reference(rows, draws.need("reference"))
    return flat_gradient(objective.loss(model, rows).loss.sum() / rows_total(objective, rows), model)


def rows_total(objective: Any, rows: Any) -> Tensor:
    return objective.weight(rows).sum()


def as_reference(rows: Rows, reference: Samples) -> Rows:
    """The last rows, which stand for draws of the reference, weighed by its probabilities."""
    n = len(reference)
    weight = rows.weight.clone()
    weight[-n:] = torch.where(reference.mask, p_ref_of(reference)[:, None], 0.0)
    return replace(rows, weight=weight)


@dataclass(frozen=True)
class Law:
    """Zero at each of `at`, not zero at any of `off`."""

    objective: Callable[[World], Any]
    at: tuple[Callable[[World], TableValues], ...]
    off: tuple[Callable[[World], TableValues], ...]
    places: tuple[str, ...] = FIXED + EOS
    shift: float = 0.0


def star(w: World) -> TableValues:
    return twist(w)


def zero(w: World) -> TableValues:
    return TableValues(N_PROMPTS, VOCAB, HORIZON, 1)


def noisy(w: World) -> TableValues:
    return perturbed(twist(w))


def over_z(w: World) -> TableValues:
    log_z = w.log_z().tolist()
    return twist(w, lambda prefix, log_psi: log_psi - log_z[prefix[0]])


def logit(w: World) -> TableValues:
    return twist(w, lambda prefix, log_psi: log_psi - math.log(-math.expm1(log_psi)))


def stepped(w: World) -> TableValues:
    return twist(w, by_step)


def prefixed(w: World) -> TableValues:
    return twist(w, by_prefix)


LAWS = {
    "ctl": Law(lambda w: CTL(), (star, stepped), (zero, noisy, prefixed), FIXED),
    "ctl, rows may end": Law(lambda w: CTL(), (star,), (zero, noisy, stepped), EOS),
    "ctl against the next step": Law(lambda w: CTL("next"), (star, stepped), (zero, noisy, prefixed), FIXED),
    "soft q": Law(lambda w: SoftQ(), (star,), (zero, noisy, stepped)),
    "soft q, linear": Law(lambda w: SoftQ("linear"), (star,), (zero, noisy, stepped)),
    "soft q, multi-step": Law(lambda w: SoftQ(multi_step=0.5), (star,), (zero, noisy, stepped)),
    "sixo": Law(lambda w: SIXO(), (over_z,), (star, zero, noisy)),
    "fudge": Law(lambda w: FudgeLearning(), (logit,), (star, zero, noisy), shift=-1.1),
    "dpg": Law(lambda w: DPGObjective(w.reference), (star, stepped, prefixed), (zero, noisy)),
    "ctl with dpg": Law(
        lambda w: Mixture(CTL(), DPGObjective(w.reference), 0.3), (star, stepped), (zero, noisy, prefixed), FIXED
    ),
}

TWIST_LAWS = {CTL, SoftQ, SIXO, FudgeLearning, DPGObjective, Mixture}
"""Objectives whose law is in this file."""


@pytest.mark.parametrize(
    ("name", "place"), [pytest.param(n, p, id=f"{n} | {p}") for n, law in LAWS.items() for p in law.places]
)
def test_expected_gradient_is_zero_where_it_is_said_to_be_and_not_elsewhere(name, place):
    law, w = LAWS[name], WORLDS[place]().shifted(LAWS[name].shift)
    for point in law.at:
        assert gradient(law.objective(w), w, point(w)).abs().max() < ZERO
    for point in law.off:
        assert gradient(law.objective(w), w, point(w)).norm() > CLEARLY


@pytest.mark.parametrize("place", FIXED + EOS)
def test_soft_q_with_mean_backups_is_biased_and_ends_at_the_expected_reward(place):
    """y_t = E_ref[log psi_{t+1}]: zero at E_ref[r | prefix]/beta, and not at psi*."""
    w = WORLDS[place]()
    total, mass = w.mass(w.p_ref() * w.reward), w.mass(w.p_ref())
    mean_reward = twist(w, lambda prefix, log_psi: total[prefix] / mass[prefix] / w.beta)
    assert gradient(SoftQ("mean"), w, mean_reward).abs().max() < ZERO
    assert gradient(SoftQ("mean"), w, star(w)).norm() > CLEARLY


def test_ctl_s_gradient_is_that_of_the_kls_between_pi_star_and_the_twist_s_own_targets():
    w = WORLDS["fixed length, graded"]()
    model = noisy(w)
    total = torch.zeros((), dtype=torch.float64)
    p_star, p_ref = w.mass(w.p_star()), w.mass(w.p_ref())
    for x in range(N_PROMPTS):
        for t in range(HORIZON):
            prefixes = [p for p in p_ref if p[0] == x and len(p) == t + 2]
            codes = [sum(v * VOCAB ** (t - k) for k, v in enumerate(p[1:])) for p in prefixes]
            log_t = (
                torch.tensor([math.log(p_ref[p]) for p in prefixes], dtype=torch.float64)
                + model.tables[t][x, codes, 0]
            )
            log_pi = log_t - log_t.logsumexp(0)
            p = torch.tensor([p_star[p] for p in prefixes], dtype=torch.float64)
            total = total - (p * log_pi).sum()
    direct = flat_gradient(total / (N_PROMPTS * HORIZON), model)
    torch.testing.assert_close(gradient(CTL(), w, model), direct, atol=1e-10, rtol=0)


def test_dpg_s_gradient_is_that_of_the_kl_from_pi_star():
    w = WORLDS["with eos, graded"]()
    model = noisy(w)
    q = Guided(w.reference, LearnedTwist(model))
    log_q = q.log_prob(w.samples()).sum(1)
    direct = flat_gradient(-(w.p_star().flatten() * log_q).sum() / (N_PROMPTS * HORIZON), model)
    torch.testing.assert_close(gradient(DPGObjective(w.reference), w, model), direct, atol=1e-10, rtol=0)


@pytest.mark.parametrize("objective", [CTL(), CTL("next"), SoftQ(), SoftQ(multi_step=1.0)], ids=str)
def test_at_psi_star_every_single_batch_of_draws_has_gradient_zero(objective):
    """No variance at the optimum: weights are equal, residuals are 0, whatever was drawn."""
    w = WORLDS["fixed length, graded"]()
    model = star(w)
    draws = TwistDraws(w.target(), LearnedTwist(model), OnePrompt(PROMPTS), HORIZON, stream(0), objective.needs, 7)
    for step in range(3):
        rows = objective.prepare(draws.batch(step))
        loss = objective.loss(model, rows).loss.sum()
        assert flat_gradient(loss, model).abs().max() < ZERO


def test_labels_of_rollouts_that_start_one_token_early_are_not_psi_star_s():
    """FUDGE on exact prefixes: fresh rollouts behind the prefix end at psi*; the original's, from one before, do not."""
    w = WORLDS["fixed length, graded"]().shifted(-1.1)
    tilted, plain = w.mass(w.p_ref() * (w.reward / w.beta).exp()), w.mass(w.p_ref())
    rows, model = w.evenly(), logit(w)

    def at(offset: int) -> Tensor:
        keys = [(int(x), *y) for x, y in zip(rows.prompt_index, rows.tokens.tolist(), strict=True)]
        phi = [[tilted[k[: t + 2 - offset]] / plain[k[: t + 2 - offset]] for t in range(HORIZON)] for k in keys]
        draws = Draws(
            N_PROMPTS, w.beta, None, rows, rows.with_(log_w=None), torch.tensor(phi, dtype=torch.float64).log()
        )
        prepared = FudgeLearning().prepare(draws)
        weight = prepared.weight.clone()
        weight[: len(rows)] = 0  # look at the exact prefixes alone
        loss = FudgeLearning().loss(model, replace(prepared, weight=weight)).loss.sum()
        return flat_gradient(loss, model)

    assert at(0).abs().max() < ZERO
    assert at(1).norm() > CLEARLY


def test_rollouts_behind_prefixes_average_to_psi_star():
    """On a real network, two tokens: behind the first, phi of a fresh second averages to psi*; behind both it is phi."""
    model, n = build("llama"), 4000

    def reward(samples: Samples) -> Tensor:
        return -samples.tokens.float().mean(1) / 8

    ids = torch.tensor([[5, 11]])
    one = Samples(Tokens.of([[1, 2, 3]]), torch.tensor([0]), ids, torch.ones_like(ids, dtype=torch.bool))
    target = Target(model, reward, 0.5)
    phi = rollouts_behind(target, one.select(torch.zeros(n, dtype=torch.int64)), 2, stream(4)).exp()
    state = model.start(Tokens.of([[1, 2, 3, 5]]), 0)
    values = torch.exp(-(5 + torch.arange(model.vocab_size)) / 2 / 8 / 0.5)
    want = float((state.log_next()[0].exp() * values).sum().detach())
    assert phi[:, 0].std() > 0.01
    assert abs(phi[:, 0].mean() - want) < 4 * phi[:, 0].std() / n**0.5
    torch.testing.assert_close(phi[:, 1], torch.full((n,), math.exp(-16 / 2 / 8 / 0.5), dtype=phi.dtype))


@pytest.mark.parametrize("place", FIXED + EOS)
def test_along_says_what_the_models_say(place):
    w = WORLDS[place]()
    model, rows = noisy(w), w.samples()
    walked = along(w.reference, LearnedTwist(model), rows, HORIZON)
    torch.testing.assert_close(walked.log_ref, w.reference.log_prob(rows).detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(walked.log_psi, model.values(rows)[..., 0].detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(walked.log_q, model.tilted_log_prob(w.reference, rows).detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("place", FIXED + EOS)
def test_the_mixture_s_weights_average_to_z(place):
    """Σ over completions of mixture density · weight = Z, prompt by prompt."""
    w = WORLDS[place]()
    rows = along(w.reference, LearnedTwist(noisy(w)), w.samples(), HORIZON)
    mixed = weighed_as_mixture(rows, w.beta)
    density = (rows.log_q.sum(1).exp() + rows.log_ref.sum(1).exp()) / 2
    torch.testing.assert_close(mixed.log_q.sum(1).exp(), density, atol=1e-12, rtol=0)
    z = (density * mixed.log_w.exp()).reshape(N_PROMPTS, -1).sum(1)
    torch.testing.assert_close(z.log(), w.log_z(), atol=1e-10, rtol=0)


def test_infilling_draws_the_gap_from_its_posterior():
    """Behind each condition, the gap's law is pi_ref(y)·pi_ref(c | y)/Z(c), by enumeration."""
    reference = TableLM(1, VOCAB, 3).randomise(torch.Generator().manual_seed(3))
    n = 20_000
    prompts, drawn = infilling(reference, Tokens.of([[0]]), n, 2, 1, stream(1))
    everything = Samples(Tokens.of([[0]]), torch.zeros(27, dtype=torch.int64), *_all(3))
    joint = reference.log_prob(everything).sum(1).exp().reshape(9, 3)
    gap = drawn.tokens[:, 0] * 3 + drawn.tokens[:, 1]
    for c in range(VOCAB):
        own = prompts.conditions.ids[:, 0] == c
        got = torch.bincount(gap[own], minlength=9).double() / own.sum()
        want = joint[:, c] / joint[:, c].sum()
        assert ((got - want).abs() < 4 * (want * (1 - want) / own.sum()).sqrt() + 1e-9).all()
    whole = Samples(Tokens.of([[0]]), torch.zeros(n, dtype=torch.int64), *_with(drawn, prompts.conditions))
    log_p = reference.log_prob(whole)
    torch.testing.assert_close(drawn.log_ref, log_p[:, :2].detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn.reward, log_p[:, 2].detach(), atol=1e-6, rtol=0)


def _all(horizon: int) -> tuple[Tensor, Tensor]:
    ids = torch.cartesian_prod(*[torch.arange(VOCAB)] * horizon)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _with(drawn: Samples, conditions: Tokens) -> tuple[Tensor, Tensor]:
    ids = torch.cat([drawn.tokens, conditions.ids], 1)
    return ids, torch.ones_like(ids, dtype=torch.bool)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("name", ["ctl", "sixo", "fudge", "dpg", "ctl with dpg"])
def test_micro_batches_change_nothing(name, size):
    w = WORLDS["fixed length, graded"]().shifted(LAWS[name].shift)
    objective, models = LAWS[name].objective(w), [noisy(w), noisy(w)]
    draws = exact_draws(w, models[0])
    for model, micro in zip(models, (0, size), strict=True):
        Engine(model, Optim(lr=0.1, micro_batch=micro)).update(objective, draws)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


TRAINED = {
    "ctl": (CTL(), {}),
    "soft q": (SoftQ(), {}),
    "sixo": (SIXO(), {}),
    "fudge": (FudgeLearning(), {}),
    "ctl, mixed draws": (CTL(), {"drawn_by": "mixed"}),
    "soft q, reference draws": (SoftQ(), {"drawn_by": "reference", "induced": True}),
    "dpg": (None, {}),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_from_nothing_comes_close_to_pi_star(name):
    objective, options = TRAINED[name]
    w = world(beta=0.4).shifted(-1.1)
    objective, model = objective or DPGObjective(w.reference), zero(w)
    twist = LearnedTwist(model, squashed=name == "fudge")
    draws = TwistDraws(w.target(), twist, OnePrompt(PROMPTS), HORIZON, stream(0), objective.needs, 100, **options)
    fit(model, objective, draws, steps=150, optim=Optim(lr=0.1, clip=0.0))
    solution = solve(w.target(), PROMPTS, HORIZON)
    before = solution.kl_to_target(solution.density(w.reference)).mean()
    after = solution.kl_to_target(solution.density(Guided(w.reference, twist))).mean()
    assert before > 0.3 and after < 0.25 * before


def test_a_step_s_draws_follow_from_its_number_alone():
    w = WORLDS["with eos, graded"]()
    model = noisy(w)
    draws = TwistDraws(
        w.target(), LearnedTwist(model), OnePrompt(PROMPTS), HORIZON, stream(3), ("proposal", "reference"), 9
    )
    first, again = draws.batch(5), (draws.batch(4), draws.batch(5))[1]
    for name in ("tokens", "log_q", "log_psi", "log_w", "reward"):
        assert torch.equal(getattr(first.proposal, name), getattr(again.proposal, name))
    assert torch.equal(first.reference.tokens, again.reference.tokens)


def test_weights_of_draws_are_self_normalised_within_prompts():
    w = WORLDS["fixed length, graded"]()
    found = smc(w.target(), LearnedTwist(noisy(w)), PROMPTS, replace(IMPORTANCE, particles=6), max_new_tokens=HORIZON,
                stream=stream(0)).samples  # fmt: skip
    a = positive_weights(found).reshape(N_PROMPTS, 6)
    torch.testing.assert_close(a, found.log_w.reshape(N_PROMPTS, 6).softmax(1))


def test_fudge_refuses_a_potential_above_one():
    w = WORLDS["fixed length, graded"]()
    with pytest.raises(ValueError, match="subtract the reward's upper bound"):
        FudgeLearning().prepare(exact_draws(w, zero(w)))


def test_an_objective_without_its_draws_says_what_it_lacks():
    with pytest.raises(ValueError, match="learns from 'proposal'"):
        CTL().prepare(Draws(1, 1.0))


# ---- one value of each loss by hand -------------------------------------------------------------------------


class Says(nn.Module):
    """A twist that says the same numbers for every batch."""

    def __init__(self, values: list[list[float]]) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def values(self, samples: Samples) -> Tensor:
        return self.numbers[: len(samples), :, None]


def two_rows(weight: float) -> Samples:
    """Two rows of two tokens, of weights `weight` and 1 towards pi*.

    Under q the first token of row 0 had 1/4, all else 1/2; the reference has 1/2. So row 0's reward is log(weight/2).
    """
    ids = torch.tensor([[0, 1], [1, 0]])
    log_q = torch.tensor([[0.25, 0.5], [0.5, 0.5]], dtype=torch.float64).log()
    log_ref = torch.full((2, 2), 0.5, dtype=torch.float64).log()
    log_psi = torch.tensor([[2.0, 3.0], [1.0, 1.0]], dtype=torch.float64).log()
    return Samples(
        Tokens.of([[0]]), torch.zeros(2, dtype=torch.int64), ids, torch.ones_like(ids, dtype=torch.bool),
        log_q=log_q, log_ref=log_ref, log_psi=log_psi,
        log_w=torch.tensor([math.log(weight), 0.0], dtype=torch.float64),
        reward=torch.tensor([math.log(weight / 2), 0.0], dtype=torch.float64),
    )  # fmt: skip


def value_of(objective: Any, draws: Draws, says: list[list[float]]) -> float:
    model = Says(says)
    rows = objective.prepare(draws)
    return float((objective.loss(model, rows).loss.sum() / objective.weight(rows).sum()).detach())


def test_ctl_by_hand():
    """A = (3/4, 1/4). Prefix weights: t=1 (½/¼)·2 = 4 and 1 -> B = (4/5, 1/5); t=2 (½·½)/(¼·½)·3 = 6 and 1 -> (6/7, 1/7).

    L = −½[(3/4 − 4/5)·1 + (1/4 − 1/5)·2 + (3/4 − 6/7)·3 + (1/4 − 1/7)·4] = −½[−.05 + .1 − .3214286 + .4285714]
    """
    draws = Draws(1, 1.0, two_rows(3.0))
    want = -0.5 * (-0.05 + 0.1 + 3 * (0.75 - 6 / 7) + 4 * (0.25 - 1 / 7))
    assert value_of(CTL(), draws, [[1.0, 3.0], [2.0, 4.0]]) == pytest.approx(want, abs=1e-12)


def test_soft_q_by_hand():
    """psi = (2, 3) and (4, 1), so n_1 = ½·2/¼ = ½·4/½ = 4; n_2 = ½·3/½ = 3 and 1. Goals: (log 3, log 4), (0, 0).

    Outputs 0 but for row 1's second, 2: L = ½·[½(log²3 + log²4) + ½(0 + 4)]
    """
    log_psi = torch.tensor([[2.0, 3.0], [4.0, 1.0]], dtype=torch.float64).log()
    draws = Draws(1, 1.0, two_rows(8.0).with_(log_psi=log_psi))
    want = 0.25 * (math.log(3) ** 2 + math.log(4) ** 2 + 4.0)
    assert value_of(SoftQ(), draws, [[0.0, 0.0], [0.0, 2.0]]) == pytest.approx(want, abs=1e-12)
    path = 0.5 * ((math.log(3) + math.log(4)) ** 2 + 4.0) / 2
    assert value_of(SoftQ(multi_step=1.0), draws, [[0.0, 0.0], [0.0, 2.0]]) == pytest.approx(
        want + path, abs=1e-12
    )


def test_sixo_by_hand():
    """Positives weigh (3/4, 1/4), negatives ½ each; all outputs log 3: −log σ = log(4/3), −log σ(−) = log 4."""
    rows = two_rows(3.0)
    draws = Draws(1, 1.0, rows, None, rows.with_(log_w=None))
    want = math.log(4 / 3) + math.log(4)
    assert value_of(SIXO(), draws, [[math.log(3)] * 2] * 4) == pytest.approx(want, abs=1e-12)


def test_fudge_by_hand():
    """phi = e^{r − log 4} = (1, 1/4); outputs log 3, so σ = 3/4: BCE = −log ¾ and −(¼ log ¾ + ¾ log ¼)."""
    rows = two_rows(8.0)
    draws = Draws(1, 1.0, None, None, rows.with_(reward=rows.reward - math.log(4.0)))
    want = 0.5 * (-math.log(0.75) - 0.25 * math.log(0.75) - 0.75 * math.log(0.25))
    assert value_of(FudgeLearning(), draws, [[math.log(3)] * 2] * 2) == pytest.approx(want, abs=1e-12)


def test_dpg_by_hand():
    """One token of two, reference (½, ½), psi (3, 1): q = (¾, ¼). Positives (token 0, weight 3/4; token 1, 1/4)."""
    reference = TableLM(1, 2, 1)
    values = TableValues(1, 2, 1)
    values.tables[0].data[0, :, 0] = torch.tensor([math.log(3.0), 0.0])
    ids = torch.tensor([[0], [1]])
    rows = Samples(Tokens.of([[0]]), torch.zeros(2, dtype=torch.int64), ids, torch.ones_like(ids, dtype=torch.bool),
                   log_w=torch.tensor([math.log(3.0), 0.0], dtype=torch.float64))  # fmt: skip
    objective = DPGObjective(reference)
    prepared = objective.prepare(Draws(1, 1.0, rows))
    loss = objective.loss(values, prepared).loss.sum() / objective.weight(prepared).sum()
    assert float(loss.detach()) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=ZERO)
