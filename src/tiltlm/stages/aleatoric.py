"""Rationales for an answer that is chance: what each objective makes of them, exactly (`data/letters.py`).

The reward is r(z, y) = log p(y|z), and y is not known when z is written. Which policy over rationales is the best?

    one matched sample     pi(z) = p(y|z) / Σ_z p(y|z), which is softmax over z of r(z, y)
    matched, every y       the mean of those over y; also one EM step of max E_y log Σ_z pi(z) p(y|z), from the reference
    the expected reward    J(pi) = E_pi E_y[r] − beta·KL(pi‖pi_ref):  pi* ∝ pi_ref·exp(E_y[r]/beta)
    the mean of the tilts  pi ∝ pi_ref·E_y[exp(r/beta)]: y would have to be known to the one who draws z
    the log of the mean    r(z) = log E_y p(y|z), the same for all: pi* = pi_ref

J(pi) = beta·(log Z − KL(pi‖pi*)) for every pi; the report has the largest deviation over random ones.

Bits: I(z;y) = H(y) − H(y|z) of the model's joint pi_ref(z) p(y|z), and of the true one, where y does not depend on z; and
what the code of the true answer gains by a rationale, E_y[2 − E_z log2 1/p(y|z)], which is no mutual information.

Preferences: an answer of each of two rationales is drawn from p(·|z); the one that is right is chosen, if the other is not.
P(z ≻ z') = E_y[p(y|z)(1 − p(y|z'))] is symmetric since every rationale is right as often as any other: DPO's expected
gradient is zero at pi_ref. With one label it orders the rationales by their luck; with a fresh label that order is worth
nothing, and *any* order ranks half of the pairs right. Data are finite where each question has a policy of its own and one
pair drawn: every question learns its pair by heart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tiltlm.data.letters import LETTERS, RATIONALES, paid
from tiltlm.exact import Solution, kl, solve
from tiltlm.policies.dpo import dpo_loss, preference_metrics
from tiltlm.samples import Tokens
from tiltlm.target import Target

UNIFORM = torch.full((RATIONALES,), -math.log(RATIONALES), dtype=torch.float64)
"""log pi_ref, [5]."""

# ---- policies --------------------------------------------------------------------------------------------------------


def matched(p: Tensor) -> Tensor:
    """What softmax over z of log p(y|z) asks for, one row for each y: [4, 5]."""
    return (p / p.sum(0)).T


def em_step(pi: Tensor, p: Tensor) -> Tensor:
    """The next pi [5] of EM for the marginal likelihood, which never falls: the mean over y of pi(z|y)."""
    joint = pi[:, None] * p
    return (joint / joint.sum(0)).mean(1)


def log_likelihood(pi: Tensor, p: Tensor) -> float:
    """E_y log Σ_z pi(z) p(y|z), nats."""
    return float((pi @ p).log().mean())


def log_odds(weight: Tensor, pi: Tensor) -> float:
    """Σ_z weight(z)·log[pi(z)/(1 − pi(z))] over rationales of positive weight: cross-entropy, but for the odds."""
    some = weight > 0
    return float((weight[some] * pi[some].logit()).sum())


def solved(reward: Tensor, beta: float) -> Solution:
    """The answer sheet of a reward [5]."""
    return solve(Target(*paid(reward), beta), Tokens.of([[0]]), horizon=1)


def mean_of_tilts(p: Tensor, beta: float) -> Tensor:
    """pi_ref·E_y[exp(log p(y|z)/beta)], normalised, [5]."""
    return (p.log() / beta).logsumexp(1).softmax(0)


def deviation(solution: Solution, generator: torch.Generator) -> float:
    """The largest |J(pi) − beta·(log Z − KL(pi‖pi*))| over 1000 random policies."""
    log_pi = torch.randn(1000, RATIONALES, dtype=torch.float64, generator=generator).mul(3).log_softmax(1)
    apart = solution.objective(log_pi) - solution.beta * (solution.log_z - solution.kl_to_target(log_pi))
    return float(apart.abs().max())


# ---- bits ------------------------------------------------------------------------------------------------------------


def information(pi: Tensor, p: Tensor) -> float:
    """I(z;y) of pi(z) p(y|z), bits."""
    joint = pi[:, None] * p
    apart = (pi[:, None] * joint.sum(0)).flatten()
    return float(kl(joint.flatten().log(), apart.log())) / math.log(2)


def code_change(pi: Tensor, p: Tensor) -> float:
    """E_y[2 − E_z log2 1/p(y|z)]: bits that a rationale saves in coding a uniform y; −inf where one rules y out."""
    return math.log2(LETTERS) + float(torch.xlogy(pi[:, None], p).sum()) / LETTERS / math.log(2)


# ---- preferences -----------------------------------------------------------------------------------------------------


def preferences(p: Tensor, labels: Sequence[int]) -> Tensor:
    """P(z is chosen over z'), averaged over these labels, [5, 5]; 0 for a rationale and itself."""
    right = p[:, list(labels)]
    return torch.einsum("zy,wy->zw", right, 1 - right).fill_diagonal_(0.0) / len(labels)


def one_pair_each(p: Tensor, questions: int, generator: torch.Generator) -> Tensor:
    """Who is chosen over whom in a pair drawn for each question, [Q, 5, 5] with a single 1 in each of them."""
    weight = preferences(p, range(LETTERS)).flatten()
    drawn = torch.multinomial(weight, questions, replacement=True, generator=generator)
    return torch.nn.functional.one_hot(drawn, len(weight)).to(p).reshape(questions, *p.shape[:1], -1)


def slope(log_pi: Tensor, wins: Tensor, beta: float) -> Tensor:
    """DPO's expected gradient in the logits [..., 5] of each question, pairs drawn as `wins` [..., 5, 5] says."""
    logits = log_pi.expand(*wins.shape[:-1]).clone().requires_grad_()
    h = logits.log_softmax(-1) - UNIFORM
    loss = (wins * dpo_loss(h[..., :, None], h[..., None, :], beta)).sum((-2, -1)) / wins.sum((-2, -1))
    (found,) = torch.autograd.grad(loss.sum(), logits)
    return found


def learnt(wins: Tensor, beta: float, steps: int) -> Tensor:
    """log pi [..., 5] of each question after so many steps of gradient descent on DPO, at rate 1/beta."""
    logits = UNIFORM
    for _ in range(steps):
        logits = logits - slope(logits, wins, beta) / beta
    return logits.log_softmax(-1)


def ranking(log_pi: Tensor, wins: Tensor) -> Tensor:
    """How often the chosen one is ahead, over pairs drawn as `wins` says, [...]: for each question."""
    h = log_pi - UNIFORM
    ahead = preference_metrics(h[..., :, None], h[..., None, :], 1.0)["reward_accuracy"]
    return (wins * ahead).sum((-2, -1)) / wins.sum((-2, -1))
