"""The distance to the target within held-out groups: KL(q‖p), 0 at pi* (`policies.exo_rw`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiltlm import ranks
from tiltlm.feeds import Feed, rows_of, source_of
from tiltlm.models.base import LanguageModel
from tiltlm.policies.exo_rw import ExoRw, group_log_ratios, group_metrics
from tiltlm.problem import Problem
from tiltlm.run import Run


@torch.no_grad()
def gap_in_groups(learnt: Run[Any], problem: Problem, policy: LanguageModel, beta_pi: float) -> Tensor:
    """KL(q‖p) of every held-out group, [G]; empty where the training `learnt` has no labelled draws."""
    feed: Any = learnt.recipe.feed
    if not isinstance(feed, Feed) or source_of(problem.facts, learnt.recipe.method, feed) != "stored":
        return torch.zeros(0)
    groups = rows_of(problem, ExoRw(), feed, learnt.recipe.stores(learnt, problem), "test")
    judge: Any = policy

    def gaps(begin: int, end: int) -> list[Tensor]:
        parts = [groups.select(slice(k, min(k + 32, end))) for k in range(begin, end, 32)]
        betas = problem.beta / beta_pi, beta_pi
        return [group_metrics(group_log_ratios(judge, part), part.reward, *betas)["gap"] for part in parts]

    return torch.cat(ranks.in_shares(len(groups), gaps)).cpu()
