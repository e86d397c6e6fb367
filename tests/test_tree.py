"""The two-branch tree against the published figure's numbers: pi*, and the guide by expected reward."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from tiltlm.data.tree import tree
from tiltlm.recipes import recipe
from tiltlm.run import ensure
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.tasks.tree import Tree

EVERYTHING = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
TABLE = [  # p_left, beta; for Q# and CD: P(right), E r, KL, J; V*
    (0.5, 1.0, (0.4956, 0.1125, 0.0212, 0.09125), (0.4875, 0.1123, 0.0211, 0.09112), 0.09125),
    (0.5, 0.3, (0.6276, 0.4113, 0.7431, 0.18836), (0.4584, 0.3274, 0.5222, 0.17072), 0.18836),
    (0.5, 0.1, (0.9975, 0.9969, 3.6548, 0.63144), (0.3775, 0.4395, 1.1577, 0.32369), 0.63144),
    (0.5, 0.02, (1.0, 1.0, 3.6889, 0.92622), (0.0759, 0.1683, 0.6519, 0.15524), 0.92622),
    (0.1, 0.1, (0.9997, 0.9989, 3.0889, 0.69000), (0.8452, 0.8599, 2.5385, 0.60608), 0.69000),
]


def all_completions() -> Samples:
    return Samples(
        Tokens.of([[0]]), torch.zeros(4, dtype=torch.int64), EVERYTHING, torch.ones(4, 2, dtype=torch.bool)
    )


def described(log_q: torch.Tensor, log_ref: torch.Tensor, reward: torch.Tensor, beta: float) -> list[float]:
    """P(right), E r, KL to the reference, J of a distribution over the four completions."""
    q = log_q.exp()
    mean, kl = (q * reward).sum(), (q * (log_q - log_ref)).sum()
    return [q[2:].sum().item(), mean.item(), kl.item(), (mean - beta * kl).item()]


@torch.no_grad()
@pytest.mark.parametrize("p_left, beta, q_sharp, cd, value", TABLE)
def test_the_published_table(p_left, beta, q_sharp, cd, value):
    reference, reward_of = tree(p_left)
    samples = all_completions()
    log_ref, reward = reference.log_prob(samples).sum(1), reward_of(samples)
    tilted = log_ref + reward / beta
    log_z = tilted.logsumexp(0)
    assert described(tilted - log_z, log_ref, reward, beta) == pytest.approx(q_sharp, abs=6e-5)
    assert (beta * log_z).item() == pytest.approx(value, abs=6e-6)
    branch = log_ref.reshape(2, 2).logsumexp(1)
    inside = (tilted.reshape(2, 2) - branch[:, None]).log_softmax(1)
    expected = ((log_ref.exp() * reward).reshape(2, 2).sum(1)) / branch.exp()
    root = (branch + expected / beta).log_softmax(0)
    got = described((root[:, None] + inside).flatten(), log_ref, reward, beta)
    assert got == pytest.approx(cd, abs=6e-5)
    assert got[3] < (beta * log_z).item()


@torch.no_grad()
def test_reference_and_reward_by_hand():
    reference, reward_of = tree(0.2)
    p = reference.log_prob(all_completions()).sum(1).exp()
    expected = torch.tensor([0.1, 0.1, 0.76, 0.04], dtype=torch.float64)
    torch.testing.assert_close(p, expected, atol=1e-12, rtol=0)
    reward = reward_of(all_completions())
    torch.testing.assert_close(reward, torch.tensor([0.1, 0.1, 0, 1], dtype=torch.float64), atol=0, rtol=0)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="p_left"):
        tree(1.0)
    unfinished = Tokens.of([[0, 1], [1]])
    with pytest.raises(ValueError, match="two tokens each"):
        tree()[1](Samples(Tokens.of([[0]]), torch.zeros(2, dtype=torch.int64), unfinished.ids, unfinished.mask))


# ---- the figure and the task ---------------------------------------------------------------------------------------------


def test_the_figure_is_the_published_table(tmp_path, capsys):
    run = ensure(recipe("tree/solve"), tmp_path)
    rows = json.loads((run.folder / "report.json").read_text())
    found = {(row["method"], row["metric"]): row["value"] for row in rows}
    metrics = ("p_right", "reward", "kl_to_reference", "objective")
    for p_left, beta, q_sharp, cd, value in TABLE:
        for name, numbers in (("q-sharp", q_sharp), ("cd", cd)):
            method = f"{name} (p_left {p_left:g}, beta {beta:g})"
            assert [found[method, metric] for metric in metrics] == pytest.approx(numbers, abs=6e-5)
            assert found[method, "v_star"] == pytest.approx(value, abs=6e-6)
    run.recipe.show(run)
    assert "KL(q‖ref)" in capsys.readouterr().out


@pytest.mark.parametrize("p_left, beta, q_sharp, cd, value", TABLE)
def test_the_problem_knows_its_answer(p_left, beta, q_sharp, cd, value):
    """log Z by its closed form; pi* as the table has it."""
    problem, prompt = Tree(p_left, beta).problem({}, 0), Tokens.of([[0]])
    closed = math.log(p_left * math.exp(0.1 / beta) + (1 - p_left) * (0.95 + 0.05 * math.exp(1 / beta)))
    assert problem.log_z(prompt, beta).item() == pytest.approx(closed, abs=1e-10)
    assert problem.at(0.7).log_z(prompt, 0.7).item() != pytest.approx(closed, abs=1e-3)
    solved = problem.solve(prompt)
    log_q = solved.log_pi_star[0]
    assert described(log_q, solved.log_ref[0], solved.reward[0], beta) == pytest.approx(q_sharp, abs=6e-5)
    assert solved.v_star().item() == pytest.approx(value, abs=6e-6)


def test_exact_draws_are_of_pi_star():
    problem = Tree(0.5, 0.3).problem({}, 0)
    drawn = problem.exact_draws(problem.prompts["test"], 4000, stream(1, "draws"))
    right = problem.checks["p_right"](drawn).double()
    assert abs(right.mean().item() - 0.6276) < 4 * math.sqrt(0.6276 * 0.3724 / 4000)


def test_the_laws_of_the_ruler_hold_on_a_learnt_table(tmp_path):
    """REINFORCE with the pull of beta, a few steps: what is reported is what sums over the four completions say, and the
    table is found again by a problem that did not train it."""
    made = recipe("tree/rloo")
    made = replace(made, fit=replace(made.fit, steps=60), ruler=replace(made.ruler, n=500), task=Tree(0.5, 0.3))
    run = ensure(made, tmp_path)
    found = {row["metric"]: row for row in json.loads((run.folder / "report.json").read_text())}
    problem = Tree(0.5, 0.3).problem({}, 0)
    (folder,) = (run.inputs["learnt"].folder).glob("checkpoint-*")
    policy = problem.loaded(folder)
    assert not any(p.requires_grad for p in policy.parameters())
    assert not torch.equal(policy.tables[0], problem.reference.tables[0])
    solved = problem.solve(problem.prompts["test"])
    log_q = solved.density(policy)
    assert found["reward"]["value"] == pytest.approx((log_q.exp() * solved.reward).sum().item(), abs=1e-10)
    assert found["kl_from_target"]["value"] == pytest.approx(solved.kl_from_target(log_q).item(), abs=1e-10)
    distance = found["kl_to_target"]
    assert abs(distance["value"] - solved.kl_to_target(log_q).item()) < 4 * distance["stderr"] + 1e-9
    drawn = draw(policy, problem.prompts["test"], n=5, max_new_tokens=2, stream=stream(0))
    assert drawn.tokens.shape == (5, 2)


def test_impossible_trees_are_refused_before_any_work():
    for wrong, said in (({"p_left": 1.0}, "p_left"), ({"beta": 0.0}, "beta")):
        with pytest.raises(ValueError, match=said):
            Tree(**wrong)
