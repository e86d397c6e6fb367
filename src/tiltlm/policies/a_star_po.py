"""A*-PO: regress on the optimal advantage (Brantley et al. 2025, arXiv:2505.20686).

    V̂*(x) = beta·log( (1/n)·Σ_k exp(r(x, y_k)/beta) ),      y_1 … y_n ~ pi_ref, once for each prompt
    L = mean_i [ beta·h(y_i) − (r_i − V̂*(x)) ]²,            h(y) = log p(y|x) − log pi_ref(y|x)

With V* = beta·log Z the loss is 0 at pi*, whoever drew. V̂* is too low on average (Jensen): for large n by about
beta·Var(exp(r/beta))/(2n·Z²), and at small beta draws that miss the best answers say nothing of them. On the policy's own
draws that is noise and no bias: the error multiplies E_p[∇ log p] = 0, so pi* is the fixed point for any V̂*. On other draws
it multiplies E[∇ log p] ≠ 0, and pi* is the optimum as n → ∞ only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.experience import Around, Experience
from tiltlm.groups import Groups
from tiltlm.method import Lesson, Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.policies.exo_rw import group_log_ratios
from tiltlm.policies.log_variance import distance_metrics
from tiltlm.problem import Fed, Source
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samples import Conditioned, Tokens
from tiltlm.seeds import Stream
from tiltlm.target import Target

AT_ONCE = 64
"""Rows that are drawn at once for V̂*: changes memory, not the result."""


def a_star_po_loss(h: Tensor, reward: Tensor, value: Tensor, beta: float) -> Tensor:
    """mean (beta·h − (r − V̂*))² of each group: [G, K], [G, K], [G] -> [G], in squared units of the reward."""
    return (beta * h - (reward - value[:, None])).square().mean(1)


def optimal_value(reward: Tensor, beta: float) -> Tensor:
    """beta·log-mean-exp of r/beta: rewards of the reference's draws [P, n] -> V̂* [P]."""
    return beta * ((reward.double() / beta).logsumexp(1) - math.log(reward.shape[1]))


@dataclass(frozen=True)
class Valued:
    """Groups, and V̂* of the prompt of each, [G]."""

    groups: Groups
    value: Tensor

    def __len__(self) -> int:
        return len(self.groups)

    def select(self, index: Tensor | slice) -> Valued:
        return Valued(self.groups.select(index), self.value[index])


@dataclass(frozen=True)
class OptimalValues(Around):
    """Another experience's groups with V̂* of their prompts, from `n` draws of the target's reference of width `width`.

    A prompt's draws follow from the prompt itself, and are made when it is first met: nothing needs saving.
    """

    target: Target
    beta: float
    n: int
    width: int
    stream: Stream
    known: dict[str, float] = field(default_factory=dict)

    def batch(self, step: int) -> Valued:
        groups: Groups = self.experience.batch(step)
        prompts = groups.samples.prompts.select(groups.samples.prompt_index[:: groups.size])
        names = names_of(prompts)
        for name, k in dict(zip(names, range(len(names)), strict=True)).items():
            if name not in self.known:
                self.known[name] = self.value(prompts.select(slice(k, k + 1)).cropped(), name)
        value = torch.tensor([self.known[name] for name in names], device=prompts.device)
        return Valued(groups, value)

    @torch.no_grad()
    def value(self, prompt: Tokens, name: str) -> float:
        """V̂* of one prompt."""
        drawn = draw_in_batches(
            self.target.reference, prompt, n=self.n, max_new_tokens=self.width, stream=self.stream.child("value", name),
            batch_size=AT_ONCE,
        )  # fmt: skip
        return float(optimal_value(self.target.reward(drawn)[None], self.beta))


def names_of(prompts: Tokens) -> list[str]:
    """Every prompt's tokens, and its condition's, as a text."""
    rows = prompts.lists()
    if isinstance(prompts, Conditioned):
        return [f"{row} {more}" for row, more in zip(rows, prompts.conditions.lists(), strict=True)]
    return [str(row) for row in rows]


@dataclass(frozen=True)
class AStarPO(PerRow, Policy):
    """A*-PO."""

    beta: float | None = None
    """Temperature, of V̂* and of the log-ratios (None: the target's; the paper has one for each)."""

    n: int = 32
    """Draws of the reference for each prompt's V̂*."""

    passes: int = 1
    """Updates per batch of draws."""

    fed: ClassVar[Fed] = "groups"
    source: ClassVar[Source | None] = "live"
    asks: ClassVar[bool] = True
    optimum: ClassVar[str] = "pi* of the same beta: on policy whatever V̂* is, on other draws as n grows"

    def __post_init__(self) -> None:
        positive(beta=self.beta, n=self.n, passes=self.passes)

    def experience(self, experience: Experience, lesson: Lesson) -> OptimalValues:
        """`experience` with V̂* of every prompt."""
        problem = lesson.problem
        beta = stated(self.bound(problem.beta).beta)
        stream = problem.stream.child("optimal values")
        return OptimalValues(experience, problem.target, beta, self.n, problem.width, stream)

    def loss(self, model: LanguageModel, batch: Valued) -> Outcome:
        groups, beta = batch.groups, stated(self.beta)
        h, reward = group_log_ratios(model, groups), groups.reward
        loss = a_star_po_loss(h, reward, batch.value.to(h), beta)
        return Outcome(loss, distance_metrics(h, reward, beta) | {"value": batch.value})


NAMES: dict[str, str] = {"a-star-po": "A*-PO: regress on r − V̂*, V̂* from draws of the reference"}
METHODS: dict[str, Method] = {"a-star-po": AStarPO()}
