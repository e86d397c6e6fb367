"""What a question weighs in one step on its K samples at pi_ref, by how its success rate p and K are counted.

K samples of one question are drawn by the policy itself; r = 1 where one is right. The expected step, in units of ∇p:

    SFT on the right ones                  K
    …, each by 1/number right              (1 − (1 − p)^K)/p
    DPO on all right-wrong pairs           (beta/2)·K(K − 1)
    …, each by 1/number of pairs           (beta/2)·(1 − p^K − (1 − p)^K)/(p(1 − p))
    SFT on the first c right ones          E[min(R, c)]/p,  R ~ Bin(K, p)
    DPO + alpha·NLL of the chosen one      K(K − 1)·(beta/2 + alpha·(1 − p)/T),  T tokens an answer

All tuples are listed. And where STaR (SFT on the right samples of pi_ref, until it no longer moves) ends: pi_ref(·|right);
a question that is never right does not move.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from tiltlm.models.table import TableLM
from tiltlm.policies.dpo import dpo_loss
from tiltlm.policies.sft import SFT, sft_loss
from tiltlm.samples import Samples, Tokens

BETA = 0.3
LOGITS = torch.tensor([0.4, -0.3, 0.1, -1.0, 0.7], dtype=torch.float64)
RIGHT = torch.tensor([True, False, True, False, False])


def success(logits: Tensor) -> Tensor:
    return logits.softmax(0)[RIGHT].sum()


def slope_of_success() -> tuple[float, Tensor]:
    """p and ∇p at the reference."""
    logits = LOGITS.clone().requires_grad_()
    p = success(logits)
    return p.item(), torch.autograd.grad(p, logits)[0]


def sft(logits: Tensor, drawn: Tensor, evenly: bool) -> Tensor:
    """−loss of SFT on the right ones of a tuple; evenly: each question counts once."""
    log_p = logits.log_softmax(0)[drawn[RIGHT[drawn]]]
    total = -sft_loss(log_p[:, None]).sum()
    return total / max(len(log_p), 1) if evenly else total


def dpo(logits: Tensor, drawn: Tensor, evenly: bool) -> Tensor:
    """−loss of DPO on all right-wrong pairs of a tuple."""
    h = logits.log_softmax(0) - LOGITS.log_softmax(0)
    chosen, rejected = h[drawn[RIGHT[drawn]]], h[drawn[~RIGHT[drawn]]]
    pairs = torch.cartesian_prod(chosen, rejected).reshape(-1, 2)
    total = -dpo_loss(pairs[:, 0], pairs[:, 1], BETA).sum()
    return total / max(len(pairs), 1) if evenly else total


def expected_step(of_tuple, k: int, evenly: bool) -> Tensor:
    """∇ of the mean over all tuples of k, each with its chance at the reference."""
    logits, pi = LOGITS.clone().requires_grad_(), LOGITS.softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for tuple_ in product(range(len(LOGITS)), repeat=k):
        drawn = torch.tensor(tuple_)
        total = total + pi[drawn].prod() * of_tuple(logits, drawn, evenly)
    return torch.autograd.grad(total, logits)[0]


WEIGHTS = {
    ("sft", False): lambda p, k: k,
    ("sft", True): lambda p, k: (1 - (1 - p) ** k) / p,
    ("dpo", False): lambda p, k: BETA / 2 * k * (k - 1),
    ("dpo", True): lambda p, k: BETA / 2 * (1 - p**k - (1 - p) ** k) / (p * (1 - p)),
}


@pytest.mark.parametrize(("loss", "evenly"), WEIGHTS)
@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_expected_step_is_its_weight_times_the_gradient_of_success(loss, evenly, k):
    p, slope = slope_of_success()
    step = expected_step({"sft": sft, "dpo": dpo}[loss], k, evenly)
    torch.testing.assert_close(step, WEIGHTS[loss, evenly](p, k) * slope, atol=1e-14, rtol=0)
    other = WEIGHTS[loss, not evenly](p, k)
    if (loss, k) != ("dpo", 2):  # of two samples there is one pair at most
        assert (step - other * slope).norm() > 1e-3  # the other weighting is not this one


def test_weights_by_hand():
    """p = ½, K = 2: SFT 2 and (1 − ¼)/½ = 3/2; DPO (beta/2)·2 and (beta/2)·(½)/(¼) = beta: one pair, if any, so alike."""
    by_hand = {("sft", False): 2, ("sft", True): 1.5, ("dpo", False): BETA, ("dpo", True): BETA}
    assert {which: weight(0.5, 2) for which, weight in WEIGHTS.items()} == pytest.approx(by_hand)


CAP, ALPHA = 2, 0.7


def capped(logits: Tensor, drawn: Tensor, evenly: bool) -> Tensor:
    """−loss of SFT on the first right ones of a tuple."""
    return -sft_loss(logits.log_softmax(0)[drawn[RIGHT[drawn]][:CAP]][:, None]).sum()


def irpo(logits: Tensor, drawn: Tensor, evenly: bool) -> Tensor:
    """−loss of DPO with the likelihood of every pair's chosen answer, one token long."""
    wrong = int((~RIGHT[drawn]).sum())
    return dpo(logits, drawn, evenly) + ALPHA * wrong * sft(logits, drawn, evenly)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_cap_and_a_likelihood_term_weigh_as_said(k):
    p, slope = slope_of_success()
    kept = sum(min(r, CAP) * math.comb(k, r) * p**r * (1 - p) ** (k - r) for r in range(k + 1))
    torch.testing.assert_close(expected_step(capped, k, False), kept / p * slope, atol=1e-14, rtol=0)
    both = k * (k - 1) * (BETA / 2 + ALPHA * (1 - p))
    torch.testing.assert_close(expected_step(irpo, k, False), both * slope, atol=1e-14, rtol=0)


# ---- STaR in a table ------------------------------------------------------------------------------------------------

ALL = torch.stack([RIGHT, torch.zeros(5, dtype=torch.bool)])
"""Two questions: the first has right completions, the second none."""


def two_questions() -> TableLM:
    model = TableLM(2, 5, 1)
    with torch.no_grad():
        model.tables[0].copy_(torch.stack([LOGITS, LOGITS.flip(0)])[:, None])
    return model


def accepted(reference: TableLM) -> tuple[Samples, Tensor]:
    """The right completions and how often the reference draws each."""
    question, completion = ALL.nonzero().unbind(1)
    ids = Tokens.full(completion[:, None])
    samples = Samples(Tokens.of([[0], [1]]), question, ids.ids, ids.mask)
    return samples, reference.log_prob(samples).sum(1).exp().detach()


def test_star_ends_at_the_reference_given_that_it_is_right_and_leaves_hopeless_questions_alone():
    """The exact expected SFT step: zero at pi_ref(·|right), not at pi_ref; gradient ascent from pi_ref gets there, and is
    then right always; the question without right samples keeps its logits bit for bit."""
    reference, policy = two_questions(), two_questions()
    samples, weight = accepted(reference)
    first = torch.tensor([0, 2])
    conditional = LOGITS.softmax(0)[first] / LOGITS.softmax(0)[first].sum()
    before = policy.tables[0][1].detach().clone()
    for step in range(3000):
        loss = (weight * SFT().loss(policy, samples).loss).sum() / weight.sum()
        (slope,) = torch.autograd.grad(loss, [policy.tables[0]])
        if step == 0:
            assert slope[0].norm() > 0.1
        assert torch.equal(slope[1], torch.zeros_like(slope[1]))
        policy.tables[0].data -= 2 * slope
    pi = policy.tables[0][0, 0].softmax(0)
    assert pi[RIGHT].sum().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(pi[first] / pi[first].sum(), conditional, atol=1e-4, rtol=0)
    assert torch.equal(policy.tables[0][1].detach(), before)


def test_the_expected_step_vanishes_at_the_reference_given_that_it_is_right():
    """And a second iteration, whose samples are that policy's own, finds nothing to change."""
    reference, policy = two_questions(), two_questions()
    samples, weight = accepted(reference)
    with torch.no_grad():
        policy.tables[0][0, 0, ~RIGHT] = -torch.inf
    for drawn_by in (weight, accepted(policy)[1]):
        loss = (drawn_by * SFT().loss(policy, samples).loss).sum()
        (slope,) = torch.autograd.grad(loss, [policy.tables[0]])
        torch.testing.assert_close(slope[0, 0, RIGHT], torch.zeros(2).double(), atol=1e-12, rtol=0)
    off = torch.tensor([1.0, 2.0], dtype=torch.float64)
    loss = (weight * off * SFT().loss(policy, samples).loss).sum()
    (slope,) = torch.autograd.grad(loss, [policy.tables[0]])
    assert slope[0, 0, RIGHT].norm() > 1e-2
