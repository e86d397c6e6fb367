"""`modes/clipped`: every line of the table is where the library's own losses stop, by all pairs of draws or many groups."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltlm.models.table import TableLM
from tiltlm.policies.dr_grpo import DrGRPO
from tiltlm.policies.grpo import GRPO
from tiltlm.policies.reinforce import Reinforce
from tiltlm.recipes import recipe
from tiltlm.run import ensure
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages.modes_clipped import Clipped, End, forward_pulled
from tiltlm.tasks.modes import Modes

POINTS = 121
Y = np.linspace(-6, 6, POINTS)
REWARD = np.exp(-((Y + 2) ** 2) / 2) + 0.9 * np.exp(-((Y - 2) ** 2) / 2)
BETAS = (1.0, 0.3, 0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return ensure(recipe("modes/clipped"), tmp_path_factory.mktemp("clipped"))


@pytest.fixture(scope="module")
def found(run) -> dict[str, dict[str, float]]:
    rows = json.loads((run.folder / "report.json").read_text())
    return {m: {r["metric"]: r["value"] for r in rows if r["method"] == m} for m in {r["method"] for r in rows}}


@pytest.fixture(scope="module")
def ends() -> dict[float, dict[str, Tensor]]:
    stage = Clipped(Modes())
    return {beta: {end.method: end.p for end in stage.ends(stage.world(beta))} for beta in BETAS}


def policy_of(p: Tensor) -> TableLM:
    table = TableLM(1, POINTS, 1)
    table.tables[0].data[0, 0] = p.log()
    return table


def groups_of(rows: Tensor, policy: TableLM) -> Samples:
    """Outcomes [B, G] as live draws, each group with a prompt of its own."""
    ids = rows.reshape(-1, 1)
    index = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    done = Samples(Tokens.of([[0]] * len(rows)), index, ids, torch.ones_like(ids).bool())
    log_ref = torch.full(ids.shape, -math.log(POINTS), dtype=torch.float64)
    reward = torch.from_numpy(REWARD)[ids[:, 0]]
    return done.with_(log_q=policy.log_prob(done).detach(), log_ref=log_ref, reward=reward)


def pairs_gradient(method: Any, p: Tensor) -> Tensor:
    """Exact expected gradient in the logits, over all 14,641 pairs of draws."""
    policy = policy_of(p)
    pairs = torch.cartesian_prod(torch.arange(POINTS), torch.arange(POINTS))
    loss = method.loss(policy, method.prepare(groups_of(pairs, policy))).loss.reshape(-1, 2)
    total = (p[pairs].prod(1) * loss.mean(1)).sum()
    return torch.autograd.grad(total, policy.tables[0])[0].flatten()


def of_pairs(beta: float) -> dict[str, Any]:
    return {
        "rloo": Reinforce("leave_one_out", beta),
        "dr-grpo-kl": DrGRPO(beta, kl="reward"),
        "grpo, std off, G 2": GRPO(beta, std=False),
        "grpo, G 2": GRPO(beta),
    }


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", of_pairs(1.0))
def test_the_library_s_own_losses_stop_where_the_table_says(ends, beta, name):
    """Groups of two, all of them: the gradient vanishes at the method's own end and at no other's."""
    method = of_pairs(beta)[name]
    assert pairs_gradient(method, ends[beta][name]).abs().max() < 1e-10
    for other in ("grpo, std off, G 2", "grpo, G 2", "grpo, std off, G ∞", "pi*"):
        same = other == name or (other == "pi*" and name in ("rloo", "dr-grpo-kl"))
        assert (pairs_gradient(method, ends[beta][other]).norm() > 1e-4) != same


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("std", [True, False])
def test_groups_of_eight_stop_there_up_to_their_noise(ends, beta, std):
    """20,000 groups drawn from the end itself, advantages by the method: the mean gradient within 4 standard errors (of 121
    numbers: 5), and far from it at the end of groups of two."""
    method, name = GRPO(beta, std=std), "grpo" if std else "grpo, std off"
    for at, stops in ((f"{name}, G 8", True), (f"{name}, G 2", False)):
        p = ends[beta][at]
        own = stream(3, "test-modes-clipped", beta).generator()
        rows = torch.multinomial(p, 160_000, replacement=True, generator=own).reshape(-1, 8)
        advantage = method.prepare(groups_of(rows, policy_of(p))).advantage.reshape(-1, 8)
        pushed = torch.zeros(len(rows), POINTS, dtype=torch.float64).scatter_add(1, rows, advantage / 8)
        gradient = pushed.mean(0) - beta * (p - 1 / POINTS)
        off = (gradient / (pushed.std(0) / len(rows) ** 0.5 + 1e-12)).abs().max()
        assert (off < 5) if stops else (off > 8)


@pytest.mark.parametrize("beta", BETAS)
def test_groups_without_end_stop_at_beta_times_their_own_std(ends, beta):
    """p = b/(121·(λ − r)): b = beta without std, beta·std_p(r) with it. λ − r and b from p itself, by plain sums."""
    for name in ("grpo, std off, G ∞", "grpo, G ∞"):
        p = ends[beta][name].numpy()
        mean = (p * REWARD).sum()
        b = beta * (math.sqrt((p * (REWARD - mean) ** 2).sum()) if name == "grpo, G ∞" else 1.0)
        np.testing.assert_allclose(p * (b + mean - REWARD), b / POINTS, atol=1e-10)


def test_no_policy_beats_what_the_bisection_finds():
    """E_p[r] − b·KL(ref‖p) by plain sums: 200 policies around it, near and far, are all worse."""
    ref, reward = torch.full((POINTS,), 1 / POINTS).double(), torch.from_numpy(REWARD)
    best, own = forward_pulled(ref, reward, 0.3), torch.Generator().manual_seed(0)

    def value(p: Tensor) -> float:
        return float((p * reward).sum() - 0.3 * (ref * (ref / p).log()).sum())

    for k in range(200):
        noise = torch.randn(POINTS, generator=own, dtype=torch.float64) * 2.0 ** -(k % 12)
        assert value((best.log() + noise).softmax(0)) < value(best)


@pytest.mark.parametrize("beta", BETAS)
def test_reported_numbers_are_plain_sums(found, ends, beta):
    weight = np.exp(REWARD / beta)
    star = weight / weight.sum()
    assert found[f"beta {beta:g}: pi*"]["objective"] == pytest.approx(beta * math.log(weight.mean()), abs=1e-10)
    for name in ("rloo", "grpo, std off, G 8", "grpo, G 2", "grpo, G ∞"):
        numbers, p = found[f"beta {beta:g}: {name}"], ends[beta][name].numpy()
        to, back = (p * np.log(p / star)).sum(), (star * np.log(star / p)).sum()
        assert numbers["kl_to_target"] == pytest.approx(to, abs=1e-10)
        assert numbers["kl_from_target"] == pytest.approx(back, abs=1e-10)
        assert numbers["reward"] == pytest.approx((p * REWARD).sum(), abs=1e-10)
        assert numbers["objective_gap"] == pytest.approx(beta * to, abs=1e-10)
    dapo = found[f"beta {beta:g}: dapo"]
    assert dapo["kl_to_target"] == pytest.approx(-math.log(star.max()), abs=1e-10)
    assert "kl_from_target" not in dapo and dapo["reward"] == pytest.approx(REWARD.max(), abs=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_what_the_page_says_of_the_table(found, beta):
    """rloo and dr-grpo-kl lose nothing; every GRPO does, with std more than without; none as much as DAPO's."""
    lost = {name: found[f"beta {beta:g}: {name}"]["objective_gap"] for name in names_of(found)}
    assert abs(lost["rloo"]) < 1e-10 and abs(lost["dr-grpo-kl"]) < 1e-10
    for size in ("2", "8", "∞"):
        assert 0 < lost[f"grpo, std off, G {size}"] < lost[f"grpo, G {size}"] < lost["dapo"]
    if beta == 0.1:
        assert lost["grpo, G 8"] > 0.9 * lost["dapo"]


def names_of(found: dict[str, Any]) -> list[str]:
    return [name.removeprefix("beta 1: ") for name in found if name.startswith("beta 1: ")]


def test_other_draws_end_at_the_same_place():
    """G 8 with two seeds: KL(pi*‖p) within a thousandth, which rounds that are not averaged would miss."""
    ends = [Clipped(Modes(), also=(), rounds=120, seed=seed) for seed in (0, 1)]
    far = [stage.world(0.1).measure(eight(stage.ends(stage.world(0.1))).log())["kl_from_target"] for stage in ends]
    assert far[0] == pytest.approx(far[1], rel=1e-3) and far[0] != far[1]


def eight(ends: list[End]) -> Tensor:
    return next(end.p for end in ends if end.method == "grpo, G 8")


def test_a_picture_and_a_table(run, capsys):
    assert (run.folder / "clipped.png").read_bytes().startswith(b"\x89PNG")
    run.recipe.show(run)
    said = capsys.readouterr().out
    assert "KL(pi*‖p)" in said and "beta 0.1: grpo, std off, G ∞" in said and "clipped.png" in said


def test_impossible_settings_are_refused():
    for wrong, said in (({"size": 2}, "3 rows or more"), ({"also": (-1.0,)}, "also"), ({"groups": 0}, "groups")):
        with pytest.raises(ValueError, match=said):
            replace(recipe("modes/clipped"), **wrong)
