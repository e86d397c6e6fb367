"""The distance to the target within held-out groups: KL(q‖p), 0 at pi* (`policies.exo_rw`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    found = []
    for k in range(0, len(groups), 32):
        part = groups.select(slice(k, k + 32))
        h = group_log_ratios(judge, part)
        found.append(group_metrics(h, part.reward, problem.beta / beta_pi, beta_pi)["gap"])
    return torch.cat(found).cpu()
