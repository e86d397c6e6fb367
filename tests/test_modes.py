"""`modes/solve` at its own settings: where forward and reverse KL end, by plain sums and by brute force."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiltlm.models.table import TableLM
from tiltlm.recipes import recipe
from tiltlm.run import ensure
from tiltlm.samples import Tokens
from tiltlm.stages.measure import RulerSettings, ruler_of
from tiltlm.stages.modes_solve import Case, Solve, World, minima, policy_classes
from tiltlm.tasks.modes import Modes

Y = np.linspace(-6, 6, 121)
REWARD = np.exp(-((Y + 2) ** 2) / 2) + 0.9 * np.exp(-((Y - 2) ** 2) / 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return ensure(recipe("modes/solve"), tmp_path_factory.mktemp("modes"))


@pytest.fixture(scope="module")
def found(run) -> dict[str, dict[str, float]]:
    rows = json.loads((run.folder / "report.json").read_text())
    return {m: {r["metric"]: r["value"] for r in rows if r["method"] == m} for m in {r["method"] for r in rows}}


def pi_star(beta: float = 0.1) -> np.ndarray:
    weight = np.exp(REWARD / beta)
    return weight / weight.sum()


def normals(power: float = 1.0) -> np.ndarray:
    """A grid of the small class, [normals, 121], each to this power: means a twentieth apart, 60 widths."""
    mean, width = np.meshgrid(np.arange(-4, 4.001, 0.05), np.geomspace(0.2, 4, 60))
    density = np.exp(-(((Y - mean.reshape(-1, 1)) / width.reshape(-1, 1)) ** 2) / 2 * power)
    return density / density.sum(1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p‖q) by its definition; the floor stands for densities too small for a float64."""
    return (p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300)))).sum(-1)


@pytest.mark.parametrize("loss", ["exo-rw", "dpo-rw"])
@pytest.mark.parametrize("beta_pi", ["1", "0.5"])
def test_the_full_class_ends_at_pi_star_whatever_the_loss(found, loss, beta_pi):
    numbers = found[f"full: {loss}, beta_pi {beta_pi}"]
    assert 0 <= numbers["kl_to_target"] < 1e-8 and 0 <= numbers["kl_from_target"] < 1e-8
    assert abs(numbers["objective_gap"]) < 1e-9


@pytest.mark.parametrize("beta_pi", ["1", "0.5"])
def test_the_small_class_tells_the_losses_apart(found, beta_pi):
    """exo-rw: on the higher hill, narrow, nearer in KL(pi‖pi*), better in J; dpo-rw: over both, nearer in KL(pi*‖pi)."""
    exo, dpo = (found[f"small: {loss}, beta_pi {beta_pi}"] for loss in ("exo-rw", "dpo-rw"))
    assert abs(exo["mean"] + 2) < 0.05 and exo["width"] < 0.4
    assert -1 < dpo["mean"] < 0 and dpo["width"] > 1.5
    assert exo["kl_to_target"] < 0.2 * dpo["kl_to_target"]
    assert dpo["kl_from_target"] < 0.1 * exo["kl_from_target"]
    assert exo["objective"] > dpo["objective"] + 0.1
    assert exo["minima"] == 3 and dpo["minima"] == 1


def test_no_normal_on_a_grid_beats_what_was_found(found):
    """Brute force by plain sums: each loss's own KL is least where the recipe ended, up to the grid's step; the other
    KL is not (so a loss of the wrong direction would fail)."""
    reverse, forward = divergence(normals(), pi_star()), divergence(pi_star(), normals())
    exo, dpo = found["small: exo-rw, beta_pi 1"], found["small: dpo-rw, beta_pi 1"]
    assert reverse.min() - 0.01 < exo["kl_to_target"] <= reverse.min() + 1e-9
    assert forward.min() - 0.01 < dpo["kl_from_target"] <= forward.min() + 1e-9
    assert dpo["kl_to_target"] > reverse.min() + 1 and exo["kl_from_target"] > forward.min() + 1


def test_with_beta_pi_one_half_it_is_the_tempered_distributions_that_are_compared(found):
    """The grid again, with both sides to the power 1/2: the grid's best has the mean that the recipe reports."""
    target = pi_star() ** 0.5 / (pi_star() ** 0.5).sum()
    tempered, plain = normals(0.5), normals()
    for loss, distance in (("exo-rw", divergence(tempered, target)), ("dpo-rw", divergence(target, tempered))):
        best = plain[distance.argmin()]
        assert (best * Y).sum() == pytest.approx(found[f"small: {loss}, beta_pi 0.5"]["mean"], abs=0.03)


def test_reported_numbers_are_plain_sums(found):
    """The normal that dpo-rw ended at, made again from its report: forward KL matches moments, so mean and width are
    pi*'s own; every other number by its definition."""
    p, q = found["pi*"], found["small: dpo-rw, beta_pi 1"]
    mean = (pi_star() * Y).sum()
    assert q["mean"] == pytest.approx(mean, abs=1e-7) and p["mean"] == pytest.approx(mean, abs=1e-10)
    assert q["width"] == pytest.approx(math.sqrt((pi_star() * (Y - mean) ** 2).sum()), abs=1e-7)
    policy = Solve(Modes()).fit(World(121, 0.1, 0.9), Case("small", "dpo-rw", 1.0))[0][1].numpy()
    density = np.exp(-(((Y - policy[0]) / math.exp(policy[1])) ** 2) / 2)
    density /= density.sum()
    assert q["kl_to_target"] == pytest.approx(divergence(density, pi_star()), abs=1e-10)
    assert q["kl_from_target"] == pytest.approx(divergence(pi_star(), density), abs=1e-10)
    assert q["kl_from_target"] != pytest.approx(q["kl_to_target"], abs=1)
    assert q["reward"] == pytest.approx((density * REWARD).sum(), abs=1e-10)
    assert q["objective"] == pytest.approx(
        q["reward"] - 0.1 * divergence(density, np.full(121, 1 / 121)), abs=1e-10
    )
    assert p["objective"] == pytest.approx(0.1 * math.log(np.exp(REWARD / 0.1).mean()), abs=1e-10)
    for numbers in found.values():  # J(pi*) − J = beta·KL(pi‖pi*)
        assert numbers["objective_gap"] == pytest.approx(0.1 * numbers["kl_to_target"], abs=1e-10)


def test_small_groups_from_the_reference_make_exo_rw_cover(found):
    """K 2 and 4: both losses spread over both hills; K 16: exo-rw stands on one."""
    for size in (2, 4):
        assert all(found[f"small: {loss}, beta_pi 1, K {size}"]["width"] > 1.4 for loss in ("exo-rw", "dpo-rw"))
    exo, dpo = (found[f"small: {loss}, beta_pi 1, K 16"] for loss in ("exo-rw", "dpo-rw"))
    assert exo["width"] < 0.4 and dpo["width"] > 1.8


def test_tempering_moves_where_exo_rw_lets_go_of_its_hill():
    """beta 0.15: beta_pi 1 still stands on a hill; beta_pi 0.5, with its flatter target, covers both."""
    value = Solve(Modes(beta=0.15))
    world = value.world
    widths = [value.fit(world, Case("small", "exo-rw", beta_pi))[0][1][1].exp().item() for beta_pi in (1.0, 0.5)]
    assert widths[0] < 0.5 and widths[1] > 1.5


def test_every_minimum_is_one():
    """Slope zero, curvature positive both ways, at all three of exo-rw."""
    world = World(121, 0.1, 0.9)

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return world.solution.kl_to_target(world.normal(theta)).sum()

    places = minima(loss, policy_classes(world)["small"].starts)
    assert len(places) == 3
    for value, theta in places:
        assert torch.func.grad(loss)(theta).abs().max() < 1e-8 and loss(theta).item() == pytest.approx(value)
        assert torch.linalg.eigvalsh(torch.func.jacrev(torch.func.grad(loss))(theta)).min() > 1e-3


@pytest.mark.parametrize(("start", "width"), [((0.0, 1.5), 1.9), ((-2.0, 0.7), 0.35)])
def test_where_gradient_descent_ends_depends_on_its_start(start, width):
    """From a wide normal in the middle exo-rw's descent ends over both hills, from one over the higher hill on it."""
    world = World(121, 0.1, 0.9)
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    for _ in range(1500):
        (slope,) = torch.autograd.grad(world.solution.kl_to_target(world.normal(theta)).sum(), theta)
        theta.data -= 0.02 * slope
    assert theta[1].exp().item() == pytest.approx(width, abs=0.05)


def test_the_same_rows_twice_a_picture_and_a_table(run, tmp_path, capsys):
    again = ensure(recipe("modes/solve"), tmp_path)
    assert (again.folder / "report.json").read_bytes() == (run.folder / "report.json").read_bytes()
    assert (run.folder / "modes.png").read_bytes().startswith(b"\x89PNG")
    run.recipe.show(run)
    said = capsys.readouterr().out
    assert "KL(pi*‖pi)" in said and "small: exo-rw, beta_pi 1 (3)" in said and "modes.png" in said


def test_impossible_settings_are_refused():
    for wrong, said in (
        ({"beta_pi": 0.0}, "beta_pi"),
        ({"also": (-1.0,)}, "also"),
        ({"sizes": (1,)}, "two draws"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(recipe("modes/solve"), **wrong)
    for wrong, said in (({"beta": 0.0}, "beta"), ({"second": -1.0}, "second"), ({"points": 2}, "three points")):
        with pytest.raises(ValueError, match=said):
            Modes(**wrong)


# ---- the task ----------------------------------------------------------------------------------------------------------


def test_the_task_is_the_same_line():
    """Reward, bound, log Z, E[r] and KL(pi*‖q) of the problem by plain sums, at two temperatures."""
    for beta in (0.1, 0.3):
        task = Modes(beta=beta)
        problem, prompt = task.problem({}, 0), Tokens.of([[0]])
        assert task.facts().r_max == pytest.approx(REWARD.max(), abs=1e-12)
        log_z = math.log(np.exp(REWARD / beta).mean())
        assert problem.log_z(prompt, beta).item() == pytest.approx(log_z, abs=1e-10)
        q = TableLM(1, 121, 1)
        q.tables[0].data[0, 0] = torch.from_numpy(-((Y - 1) ** 2))
        density = np.exp(-((Y - 1) ** 2)) / np.exp(-((Y - 1) ** 2)).sum()
        assert problem.expected_reward(q, prompt).item() == pytest.approx((density * REWARD).sum(), abs=1e-10)
        far = divergence(pi_star(beta), density)
        assert problem.further(q, prompt)["kl_from_target"].item() == pytest.approx(far, abs=1e-9)


def test_the_figure_and_the_task_tell_the_same_pi_star(found):
    problem = Modes().problem({}, 0)
    rows = problem.optimum(ruler_of(problem, RulerSettings(n=4))).rows("modes", "optimum (exact)", 0)
    numbers = {row["metric"]: row["value"] for row in rows}
    for metric in ("reward", "objective", "kl_to_target", "kl_from_target"):
        assert numbers[metric] == pytest.approx(found["pi*"][metric], abs=1e-10)
