"""The distance to the target within held-out groups: KL(q‖p), 0 at pi* (`policies.exo_rw`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiltlm.feeds import Feed, rows_of, source_of
from tiltlm.method import Learner, Method
from tiltlm.policies.exo_rw import ExoRw, group_log_ratios, group_metrics
from tiltlm.problem import Problem
from tiltlm.run import Run


@torch.no_grad()
def gap_in_groups(learnt: Run[Any], problem: Problem, learner: Learner, method: Method) -> Tensor:
    """KL(q‖p) of every held-out group, [G], at the method's own beta_pi, else the problem's; empty without labels."""
    feed = learnt.recipe.feed
    if learner.policy is None or not isinstance(feed, Feed):
        return torch.zeros(0)
    if source_of(problem.facts, method.fed, feed) != "stored":
        return torch.zeros(0)
    groups = rows_of(problem, ExoRw(), feed, learnt.recipe.stores(learnt, problem), "test")
    beta_pi = getattr(method, "beta_pi", problem.beta_pi)
    parts = [groups.select(slice(k, k + 32)) for k in range(0, len(groups), 32)]
    policy: Any = learner.policy
    found = [
        group_metrics(group_log_ratios(policy, part), part.reward, problem.beta / beta_pi, beta_pi)["gap"]
        for part in parts
    ]
    return torch.cat(found).cpu()
