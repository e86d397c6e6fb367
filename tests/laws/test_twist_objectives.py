"""The law of every twist objective: where its exact expected gradient vanishes, where it does not, and what it is.

In worlds of counts (`world.counted`) a batch with every completion in its due number is the population itself, so
the weights that `prepare` normalises within a batch are the exact ones, and the gradient of that batch is the limit
of infinitely many draws. `test_fixed_points.test_every_objective_has_a_law` looks at `LAWS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from laws.world import (
    COUNTED,
    HORIZON,
    N_PROMPTS,
    PROMPTS,
    VOCAB,
    WORLDS,
    Counted,
    Prefix,
    World,
    flat_gradient,
    perturbed,
)
from tiltlm.models.table import TableValues
from tiltlm.samplers.guided import Guided
from tiltlm.samplers.scenes import OnePrompt
from tiltlm.samples import Samples
from tiltlm.seeds import stream
from tiltlm.twists.ctl import CTL
from tiltlm.twists.dpg import DPGObjective
from tiltlm.twists.draws import TwistDraws, along
from tiltlm.twists.fudge import FudgeLearning
from tiltlm.twists.learned import LearnedTwist
from tiltlm.twists.mixture import Mixture
from tiltlm.twists.objective import Draws
from tiltlm.twists.sixo import SIXO
from tiltlm.twists.soft_q import SoftQ, mean_backups

ZERO = 1e-10  # identities
CLEARLY = 5e-3  # the norm of a gradient that is not zero; those below are 0.01 to 1

Drawer = Literal["any", "reference", "pi*", "mixed"]
Positives = Literal["none", "exact", "weighted"]


# ---- twists -------------------------------------------------------------------------------------------------


def star(w: World, shift: Callable[[Prefix], float] = lambda prefix: 0.0) -> TableValues:
    """log psi*, plus `shift`."""
    return w.twist({prefix: x + shift(prefix) for prefix, x in w.log_psi_star().items() if len(prefix) > 1})


def per_step(w: World) -> TableValues:
    """psi* times a constant for every step."""
    return star(w, lambda prefix: (0.7, -1.1, 0.4)[len(prefix) - 2])


def per_parent(w: World) -> TableValues:
    """psi* times a factor of the prefix before its last token."""
    return star(w, lambda prefix: 0.3 + 0.9 * prefix[0] - 0.5 * sum(prefix[1:-1]))


def over_z(w: World) -> TableValues:
    """psi* / Z."""
    log_z = w.log_z().tolist()
    return star(w, lambda prefix: -log_z[prefix[0]])


def logit(w: World) -> TableValues:
    """What FUDGE's head says at psi*: σ of it is psi* (tables' unused entries are left out of it)."""
    values = star(w)
    for table in values.tables:
        table.data = torch.where(table == 0, 0.0, table.data - torch.log(-torch.expm1(table.data)))
    return values


def silent(w: World) -> TableValues:
    return TableValues(N_PROMPTS, VOCAB, HORIZON)


def noisy(w: World) -> TableValues:
    return perturbed(star(w))


# ---- populations --------------------------------------------------------------------------------------------


def counts(w: Counted, drawer: Drawer) -> Tensor:
    """How often every completion stands in the population of `drawer`, int64 [P, S]."""
    some = torch.randint(1, 4, w.counts.shape, generator=torch.Generator().manual_seed(5))
    exact = w.counts * w.hits
    return {"any": some, "reference": w.counts, "pi*": exact, "mixed": w.counts + exact}[drawer]


def under(values: TableValues, samples: Samples) -> Samples:
    """`samples` with the log psi of a twist."""
    return samples.with_(log_psi=values.values(samples).detach()[..., 0])


def population(w: Counted, values: TableValues, drawer: Drawer = "any", positives: Positives = "none") -> Draws:
    """Everything an objective may want, drawn in full."""
    better = {"none": None, "exact": w.exact(), "weighted": w.drawn(counts(w, "mixed"))}[positives]
    return Draws(N_PROMPTS, w.beta, under(values, w.drawn(counts(w, drawer))), better, w.drawn(w.counts))


def induced(w: Counted, values: TableValues, drawer: Drawer = "any", positives: Positives = "none") -> Draws:
    """The same for soft Q: log_q is the twist-induced proposal's, whoever drew; with mean backups."""
    draws, twist = population(w, values, drawer, positives), LearnedTwist(values)

    def walked(x: Samples | None) -> tuple[Samples | None, Tensor | None]:
        if x is None:
            return None, None
        return along(w.reference, twist, x, HORIZON), mean_backups(w.reference, twist, x)

    (proposal, backups), (better, more) = walked(draws.proposal), walked(draws.positives)
    return replace(draws, proposal=proposal, positives=better, backups=backups, positive_backups=more)


def reduced(objective: Any, values: TableValues, rows: Any) -> Tensor:
    """The gradient of the loop's reduction, Σ loss / Σ weight, of prepared rows; flat."""
    return flat_gradient(objective.loss(values, rows).loss.sum() / objective.weight(rows).sum(), values)


# ---- where the gradient is zero -----------------------------------------------------------------------------


Point = Callable[[Counted], TableValues]
Draw = Callable[[Counted, TableValues], Draws]
Make = Callable[[Counted], Any]


@dataclass(frozen=True)
class TwistLaw:
    """`objective` on the population that `draws` makes: zero `at` some twists, at none of `elsewhere`."""

    objective: type
    make: Make
    draws: Draw
    at: tuple[Point, ...]
    elsewhere: tuple[Point, ...]
    worlds: tuple[str, ...] = tuple(COUNTED)

    def gradient(self, w: Counted, values: TableValues) -> Tensor:
        objective = self.make(w)
        return reduced(objective, values, objective.prepare(self.draws(w, values)))


def ctl_laws(name: str, make: Make, draws: Draw) -> dict[str, TwistLaw]:
    """A constant per step is free where no row ends early, and only there."""
    wrong = (silent, noisy, per_parent)
    return {
        f"{name}, fixed": TwistLaw(CTL, make, draws, (star, per_step), wrong, ("fixed length",)),
        f"{name}, eos": TwistLaw(CTL, make, draws, (star,), (*wrong, per_step), ("with eos",)),
    }


def sixo_and_dpg_laws(name: str, draws: Draw) -> dict[str, TwistLaw]:
    free = (star, per_step, per_parent)
    return {
        f"sixo, {name}": TwistLaw(SIXO, lambda w: SIXO(), draws, (over_z,), (star, silent, noisy, per_step)),
        f"dpg, {name}": TwistLaw(DPGObjective, lambda w: DPGObjective(w.reference), draws, free, (silent, noisy)),
    }


def mixture_law(first: Any, draws: Draw, at: Point, *elsewhere: Point) -> TwistLaw:
    wrong = (silent, noisy, per_parent, *elsewhere)
    return TwistLaw(Mixture, lambda w: Mixture(first, DPGObjective(w.reference), 0.3), draws, (at,), wrong)


SOFT_Q = {"log": SoftQ(), "linear": SoftQ("linear"), "multi-step": SoftQ(multi_step=0.7)}
LAWS: dict[str, TwistLaw] = {
    **sixo_and_dpg_laws("positives by weight", population),
    "fudge": TwistLaw(FudgeLearning, lambda w: FudgeLearning(), population, (logit,), (star, silent, noisy)),
    "ctl and dpg": mixture_law(CTL(), population, star),
    "sixo and dpg": mixture_law(SIXO(), population, over_z, star),
    "soft q and dpg": mixture_law(SoftQ(), partial(induced, positives="exact"), star),
    "soft q and dpg by weight": mixture_law(SoftQ(), induced, star),
}
for by in ("any", "reference", "pi*"):
    LAWS |= ctl_laws(f"ctl, drawn by {by}", lambda w: CTL(), partial(population, drawer=by))
    LAWS |= ctl_laws(f"ctl against the next, drawn by {by}", lambda w: CTL("next"), partial(population, drawer=by))
for kind in ("exact", "weighted"):
    LAWS |= ctl_laws(f"ctl, {kind} positives", lambda w: CTL(), partial(population, positives=kind))
    LAWS |= sixo_and_dpg_laws(f"{kind} positives", partial(population, positives=kind))
for kind, soft_q in SOFT_Q.items():
    drawn = {f"drawn by {by}": partial(induced, drawer=by) for by in ("any", "reference", "pi*", "mixed")}
    for how, draws in (drawn | {"and exact rows": partial(induced, positives="exact")}).items():
        wrong = (silent, noisy, per_step, over_z)
        LAWS[f"soft q {kind}, {how}"] = TwistLaw(SoftQ, lambda w, o=soft_q: o, draws, (star,), wrong)


def in_each_world() -> list[Any]:
    pairs = [(name, place) for name, law in LAWS.items() for place in law.worlds]
    return [pytest.param(*pair, id=" | ".join(pair)) for pair in pairs]


@pytest.mark.parametrize(("name", "place"), in_each_world())
def test_expected_gradient_is_zero_where_it_should_be_and_not_elsewhere(name, place):
    law, w = LAWS[name], COUNTED[place]()
    for point in law.at:
        assert law.gradient(w, point(w)).abs().max() < ZERO
    for point in law.elsewhere:
        assert law.gradient(w, point(w)).norm() > CLEARLY


@pytest.mark.parametrize("place", COUNTED)
def test_the_worlds_of_counts_are_what_they_say(place):
    """Exact rows come in pi*'s proportions, log_w averages to Z, psi* is far from 1."""
    w = COUNTED[place]()
    exact = (w.counts * w.hits).double()
    torch.testing.assert_close(exact / exact.sum(1, keepdim=True), w.p_star(), atol=1e-12, rtol=0)
    rows = w.drawn(counts(w, "any"))
    for x in range(N_PROMPTS):
        assert abs(rows.log_w[rows.prompt_index == x].exp().mean().log() - w.log_z()[x]) < ZERO
    assert star(w).values(w.samples()).abs().max() > 0.5 and w.log_z().max() < -0.3


# ---- finite batches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", WORLDS)
@pytest.mark.parametrize("objective", [CTL(), CTL("next"), *SOFT_Q.values()], ids=str)
def test_at_psi_star_no_single_batch_of_q_has_a_gradient(place, objective):
    """All weights are Z, all goals are met: seven draws of each prompt, three times."""
    w = WORLDS[place]()
    at = TwistDraws(
        w.target(), LearnedTwist(star(w)), OnePrompt(PROMPTS), HORIZON, stream(3, "zero"), objective.needs, 7
    )
    for step in range(3):
        assert reduced(objective, star(w), objective.prepare(at.batch(step))).abs().max() < ZERO
    elsewhere = replace(at, twist=LearnedTwist(noisy(w))).batch(0)
    assert reduced(objective, noisy(w), objective.prepare(elsewhere)).norm() > CLEARLY


@pytest.mark.parametrize("place", COUNTED)
@pytest.mark.parametrize("kind", SOFT_Q)
@pytest.mark.parametrize("positives", ["none", "exact"])
def test_soft_q_s_loss_is_zero_row_by_row_at_psi_star(place, kind, positives):
    w, objective = COUNTED[place](), SOFT_Q[kind]
    rows = objective.prepare(induced(w, star(w), positives=positives))
    assert objective.loss(star(w), rows).loss.abs().max() < ZERO


# ---- what the gradients are ---------------------------------------------------------------------------------


def log_mass(w: Counted, values: TableValues, t: int) -> dict[Prefix, Tensor]:
    """log [pi_ref·psi_t] of every prefix of t tokens, log [pi_ref·phi] of every row that ended before; with
    gradient in the twist."""
    total, samples = w.mass(w.p_ref()), w.samples()
    log_psi = values.values(samples)[..., 0]
    found: dict[Prefix, Tensor] = {}
    for i, row in enumerate(w.rows):
        last = log_psi[i, t - 1] if len(row) - 1 >= t else samples.reward[i] / w.beta
        found[row[: t + 1]] = torch.tensor(total[row[: t + 1]], dtype=torch.float64).log() + last
    return found


def whole(w: Counted) -> dict[Prefix, Tensor]:
    """log [pi_ref·phi] of every completion."""
    return dict(zip(w.rows, (w.p_ref() * (w.reward / w.beta).exp()).log().flatten(), strict=True))


def marginal(masses: dict[Prefix, Tensor], t: int) -> dict[Prefix, Tensor]:
    """Log-masses of longer prefixes, summed up to those of t tokens."""
    found: dict[Prefix, list[Tensor]] = {}
    for prefix, x in masses.items():
        found.setdefault(prefix[: t + 1], []).append(x)
    return {prefix: torch.stack(xs).logsumexp(0) for prefix, xs in found.items()}


def kl_of_steps(w: Counted, values: TableValues, goal: Callable[[int], dict[Prefix, Tensor]]) -> Tensor:
    """(1/PT) Σ_x Σ_t KL(goal_t ‖ pi_t), pi_t ∝ pi_ref·psi_t; goal(t): unnormalised log-masses, held fixed."""
    total = torch.zeros((), dtype=torch.float64)
    for t in range(1, HORIZON + 1):
        own, wanted = log_mass(w, values, t), goal(t)
        for x in range(N_PROMPTS):
            keys = [key for key in own if key[0] == x]
            log_own = torch.stack([own[key] for key in keys]).log_softmax(0)
            log_goal = torch.stack([wanted[key].detach() for key in keys]).log_softmax(0)
            total = total + (log_goal.exp() * (log_goal - log_own)).sum()
    return total / (HORIZON * N_PROMPTS)


@pytest.mark.parametrize("place", COUNTED)
@pytest.mark.parametrize("positives", ["none", "exact", "weighted"])
@pytest.mark.parametrize("drawer", ["any", "pi*"])
def test_ctl_s_gradient_is_that_of_the_divergence_of_every_step_from_pi_star(place, positives, drawer):
    w = COUNTED[place]()
    values = noisy(w)
    direct = flat_gradient(kl_of_steps(w, values, lambda t: marginal(whole(w), t)), values)
    got = reduced(CTL(), values, CTL().prepare(population(w, values, drawer, positives)))
    torch.testing.assert_close(got, direct, atol=ZERO, rtol=0)
    assert direct.norm() > CLEARLY


@pytest.mark.parametrize("place", COUNTED)
def test_nested_inference_s_gradient_is_that_of_the_divergence_of_every_step_from_the_next(place):
    w = COUNTED[place]()
    values, objective = noisy(w), CTL("next")

    def after(t: int) -> dict[Prefix, Tensor]:
        return marginal(log_mass(w, values, t + 1) if t < HORIZON else whole(w), t)

    direct = flat_gradient(kl_of_steps(w, values, after), values)
    got = reduced(objective, values, objective.prepare(population(w, values)))
    torch.testing.assert_close(got, direct, atol=ZERO, rtol=0)
    assert direct.norm() > CLEARLY


@pytest.mark.parametrize("place", COUNTED)
@pytest.mark.parametrize("positives", ["none", "exact", "weighted"])
def test_dpg_s_gradient_is_that_of_the_divergence_of_q_from_pi_star(place, positives):
    """KL(pi*‖q)/T, differentiated through the guided model itself."""
    w = COUNTED[place]()
    values, objective = noisy(w), DPGObjective(w.reference)
    log_q = Guided(w.reference, LearnedTwist(values)).log_prob(w.samples()).sum(1)
    direct = flat_gradient(-(w.p_star().flatten() * log_q).sum() / (N_PROMPTS * HORIZON), values)
    got = reduced(objective, values, objective.prepare(population(w, values, positives=positives)))
    torch.testing.assert_close(got, direct, atol=ZERO, rtol=0)
    assert direct.norm() > CLEARLY


@pytest.mark.parametrize("place", COUNTED)
def test_a_mixture_s_gradient_is_the_mixture_of_the_gradients(place):
    w = COUNTED[place]()
    values, parts = noisy(w), (SIXO(), DPGObjective(w.reference))
    draws, both = population(w, values, positives="weighted"), Mixture(*parts, 0.3)
    each = [reduced(part, values, part.prepare(draws)) for part in parts]
    got = reduced(both, values, both.prepare(draws))
    torch.testing.assert_close(got, 0.3 * each[0] + 0.7 * each[1], atol=ZERO, rtol=0)


# ---- soft Q with mean backups: biased -----------------------------------------------------------------------


@pytest.mark.parametrize("place", COUNTED)
@pytest.mark.parametrize("positives", ["none", "exact"])
def test_soft_q_with_mean_backups_ends_at_the_expected_reward_and_not_at_psi_star(place, positives):
    """Exactly E_ref[r | prefix] / beta; the loss is zero row by row there."""
    w, objective = COUNTED[place](), SoftQ("mean")
    total, paid = w.mass(w.p_ref()), w.mass(w.p_ref() * w.reward)
    expected = w.twist({prefix: paid[prefix] / total[prefix] / w.beta for prefix in total})
    rows = objective.prepare(induced(w, expected, positives=positives))
    assert objective.loss(expected, rows).loss.abs().max() < ZERO
    assert reduced(objective, expected, rows).abs().max() < ZERO
    assert "biased" in objective.optimum
    for values in (star(w), noisy(w), silent(w)):
        rows = objective.prepare(induced(w, values, positives=positives))
        assert reduced(objective, values, rows).norm() > CLEARLY


# ---- FUDGE --------------------------------------------------------------------------------------------------


def endings(w: Counted, prefix: Prefix) -> list[tuple[float, float]]:
    """Every completion that begins with `prefix`: its probability under pi_ref given the prefix, and log phi."""
    p, log_phi = w.p_ref().flatten().tolist(), (w.reward / w.beta).flatten().tolist()
    some = [(p[i], log_phi[i]) for i, row in enumerate(w.rows) if row[: len(prefix)] == prefix]
    total = sum(chance for chance, _ in some)
    return [(chance / total, x) for chance, x in some]


def rollouts(w: Counted, samples: Samples, early: int) -> list[tuple[Tensor, Tensor]]:
    """Rollout number j of every prefix at once: its chance and its log phi, [N, T] each; they start `early` tokens
    too early."""
    rows = [(x, *y) for x, y in zip(samples.prompt_index.tolist(), samples.completions.lists(), strict=True)]
    found = {row: [endings(w, row[: t + 2 - early]) for t in range(len(row) - 1)] for row in set(rows)}
    most = max(len(some) for per_row in found.values() for some in per_row)
    every = torch.zeros(most, 2, *samples.mask.shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        for t, some in enumerate(found[row]):
            every[: len(some), :, i, t] = torch.tensor(some, dtype=torch.float64)
    return [(chance, label) for chance, label in every]


def fudge_on_prefixes(w: Counted, values: TableValues, early: int) -> Tensor:
    """Expected gradient with half of the prefixes from pi*, summed over all rollouts by their chances."""
    draws, objective = population(w, values, positives="exact"), FudgeLearning()
    parts = rollouts(w, draws.positives, early)
    own = torch.full((len(draws.reference), HORIZON), 1 / len(parts), dtype=torch.float64)
    total = torch.zeros(())
    for chance, label in parts:
        rows = objective.prepare(replace(draws, prefixes=label))
        total = total + reduced(objective, values, replace(rows, weight=rows.weight * torch.cat([own, chance])))
    return total


@pytest.mark.parametrize("place", COUNTED)
def test_fudge_on_prefixes_of_pi_star_ends_at_psi_star_if_rollouts_start_behind_them(place):
    """One token too early, as in the original, is a bias: the labels of y_≤t would be those of y_<t."""
    w = COUNTED[place]()
    assert fudge_on_prefixes(w, logit(w), early=0).abs().max() < ZERO
    assert fudge_on_prefixes(w, logit(w), early=1).norm() > CLEARLY
    assert fudge_on_prefixes(w, noisy(w), early=0).norm() > CLEARLY


def test_fudge_on_exact_draws_with_their_own_labels_is_biased():
    """E_pi*[phi | prefix] is not psi*: this is what the fresh rollouts are for."""
    w, objective = COUNTED["fixed length"](), FudgeLearning()
    rows = objective.prepare(replace(population(w, logit(w)), reference=w.exact()))
    assert reduced(objective, logit(w), rows).norm() > CLEARLY


def test_fudge_refuses_a_potential_above_one():
    w = COUNTED["fixed length"]()
    draws = population(w, silent(w), positives="exact")
    paid = draws.reference.with_(reward=draws.reference.reward + 2)
    with pytest.raises(ValueError, match=r"≤ 1, a probability; the largest r/beta is 3\.0\d+: subtract"):
        FudgeLearning().prepare(replace(draws, reference=paid))
    labels = torch.full(w.exact().mask.shape, 0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match="≤ 1"):
        FudgeLearning().prepare(replace(draws, prefixes=labels))


# ---- draws that an objective cannot learn from --------------------------------------------------------------


def test_ctl_refuses_rows_whose_log_q_is_not_their_drawer_s():
    """B weighs rows by what drew them: resampled and exact rows have no weights, `induced` ones another's."""
    w = COUNTED["fixed length"]()
    values = noisy(w)
    drawn = under(values, w.drawn(counts(w, "any")))
    for wrong in (drawn.with_(log_w=None), along(w.reference, LearnedTwist(values), drawn, HORIZON)):
        with pytest.raises(ValueError, match="CTL weighs the proposal's rows"):
            CTL().prepare(Draws(N_PROMPTS, w.beta, wrong))


def test_soft_q_refuses_rows_without_its_goals():
    w = COUNTED["fixed length"]()
    with pytest.raises(ValueError, match="draw with `induced`"):
        SoftQ().prepare(population(w, noisy(w), "reference"))
    with pytest.raises(ValueError, match="`backups`"):
        SoftQ("mean").prepare(replace(induced(w, noisy(w), positives="exact"), positive_backups=None))


@pytest.mark.parametrize(
    ("objective", "lacking"), [(CTL(), "proposal"), (SoftQ(), "proposal"), (SIXO(), "reference")], ids=str
)
def test_a_part_that_was_not_drawn_is_named(objective, lacking):
    w = COUNTED["fixed length"]()
    with pytest.raises(ValueError, match=f"'{lacking}'"):
        objective.prepare(replace(population(w, silent(w)), **{lacking: None}))
