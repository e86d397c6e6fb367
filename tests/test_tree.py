"""The two-branch tree against the published figure's numbers: pi*, and the guide by expected reward."""

from __future__ import annotations

import pytest
import torch

from tiltlm.data.tree import tree
from tiltlm.samples import Samples, Tokens

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
