"""Star graphs with an exact walker and exact values: accuracy, KL and log Z equal their closed forms.

The walker takes a uniformly random arm, so p = 1/d before the first hop and 0 or 1 after it. Nothing is
trained: what is tested is guided decoding, the rules, the ruler and the task, for several d, l and beta.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltlm.data.star_graph import StarGraph, generate
from tiltlm.data.star_graph_tokens import AnswerKey, NumeralTokenizer, check
from tiltlm.exact import kl, log_density
from tiltlm.models.base import LanguageModel, State, Values
from tiltlm.rewards.exact_answer import ExactAnswer
from tiltlm.ruler.log_z import BinaryTarget
from tiltlm.ruler.measure import Ruler
from tiltlm.samplers.guided import Guided
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.target import Target
from tiltlm.twists.cd import CD
from tiltlm.twists.fudge import Fudge
from tiltlm.twists.q_sharp import QSharp
from tiltlm.twists.value import ValueTwist

CERTAIN = 60.0
"""A logit that is certain to machine precision."""


class Arms:
    """Which arms each row's prefix is still on: prompts are told apart by their ids."""

    def __init__(self, table: dict[tuple[int, ...], Tensor], prompts: Tokens) -> None:
        self.arms = torch.stack([table[tuple(row)] for row in prompts.lists()])  # [N, d, l]
        self.on = torch.ones(self.arms.shape[:2], dtype=torch.bool)
        self.depth = 0

    def append(self, tokens: Tensor) -> None:
        self.on = self.on & (self.arms[:, :, self.depth] == tokens[:, None])
        self.depth += 1

    def select(self, index: Tensor) -> None:
        self.arms, self.on = self.arms[index], self.on[index]


class WalkerState(Arms, State):
    def logits(self) -> Tensor:
        counts = torch.zeros(len(self.on), 64, dtype=torch.float64)
        return counts.scatter_add(1, self.arms[:, :, self.depth], self.on.double()).log()


class OracleState(Arms):
    def peek(self, candidates: Tensor | None) -> Tensor:
        if candidates is None:
            candidates = torch.arange(64).expand(len(self.on), 64)
        still = self.on[:, None] & (self.arms[:, None, :, self.depth] == candidates[:, :, None])  # [N, K, d]
        p = still[:, :, 0].double() / still.sum(2).clamp_min(1)
        return p.logit().clamp(-CERTAIN, CERTAIN)[:, :, None]


class Walker(LanguageModel):
    """The reference: a uniformly random arm, exactly."""

    vocab_size, eos_ids = 64, ()

    def __init__(self, table: dict[tuple[int, ...], Tensor]) -> None:
        super().__init__()
        self.table = table

    def start(self, prompts: Tokens, capacity: int) -> State:
        return WalkerState(self.table, prompts)


class Oracle(Values):
    """P(right | prefix), exactly; arm 0 of the table is the right one."""

    def __init__(self, table: dict[tuple[int, ...], Tensor]) -> None:
        super().__init__()
        self.table = table

    def start(self, prompts: Tokens, capacity: int) -> OracleState:
        return OracleState(self.table, prompts)

    def values(self, samples: Samples) -> Tensor:
        raise NotImplementedError


def world(degree: int, length: int, n: int) -> tuple[Tokens, AnswerKey, dict[tuple[int, ...], Tensor]]:
    graphs = generate(StarGraph(degree, length, 60), n, np.random.default_rng(degree * 10 + length))
    tokenizer = NumeralTokenizer(StarGraph(degree, length, 60))
    prompts, key = tokenizer.prompts(graphs), tokenizer.key(graphs)
    right = (key.arms == key.answers.ids[:, None]).all(2)
    assert (right.sum(1) == 1).all()
    order = right.long().sort(dim=1, descending=True).indices
    arms = key.arms.gather(1, order[:, :, None].expand_as(key.arms))
    return prompts, key, {tuple(p): a for p, a in zip(prompts.lists(), arms, strict=True)}


def arm_log_probs(q: LanguageModel, prompts: Tokens, table: dict[tuple[int, ...], Tensor]) -> Tensor:
    """log q of every arm, [P, d], the right one first."""
    arms = torch.stack([table[tuple(p)] for p in prompts.lists()])
    n, d, length = arms.shape
    rows = arms.reshape(-1, length)
    index = torch.arange(n).repeat_interleave(d)
    return log_density(q, Samples(prompts, index, rows, torch.ones_like(rows, dtype=torch.bool))).reshape(n, d)


@pytest.mark.parametrize(("degree", "length"), [(2, 3), (2, 5), (5, 5), (3, 8)])
@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("rule", ["q-sharp", "cd", "fudge"])
def test_guided_walkers_have_the_closed_form_accuracy_and_kl(degree, length, beta, rule):
    """With exact p, CD and Q# are the same on star graphs (p is 0 or 1 where they could differ)."""
    prompts, _, table = world(degree, length, 5)
    reference = Walker(table)
    psi = {"q-sharp": QSharp(beta), "cd": CD(beta), "fudge": Fudge()}[rule]
    log_q = arm_log_probs(Guided(reference, ValueTwist(Oracle(table), psi)), prompts, table)
    log_ref = torch.full_like(log_q, -math.log(degree))
    torch.testing.assert_close(arm_log_probs(reference, prompts, table), log_ref, atol=1e-12, rtol=0)
    p, lift = 1 / degree, math.exp(1 / beta)
    accuracy = 1.0 if rule == "fudge" else p * lift / (p * lift + 1 - p)
    divergence = math.log(degree) if rule == "fudge" else accuracy / beta - math.log1p(p * (lift - 1))
    torch.testing.assert_close(
        log_q[:, 0].exp(), torch.full((5,), accuracy, dtype=torch.float64), atol=1e-10, rtol=0
    )
    torch.testing.assert_close(kl(log_q, log_ref), torch.full((5,), divergence).double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("degree", "length", "beta"), [(2, 5, 1.0), (5, 3, 0.3)])
def test_the_ruler_measures_an_oracle_at_distance_zero_and_the_walker_at_its_own(degree, length, beta):
    """2000 graphs, one draw each, through tokenizer, reward, checker and ruler; 4 standard errors."""
    prompts, key, table = world(degree, length, 2000)
    reference, log_p = Walker(table), torch.full((2000,), -math.log(degree)).double()
    star = BinaryTarget(log_p, beta)
    checks = {"accuracy": lambda s: check(s, key).exact, "valid_rate": lambda s: check(s, key).valid_arm}
    target = Target(reference, ExactAnswer(key.answers), beta)
    ruler = Ruler(target, prompts, length, stream(1, "oracle"), log_z=star.log_z, checks=checks)
    guided = Guided(reference, ValueTwist(Oracle(table), QSharp(beta)), top_k=degree)
    optimum, walker = ruler.measure(guided)[0].estimates(), ruler.measure(reference)[0].estimates()
    assert optimum["valid_rate"].value == walker["valid_rate"].value == 1
    assert abs(optimum["accuracy"].value - star.success[0]) < 4 * optimum["accuracy"].stderr
    assert abs(walker["accuracy"].value - 1 / degree) < 4 * walker["accuracy"].stderr
    assert abs(optimum["kl_to_target"].value) < 4 * optimum["kl_to_target"].stderr
    assert optimum["kl_to_reference"].value == pytest.approx(star.kl_to_reference[0].item(), abs=1e-6)
    assert walker["kl_to_target"].value > 0.05 + 4 * walker["kl_to_target"].stderr
