"""What is measured on held-out prompts while a method learns.

valid_loss, and what the method reports while it trains, on validation rows of its own kind (where they are fixed rows).
valid_gap: KL(q‖p) within the validation groups, 0 at pi*; valid_ranking: how often the policy's favourite of a group is the
reward's. reward, kl_to_reference, objective: E[r], KL(q‖reference) and J = E[r] − beta·KL over answers to validation
prompts, always drawn with the same random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from tiltlm import ranks
from tiltlm.experience import Experience
from tiltlm.feeds import NEW, Feed, Stores, fixed, owned, rows_of, source_of
from tiltlm.groups import Groups
from tiltlm.method import Learner, Method
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome
from tiltlm.policies.exo_rw import ExoRw, group_log_ratios, group_metrics
from tiltlm.problem import Problem
from tiltlm.ruler.kl import kl_along_in_batches
from tiltlm.samplers.shared import draw_batches_shared, of_rows
from tiltlm.samples import Samples

WATCHED = 64
"""Validation prompts that are answered at every evaluation."""


@dataclass(frozen=True)
class Watched:
    """() -> numbers by name."""

    problem: Problem
    method: Method
    objective: Any
    learner: Learner
    feed: Any
    stores: Stores
    called: str

    def __call__(self) -> dict[str, float]:
        if self.problem.facts.paid:
            return ranks.from_first(self.numbers)
        return self.numbers()

    def numbers(self) -> dict[str, float]:
        return self.on_objective() | self.on_groups() | self.on_draws()

    @property
    def decoder(self) -> LanguageModel:
        return self.method.decoder(self.problem, self.learner)

    @cached_property
    def held_out(self) -> Experience | None:
        """The method's own batches of validation rows, always the same; None where there is nothing to tell apart."""
        if not isinstance(self.feed, Feed) or source_of(self.problem.facts, self.method, self.feed) in NEW:
            return None
        data = rows_of(self.problem, self.method, self.feed, self.stores, "valid")
        if not len(data):
            return None
        order = self.problem.stream.child("held out")
        return fixed(self.problem, self.method, self.learner, self.feed, data, len(data), self.called, order)

    def on_objective(self) -> dict[str, float]:
        """The method's loss and metrics on validation rows."""
        if self.held_out is None:
            return {}
        batch = self.objective.prepare(self.held_out.batch(0))

        def losses(begin: int, end: int) -> list[Outcome]:
            parts = [batch.select(slice(k, min(k + 32, end))) for k in range(begin, end, 32)]
            return [self.objective.loss(self.learner.module, part) for part in parts]

        found = ranks.in_shares(len(batch), losses)
        loss = sum(float(each.loss.sum()) for each in found) / float(self.objective.weight(batch).sum())
        means = {name: torch.cat([each.metrics[name] for each in found]).nanmean() for name in found[0].metrics}
        return {"valid_loss": loss} | {f"valid_{name}": float(x) for name, x in means.items() if not x.isnan()}

    @cached_property
    def parts(self) -> list[Groups]:
        """The validation groups, some at a time; none where there are none."""
        stored = self.stores.groups is not None
        if self.learner.policy is None or not isinstance(self.feed, Feed):
            return []
        if not stored and not owned(self.problem.facts, "groups"):
            return []
        feed = self.feed if stored else replace(self.feed, source="own")
        groups = rows_of(self.problem, ExoRw(), feed, self.stores, "valid")
        return [groups.select(slice(k, k + 32)) for k in range(0, len(groups), 32)]

    def on_groups(self) -> dict[str, float]:
        """The distance to the target within groups, at the temperatures of EXO or else the problem's."""
        beta_pi = getattr(self.objective, "beta_pi", self.problem.beta_pi)
        betas = self.problem.beta / beta_pi, beta_pi
        policy: Any = self.learner.policy

        def metrics(begin: int, end: int) -> list[dict[str, torch.Tensor]]:
            parts = self.parts[begin:end]
            return [group_metrics(group_log_ratios(policy, part), part.reward, *betas) for part in parts]

        found = ranks.in_shares(len(self.parts), metrics)
        n = sum(len(part) for part in self.parts)
        return (
            {f"valid_{name}": sum(float(each[name].sum()) for each in found) / n for name in found[0]} if n else {}
        )

    def on_draws(self) -> dict[str, float]:
        problem, decoder = self.problem, self.decoder
        prompts = problem.prompts["valid"].select(slice(0, WATCHED))
        samples = draw_batches_shared(
            decoder, prompts, max_new_tokens=problem.width, stream=problem.stream.child("watch"), batch_size=64
        )

        def mean(ask: Callable[[Samples], torch.Tensor]) -> float:
            return float(of_rows(samples, ask).mean())

        reward = mean(problem.target.reward)
        kl = mean(lambda some: kl_along_in_batches(decoder, problem.reference, some, 64))
        terms = {n: mean(term) for n, term in problem.checks.items() if n.startswith("reward[")}
        return {"reward": reward, "kl_to_reference": kl, "objective": reward - problem.beta * kl} | terms
