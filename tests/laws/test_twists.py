"""The law of every rule that turns a law of the reward into a twist: where guided decoding with it ends.

`RULES` names every rule of `tiltlm.twists`; a new one without a law fails `test_every_rule_has_a_law`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import tiltlm.twists
from laws.world import BINARY, HORIZON, N_PROMPTS, PROMPTS, VOCAB, WORLDS, World, perturbed, world
from tiltlm.data.tree import tree
from tiltlm.exact import Solution, solve
from tiltlm.models.base import LanguageModel
from tiltlm.models.table import TableLM, TableValues
from tiltlm.samplers.guided import Guided
from tiltlm.samples import Tokens
from tiltlm.target import Target
from tiltlm.twists.cd import CD
from tiltlm.twists.fudge import Fudge
from tiltlm.twists.q_sharp import QSharp
from tiltlm.twists.value import Rule, ValueRule, ValueTwist, log_pmf

EXACT = 1e-10
BINARY_WORLDS = [name for name in WORLDS if "binary" in name]

RULES = {
    QSharp: "test_q_sharp_with_the_true_law_draws_pi_star",
    CD: "test_cd_does_not_end_at_pi_star",
    Fudge: "test_fudge_draws_the_reference_given_success",
}
"""Every rule, with the test that says where guided decoding with it ends."""


def guided(w: World, rule: Rule, width: int = 0, **options: float) -> Guided:
    """The reference guided by `rule` of the exact law."""
    return Guided(w.reference, ValueTwist(w.law(width=width), rule, w.atoms, **options))


def log_psi(w: World, rule: Rule, values: TableValues | None = None) -> Tensor:
    """The rule's twist after every token of every row, [P·S, T]."""
    values = w.law() if values is None else values
    law = log_pmf(values.values(w.samples()))
    return rule.log_psi(law, torch.tensor(w.atoms, dtype=law.dtype)).detach()


def solved(w: World) -> tuple[Solution, Tensor]:
    """The answer sheet, its rows in `exact`'s own order, and pi* by it."""
    solution = solve(w.target(), PROMPTS, HORIZON)
    return solution, solution.log_pi_star


def test_every_rule_has_a_law():
    found = set()
    for info in pkgutil.iter_modules(tiltlm.twists.__path__, "tiltlm.twists."):
        module = importlib.import_module(info.name)
        own = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
        found |= {
            x for x in own if hasattr(x, "log_psi") and not hasattr(x, "append") and x not in (Rule, ValueRule)
        }
    assert found == set(RULES), "give each rule a test of where it ends, and name it in RULES"
    assert all(name in globals() for name in RULES.values())


# ---- Q# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", WORLDS)
def test_q_sharp_with_the_true_law_draws_pi_star(place):
    w = WORLDS[place]()
    solution, log_pi_star = solved(w)
    torch.testing.assert_close(solution.density(guided(w, QSharp(w.beta))), log_pi_star, atol=EXACT, rtol=0)
    other = solution.density(guided(w, QSharp(2 * w.beta)))
    assert (other - log_pi_star).abs().max() > 0.01


@pytest.mark.parametrize("place", WORLDS)
def test_q_sharp_s_log_psi_is_the_answer_sheet_s(place):
    """Equal, so equal up to a constant per parent too. A perturbed law is told apart."""
    w = WORLDS[place]()
    solution, _ = solved(w)
    samples, rule = solution.samples, QSharp(w.beta)
    atoms = torch.tensor(w.atoms, dtype=torch.float64)

    def of(values: TableValues) -> Tensor:
        return torch.where(samples.mask, rule.log_psi(log_pmf(values.values(samples)), atoms), 0.0)

    torch.testing.assert_close(of(w.law()), solution.log_psi_star(), atol=EXACT, rtol=0)
    assert (of(perturbed(w.law())) - solution.log_psi_star()).abs().max() > 0.01


@pytest.mark.parametrize("place", WORLDS)
def test_j_of_q_sharp_is_v_star_and_a_perturbed_law_falls_short(place):
    w = WORLDS[place]()
    solution, _ = solved(w)

    def j(model: LanguageModel) -> Tensor:
        return solution.objective(solution.density(model))

    torch.testing.assert_close(j(guided(w, QSharp(w.beta))), solution.v_star(), atol=EXACT, rtol=0)
    wrong = Guided(w.reference, ValueTwist(perturbed(w.law()), QSharp(w.beta), w.atoms))
    assert (solution.v_star() - j(wrong)).min() > 1e-3


def test_q_sharp_leaves_the_reference_alone_as_beta_grows():
    w = world()
    density = w.density(guided(w, QSharp(1e9)))
    torch.testing.assert_close(density, w.p_ref(), atol=1e-8, rtol=0)
    assert (w.density(guided(w, QSharp(1.0))) - w.p_ref()).abs().max() > 0.01


def test_offset_times_beta_tends_to_p_as_beta_grows():
    """log(1 + p(e^{1/b} − 1)) · b → p, for Q# and CD alike."""
    p = torch.tensor([0.0, 1e-6, 0.2, 0.5, 0.97, 1.0], dtype=torch.float64)
    law = torch.stack([(1 - p).log(), p.log()], -1)
    atoms = torch.tensor(BINARY, dtype=torch.float64)
    for rule in (QSharp, CD):
        torch.testing.assert_close(rule(1e6).log_psi(law, atoms) * 1e6, p, atol=1e-6, rtol=0)
    assert ((QSharp(1.0).log_psi(law, atoms) - p).abs()[1:-1] > 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tiny_beta_stays_finite_and_right(dtype):
    """beta = 1e-3: log(1 + p(e^1000 − 1)) = 1000 + log p to within e^{-1000}, wherever p > 0."""
    z = torch.tensor([-20.0, -3.0, 0.0, 5.0, 20.0], dtype=dtype)[:, None]
    law = log_pmf(z)
    offset = QSharp(1e-3).log_psi(law, torch.tensor(BINARY, dtype=dtype))
    expected = 1000 + torch.nn.functional.logsigmoid(z[:, 0])
    torch.testing.assert_close(offset, expected, atol=1e-10 if dtype == torch.float64 else 1e-4, rtol=0)
    impossible = torch.tensor([[0.0, -torch.inf]], dtype=dtype)
    assert QSharp(1e-3).log_psi(impossible, torch.tensor(BINARY, dtype=dtype)).tolist() == [0.0]


@pytest.mark.parametrize("place", BINARY_WORLDS)
def test_guided_decoding_with_a_tiny_beta_is_a_distribution(place):
    w = WORLDS[place]()
    density = w.density(guided(w, QSharp(1e-3)))
    torch.testing.assert_close(density.sum(1), torch.ones(N_PROMPTS, dtype=torch.float64), atol=EXACT, rtol=0)
    torch.testing.assert_close(density[w.reward == 1].sum() / N_PROMPTS, torch.ones((), dtype=torch.float64))


def test_the_binary_formula_is_the_histogram_s():
    """logaddexp(logσ(z) + 1/b, logσ(−z)) = log(1 + p(e^{1/b} − 1)), beta 0.7, every logit."""
    z = torch.linspace(-8, 8, 33, dtype=torch.float64)
    p = 1 / (1 + (-z).exp())
    offset = QSharp(0.7).log_psi(log_pmf(z[:, None]), torch.tensor(BINARY, dtype=torch.float64))
    torch.testing.assert_close(offset, (1 + p * (math.exp(1 / 0.7) - 1)).log(), atol=EXACT, rtol=0)


@pytest.mark.parametrize("place", BINARY_WORLDS)
@pytest.mark.parametrize("rule", [QSharp(0.6), CD(0.6), Fudge()], ids=["q_sharp", "cd", "fudge"])
def test_one_success_logit_is_a_histogram_of_two_atoms(place, rule):
    w = WORLDS[place]()
    one, two = log_psi(w, rule, w.law(width=1)), log_psi(w, rule, w.law(width=2))
    real = w.samples().mask
    torch.testing.assert_close(one[real], two[real], atol=EXACT, rtol=0)


# ---- CD -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", WORLDS)
def test_cd_lies_below_q_sharp_and_meets_it_at_the_last_token(place):
    """Jensen: strict wherever the reward is still open, equality where it is settled."""
    w = WORLDS[place]()
    gap = log_psi(w, QSharp(w.beta)) - log_psi(w, CD(w.beta))
    mask = w.samples().mask
    last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    assert gap[mask].min() > -EXACT
    assert gap[last].abs().max() < EXACT
    assert gap[mask & ~last].max() > 0.05


@pytest.mark.parametrize("beta", [0.05, 0.6, 20.0])
def test_jensen_holds_for_any_law(beta):
    law = torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    atoms = torch.tensor([-0.5, 0.0, 0.3, 1.0], dtype=torch.float64)
    gap = QSharp(beta).log_psi(law, atoms) - CD(beta).log_psi(law, atoms)
    assert gap.min() > 0 if beta < 1 else gap.min() > -EXACT


@pytest.mark.parametrize("place", WORLDS)
def test_cd_does_not_end_at_pi_star(place):
    w = WORLDS[place]()
    solution, log_pi_star = solved(w)
    log_q = solution.density(guided(w, CD(w.beta)))
    assert (log_q.exp() - log_pi_star.exp()).abs().max() > 1e-3
    assert (solution.v_star() - solution.objective(log_q)).min() > 1e-4


@pytest.mark.parametrize("place", WORLDS)
def test_cd_tilts_by_the_expected_reward(place):
    """log psi_CD = E_ref[r | prefix] / beta, the expectation summed over the completions themselves."""
    w = WORLDS[place]()
    total, mass = w.mass(w.p_ref() * w.reward), w.mass(w.p_ref())
    psi = log_psi(w, CD(w.beta))
    for n, row in enumerate(w.rows):
        for t in range(len(row) - 1):
            prefix = row[: t + 2]
            assert abs(psi[n, t] - total[prefix] / mass[prefix] / w.beta) < EXACT


# ---- FUDGE --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", BINARY_WORLDS)
def test_fudge_draws_the_reference_given_success(place):
    """Exactly pi_ref(y | r = 1). Prefixes without hope are left out: they are never entered."""
    w = WORLDS[place]()
    conditional = w.p_ref() * w.reward
    conditional = conditional / conditional.sum(1, keepdim=True)
    hopeful = w.reward == 1
    density = w.density(guided(w, Fudge()))
    torch.testing.assert_close(density[hopeful], conditional[hopeful], atol=EXACT, rtol=0)
    assert (density[hopeful] - w.p_star()[hopeful]).abs().max() > 0.01


@pytest.mark.parametrize("place", BINARY_WORLDS)
def test_an_impossible_completion_has_density_zero_not_nan(place):
    """Completions behind a hopeless prefix have probability 0 under FUDGE: log −inf."""
    w = WORLDS[place]()
    density = w.density(guided(w, Fudge()))
    assert (density[w.reward == 0] == 0).all()
    torch.testing.assert_close(density.sum(1), torch.ones(N_PROMPTS, dtype=torch.float64), atol=EXACT, rtol=0)


def test_fudge_is_the_limit_of_q_sharp_less_one_over_beta():
    """Q# − 1/b − log p = log(1 + (1 − p)/p·e^{-1/b}): it shrinks with beta and is below 1e-10 at 0.02."""
    p = torch.tensor([0.01, 0.3, 0.9, 1.0], dtype=torch.float64)
    law = torch.stack([(1 - p).log(), p.log()], -1)
    atoms = torch.tensor(BINARY, dtype=torch.float64)
    gaps = [
        (QSharp(beta).log_psi(law, atoms) - 1 / beta - Fudge().log_psi(law, atoms)).abs().max().item()
        for beta in (1.0, 0.3, 0.1, 0.02)
    ]
    assert all(a > b for a, b in pairwise(gaps))
    assert gaps[0] > 1 and gaps[-1] < EXACT


@pytest.mark.parametrize("beta", [0.1, 0.6, 3.0])
def test_fudge_ends_in_the_same_place_whatever_beta_is(beta):
    """Its distribution is pi* of beta → 0 and so only pi*'s when beta is small."""
    w = world(binary=True, beta=beta)
    hopeful = w.reward == 1
    density = w.density(guided(w, Fudge()))[hopeful]
    torch.testing.assert_close(density, w.p_star(1e-2)[hopeful], atol=EXACT, rtol=0)
    assert ((density - w.p_star()[hopeful]).abs().max() < 1e-3) == (beta == 0.1)


def test_fudge_refuses_a_reward_that_is_not_binary():
    with pytest.raises(ValueError, match="FUDGE needs a binary reward; this value model has 4 atoms"):
        guided(world(), Fudge()).start(PROMPTS, HORIZON).logits()


# ---- what all rules share -----------------------------------------------------------------------------------


class _Shifted:
    """A rule plus a number."""

    def __init__(self, rule: Rule, by: float) -> None:
        self.rule, self.by = rule, by

    def log_psi(self, law: Tensor, atoms: Tensor) -> Tensor:
        return self.rule.log_psi(law, atoms) + self.by


@pytest.mark.parametrize("rule", [QSharp(0.6), CD(0.6)], ids=["q_sharp", "cd"])
def test_a_constant_offset_cancels_in_guided_decoding(rule):
    w = world()
    plain, shifted = w.density(guided(w, rule)), w.density(guided(w, _Shifted(rule, 37.5)))
    torch.testing.assert_close(shifted, plain, atol=EXACT, rtol=0)


@pytest.mark.parametrize("rule", [QSharp, CD])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_a_beta_that_is_not_positive_is_refused(rule, beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        rule(beta)


def test_a_histogram_without_a_value_per_atom_is_a_softmax():
    """Logits (0, ln 3) are probabilities 1/4 and 3/4; a lone logit ln 3 says the same."""
    two = log_pmf(torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)).exp()
    one = log_pmf(torch.tensor([[math.log(3)]], dtype=torch.float64)).exp()
    torch.testing.assert_close(two, torch.tensor([[0.25, 0.75]], dtype=torch.float64))
    torch.testing.assert_close(one, two)


# ---- values learnt from balanced pairs ----------------------------------------------------------------------


def half_and_half(w: World) -> Tensor:
    """The law of completions taken half from the reference's successes, half from its failures, [P, S]."""
    p, good = w.p_ref(), w.reward == 1
    won, lost = torch.where(good, p, 0.0), torch.where(good, 0.0, p)
    return won / won.sum(1, keepdim=True) / 2 + lost / lost.sum(1, keepdim=True) / 2


@pytest.mark.parametrize("x", range(N_PROMPTS))
@pytest.mark.parametrize("place", BINARY_WORLDS)
@pytest.mark.parametrize("width", [1, 2])
def test_log_odds_puts_values_learnt_from_balanced_pairs_right(place, x, width):
    """The exact law under half successes, half failures, plus logit p0(x), guides to pi* exactly.

    p0 differs by prompt, so each prompt is tried by itself. Uncorrected, or corrected otherwise, it misses.
    """
    w = WORLDS[place]()
    p0 = float((w.p_ref() * w.reward)[x].sum())
    values = w.law(p=half_and_half(w), width=width)

    def density(log_odds: float) -> Tensor:
        return w.density(Guided(w.reference, ValueTwist(values, QSharp(w.beta), BINARY, log_odds)))[x]

    logit = math.log(p0 / (1 - p0))
    torch.testing.assert_close(density(logit), w.p_star()[x], atol=EXACT, rtol=0)
    assert (density(0.0) - w.p_star()[x]).abs().max() > 1e-4
    assert (density(logit + 2) - w.p_star()[x]).abs().max() > 1e-3


def test_log_odds_for_more_than_two_atoms_are_refused():
    with pytest.raises(ValueError, match="log_odds corrects a binary value"):
        ValueTwist(TableValues(1, VOCAB, 1, 3), QSharp(1.0), (0.0, 0.5, 1.0), 0.3)


# ---- the tree -----------------------------------------------------------------------------------------------

TREE = {
    (0.5, 1.0): ((0.4956, 0.1125, 0.0212, 0.09125), (0.4875, 0.1123, 0.0211, 0.09112), 0.09125),
    (0.5, 0.3): ((0.6276, 0.4113, 0.7431, 0.18836), (0.4584, 0.3274, 0.5222, 0.17072), 0.18836),
    (0.5, 0.1): ((0.9975, 0.9969, 3.6548, 0.63144), (0.3775, 0.4395, 1.1577, 0.32369), 0.63144),
    (0.5, 0.02): ((1.0, 1.0, 3.6889, 0.92622), (0.0759, 0.1683, 0.6519, 0.15524), 0.92622),
    (0.1, 0.1): ((0.9997, 0.9989, 3.0889, 0.69000), (0.8452, 0.8599, 2.5385, 0.60608), 0.69000),
}
"""(p_left, beta): Q#'s and CD's P(right), E r, KL over the trajectory, J; and V* (star-graph spec, §2)."""


def tree_law(reference: TableLM, atoms: tuple[float, ...], solution: Solution) -> TableValues:
    """The exact law of the reward in the tree, from the enumeration's own rows."""
    p, reward, tokens = solution.log_ref[0].exp(), solution.reward[0], solution.samples.tokens
    values = TableValues(1, 2, 2, len(atoms))
    for a, atom in enumerate(atoms):
        hit = (reward - atom).abs() < 1e-12
        for first in range(2):
            at = tokens[:, 0] == first
            values.tables[0].data[0, first, a] = p[at & hit].sum().log()
            for second in range(2):
                both = at & (tokens[:, 1] == second)
                values.tables[1].data[0, 2 * first + second, a] = p[both & hit].sum().log()
    return values


@pytest.mark.parametrize(("p_left", "beta"), TREE)
def test_the_tree_s_table_to_four_digits(p_left, beta):
    *rows, v_star = TREE[p_left, beta]
    reference, reward = tree(p_left)
    solution = solve(Target(reference, reward, beta), Tokens.of([[0]]), 2)
    atoms = (0.0, 0.1, 1.0)
    values = tree_law(reference, atoms, solution)
    right = solution.samples.tokens[:, 0] == solution.samples.tokens[solution.reward[0].argmax(), 0]
    assert solution.v_star().item() == pytest.approx(v_star, abs=6e-6)
    for rule, (q_right, mean, kl, j) in zip((QSharp(beta), CD(beta)), rows, strict=True):
        log_q = solution.density(Guided(reference, ValueTwist(values, rule, atoms)))
        q = log_q[0].exp()
        got = q[right].sum(), (q * solution.reward[0]).sum(), (q * (log_q[0] - solution.log_ref[0])).sum()
        assert [x.item() for x in got] == [pytest.approx(x, abs=6e-5) for x in (q_right, mean, kl)]
        assert solution.objective(log_q).item() == pytest.approx(j, abs=6e-6)


def test_on_the_tree_q_sharp_reaches_v_star_and_cd_does_not():
    for p_left, beta in TREE:
        reference, reward = tree(p_left)
        solution = solve(Target(reference, reward, beta), Tokens.of([[0]]), 2)
        values = tree_law(reference, (0.0, 0.1, 1.0), solution)
        j = {}
        for rule in (QSharp(beta), CD(beta)):
            model = Guided(reference, ValueTwist(values, rule, (0.0, 0.1, 1.0)))
            j[type(rule)] = solution.objective(solution.density(model)).item()
        assert abs(j[QSharp] - solution.v_star().item()) < EXACT
        assert j[CD] < solution.v_star().item() - 1e-4


def test_as_beta_falls_cd_s_tree_goes_left_and_q_sharp_s_goes_right():
    """The root alone, p_left 1/2: KL(CD) → ln 2 going left, KL(Q#) → ln 2 going right."""
    q_right = [{row: TREE[0.5, beta][row][0] for row in (0, 1)} for beta in (0.3, 0.1, 0.02)]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(q_right))
    reference, reward = tree(0.5)
    solution = solve(Target(reference, reward, 0.002), Tokens.of([[0]]), 2)
    values = tree_law(reference, (0.0, 0.1, 1.0), solution)
    for rule, goes_right in ((QSharp(0.002), 1.0), (CD(0.002), 0.0)):
        q = solution.density(Guided(reference, ValueTwist(values, rule, (0.0, 0.1, 1.0))))[0].exp()
        assert q[2:].sum().item() == pytest.approx(goes_right, abs=1e-6)
