"""The answer sheet against sums written out another way."""

from __future__ import annotations

import math

import pytest
import torch

from close import EXACT, NETWORK
from families import VOCAB, build
from laws.world import HORIZON, PROMPTS, WORLDS, World, completions, perturbed, world
from tiltlm import exact
from tiltlm.exact import Solution, all_completions, every_pair, kl, log_density, solve
from tiltlm.models.table import TableLM
from tiltlm.samples import Samples, Tokens
from tiltlm.target import Target


@pytest.fixture(params=WORLDS)
def w(request) -> World:
    return WORLDS[request.param]()


def solved(w: World) -> Solution:
    return solve(w.target(), PROMPTS, HORIZON)


def by_name(solution: Solution) -> dict[tuple[int, ...], int]:
    """(prompt, tokens …) -> its row in the solution."""
    samples = solution.samples
    names = zip(samples.row_prompts.lists(), samples.completions.lists(), strict=True)
    return {(*x, *y): n for n, (x, y) in enumerate(names)}


# ---- the list of completions --------------------------------------------------------------------------------


def test_completions_of_a_fixed_length_are_all_of_them():
    """3 tokens, 3 steps: 27 rows, all different, none padded."""
    done = all_completions(3, 3)
    assert done.mask.all() and len(done) == 27
    assert len({tuple(row) for row in done.lists()}) == 27


@pytest.mark.parametrize(("vocab", "horizon", "count"), [(3, 3, 15), (2, 4, 5), (4, 2, 13), (5, 1, 5)])
@pytest.mark.parametrize("eos_ids", [(0,), (1,)])
def test_completions_that_may_end_early_are_counted_by_hand(vocab, horizon, count, eos_ids):
    """V = 3, T = 3: 1 of one token + 2 of two + 4·3 of three = 15 (eos; ?eos; ?? and any)."""
    rows = all_completions(vocab, horizon, eos_ids).lists()
    assert len(rows) == count and len({tuple(row) for row in rows}) == count
    assert {tuple(row) for row in rows} == set(completions(vocab, horizon, eos_ids))


def test_completions_with_two_ends_are_counted_by_hand():
    """V = 4, ends 0 and 3, T = 3: 2 of one token + 2·2 of two + 2·2·4 of three = 22, each ending in its own end."""
    rows = all_completions(4, 3, (3, 0)).lists()
    assert {tuple(row) for row in rows} == set(completions(4, 3, (0, 3))) and len(rows) == 22


def test_every_pair_goes_prompt_by_prompt():
    samples = every_pair(Tokens.of([[4, 5], [6]]), all_completions(2, 1))
    assert samples.prompt_index.tolist() == [0, 0, 1, 1] and samples.tokens.tolist() == [[0], [1], [0], [1]]
    assert samples.prompts.lists() == [[4, 5], [6]]


# ---- the solution -------------------------------------------------------------------------------------------


def test_log_z_is_the_log_of_the_plain_sum(w):
    direct = (w.p_ref() * (w.reward / w.beta).exp()).sum(1).log()
    torch.testing.assert_close(solved(w).log_z, direct, atol=EXACT, rtol=0)


def test_pi_star_and_the_reference_are_those_of_plain_multiplication(w):
    solution, star, ref = solved(w), w.p_star().flatten(), w.p_ref().flatten()
    rows = by_name(solution)
    assert set(rows) == set(w.rows)
    order = torch.tensor([rows[name] for name in w.rows])
    torch.testing.assert_close(solution.log_pi_star.flatten()[order], star.log(), atol=EXACT, rtol=0)
    torch.testing.assert_close(solution.log_ref.flatten()[order], ref.log(), atol=EXACT, rtol=0)
    assert torch.equal(solution.reward.flatten()[order], w.reward.flatten())


def test_pi_star_sums_to_one_for_every_prompt(w):
    total = solved(w).log_pi_star.logsumexp(1)
    torch.testing.assert_close(total, torch.zeros(2, dtype=torch.float64), atol=EXACT, rtol=0)


def test_j_of_pi_star_is_beta_log_z_and_the_most_there_is(w):
    """J(pi*) = beta·log Z = V*; any other falls short by beta·KL(q‖pi*)."""
    solution = solved(w)
    torch.testing.assert_close(solution.v_star(), w.beta * solution.log_z, atol=EXACT, rtol=0)
    torch.testing.assert_close(solution.objective(solution.log_pi_star), solution.v_star(), atol=EXACT, rtol=0)
    for model in (w.reference, perturbed(w.optimum())):
        log_q = solution.density(model)
        regret = solution.v_star() - solution.objective(log_q)
        torch.testing.assert_close(regret, w.beta * solution.kl_to_target(log_q), atol=EXACT, rtol=0)
        assert (regret > 1e-3).all()


def test_kl_by_hand():
    """KL((½, ½)‖(¼, ¾)) = ½ ln 2 + ½ ln 2/3 = ½ ln 4/3; the other way ¼ ln ½ + ¾ ln 3/2."""
    p, q = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64).log()
    assert kl(p, q).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-12)
    assert kl(q, p).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-12)


def test_kl_forgives_what_p_leaves_out_and_not_what_q_does():
    """0·log 0 = 0; a token of q's probability 0 that p uses costs infinity."""
    sure, even = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64).log()
    assert kl(sure, even).item() == pytest.approx(math.log(2))
    assert kl(even, sure).item() == math.inf


def test_a_nan_is_not_counted_as_zero():
    """A model whose log-probabilities are NaN is no distance away, not distance 0."""
    broken, even = torch.tensor([[math.nan, 0.0], [0.5, 0.5]], dtype=torch.float64)
    assert kl(broken, even.log()).isnan() and kl(even.log(), broken).isnan()


def test_both_divergences_have_the_direction_they_are_named_for():
    """pi_ref (½, ½), r/beta = (0, ln 3): pi* = (¼, ¾). KL(ref‖pi*) = ½ ln 4/3, KL(pi*‖ref) = ln 2 − H(¼)."""
    target = Target(TableLM(1, 2, 1), lambda s: s.tokens[:, 0].double() * math.log(3) * 0.5, beta=0.5)
    solution = solve(target, Tokens.of([[0]]), 1)
    torch.testing.assert_close(solution.log_pi_star.exp(), torch.tensor([[0.25, 0.75]], dtype=torch.float64))
    assert solution.log_z.item() == pytest.approx(math.log(2), abs=1e-12)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert solution.kl_to_target(solution.log_ref).item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-12)
    assert solution.kl_from_target(solution.log_ref).item() == pytest.approx(math.log(2) - entropy, abs=1e-12)


def test_divergences_are_zero_at_the_target_and_positive_elsewhere(w):
    solution = solved(w)
    for q, zero in ((w.reference, False), (perturbed(w.optimum()), False), (w.optimum(), True)):
        for divergence in (solution.kl_to_target, solution.kl_from_target):
            values = divergence(solution.density(q))
            assert values.abs().max() < EXACT if zero else values.min() > 1e-3


def test_log_psi_star_is_the_mean_potential_of_what_may_follow(w):
    """log Σ_{y ⊇ prefix} pi_ref·e^{r/beta} − log Σ_{y ⊇ prefix} pi_ref, prefix by prefix; 0 at padding."""
    solution = solved(w)
    psi, rows = solution.log_psi_star(), by_name(solution)
    tilted, mass = w.mass(w.p_ref() * (w.reward / w.beta).exp()), w.mass(w.p_ref())
    for name in w.rows:
        expected = [math.log(tilted[name[: t + 1]] / mass[name[: t + 1]]) for t in range(1, len(name))]
        expected += [0.0] * (HORIZON - len(expected))
        assert psi[rows[name]].tolist() == pytest.approx(expected, abs=EXACT)


def test_log_psi_star_ends_at_r_over_beta_and_starts_from_log_z(w):
    """At the last token psi* = e^{r/beta}; averaged over the first token under pi_ref it is Z."""
    solution = solved(w)
    samples, psi = solution.samples, solution.log_psi_star()
    last = psi.gather(1, samples.completions.lengths[:, None] - 1)[:, 0]
    torch.testing.assert_close(last, solution.reward.flatten() / w.beta, atol=EXACT, rtol=0)
    mean = (solution.log_ref.exp() * psi[:, 0].exp().reshape(solution.log_ref.shape)).sum(1)
    torch.testing.assert_close(mean.log(), solution.log_z, atol=EXACT, rtol=0)


def test_a_reference_that_forbids_a_completion_is_solved_too():
    """A −inf in the table: pi* leaves the completion out, log Z and J stay finite."""
    w = world()
    w.reference.tables[0].data[0, 0, 1] = -torch.inf
    solution = solved(w)
    forbidden = solution.samples.tokens[:27, 0] == 1
    assert (solution.log_pi_star[0, forbidden] == -torch.inf).all() and torch.isfinite(solution.log_z).all()
    torch.testing.assert_close(solution.objective(solution.log_pi_star), solution.v_star(), atol=EXACT, rtol=0)


def test_density_does_not_depend_on_the_batch_it_is_computed_in(w):
    samples = solved(w).samples
    whole = log_density(w.reference, samples)
    assert torch.equal(log_density(w.reference, samples, batch_size=4), whole)


# ---- refusals -----------------------------------------------------------------------------------------------


def test_enumeration_is_refused_beyond_the_limit(monkeypatch):
    w = world()
    monkeypatch.setattr(exact, "LIMIT", 53)
    with pytest.raises(ValueError, match="2 prompts × 27 completions = 54 rows; enumeration stops at 53: sample"):
        solved(w)
    monkeypatch.setattr(exact, "LIMIT", 54)
    assert len(solved(w).samples) == 54


@pytest.mark.parametrize("eos_ids", [(), (0,)])
def test_a_hopeless_enumeration_is_refused_before_it_is_tried(eos_ids):
    """1000^6 completions would take 10^18 rows of memory: say so instead of asking for it."""
    model = TableLM(1, 3, 1)
    model.vocab_size, model.eos_ids = 1000, eos_ids
    with pytest.raises(ValueError, match="sample instead"):
        solve(Target(model, lambda s: s.tokens[:, 0].double(), 1.0), Tokens.of([[0]]), 6)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_a_target_without_a_positive_beta_is_refused(beta):
    with pytest.raises(ValueError, match="beta must be positive: it divides the reward"):
        world().target(beta or 0.0) if beta else Target(TableLM(1, 2, 1), lambda s: s.tokens[:, 0], beta)


# ---- the target ---------------------------------------------------------------------------------------------


def test_the_target_s_unnormalised_density_is_pi_star_times_z(w):
    solution = solved(w)
    bare = Samples(PROMPTS, *[getattr(solution.samples, x) for x in ("prompt_index", "tokens", "mask")])
    got = w.target().log_unnormalised(bare).reshape(2, -1)
    torch.testing.assert_close(got, solution.log_pi_star + solution.log_z[:, None], atol=EXACT, rtol=0)
    torch.testing.assert_close(
        w.target().log_potential(bare).reshape(2, -1), solution.reward / w.beta, atol=EXACT, rtol=0
    )


def test_scoring_fills_in_what_is_missing_and_leaves_the_rest():
    w = world()
    samples = w.samples().with_(reward=None)
    scored = w.target().scored(samples)
    assert torch.equal(scored.reward, w.reward.flatten()) and scored.log_ref is samples.log_ref
    kept = w.target().scored(w.samples().with_(reward=torch.full((54,), 9.0), log_ref=None))
    assert (kept.reward == 9).all()
    torch.testing.assert_close(kept.log_ref, w.reference.log_prob(samples).detach())
    assert not kept.log_ref.requires_grad
    full = w.samples()
    assert w.target().scored(full) is full


# ---- a network ----------------------------------------------------------------------------------------------


@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("eos_ids", [(), (5, 9)])
def test_a_network_solved_by_enumeration_matches_brute_force(family, eos_ids):
    """23 tokens, two steps, ragged prompts: log Z and psi* from the network's own logits, one prefix a time."""
    model, beta = build(family, torch.float64, eos_ids=eos_ids), 0.4
    prompts = Tokens.of([[3, 5, 7], [2]])

    def reward_of(prompt: list[int], done: list[int]) -> float:
        return math.sin(3.0 * done[0] + 7.0 * done[-1] + len(prompt))

    def reward(samples: Samples) -> torch.Tensor:
        both = zip(samples.row_prompts.lists(), samples.completions.lists(), strict=True)
        return torch.tensor([reward_of(x, y) for x, y in both])

    solution = solve(Target(model, reward, beta), prompts, 2)
    assert len(solution.samples) == 2 * (len(eos_ids) + (VOCAB - len(eos_ids)) * VOCAB)
    psi, rows = solution.log_psi_star(), by_name_of(solution)
    for x, prompt in enumerate(prompts.lists()):
        tilted = dict.fromkeys(range(VOCAB), 0.0)
        first = next_probabilities(model, prompt)
        for a in range(VOCAB):
            if a in eos_ids:
                tilted[a] = first[a] * math.exp(reward_of(prompt, [a]) / beta)
                continue
            second = next_probabilities(model, [*prompt, a])
            for b in range(VOCAB):
                tilted[a] += first[a] * second[b] * math.exp(reward_of(prompt, [a, b]) / beta)
        assert solution.log_z[x].item() == pytest.approx(math.log(sum(tilted.values())), abs=NETWORK)
        for a in range(VOCAB):
            row = rows[x, a]
            assert psi[row, 0].item() == pytest.approx(math.log(tilted[a] / first[a]), abs=NETWORK)


def next_probabilities(model, prefix: list[int]) -> list[float]:
    return (
        model.model(input_ids=torch.tensor([prefix]), use_cache=False).logits[0, -1].double().softmax(0).tolist()
    )


def by_name_of(solution: Solution) -> dict[tuple[int, int], int]:
    """(prompt number, first token) -> one row that begins so."""
    samples = solution.samples
    names = zip(samples.prompt_index.tolist(), samples.tokens[:, 0].tolist(), strict=True)
    return {name: n for n, name in enumerate(names)}
