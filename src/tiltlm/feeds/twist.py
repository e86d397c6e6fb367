"""A twist's weighted draws."""

from __future__ import annotations

from typing import Any

from tiltlm.experience import Experience, FromFirst
from tiltlm.feeds.fixed import Stores
from tiltlm.feeds.settings import TwistFeed
from tiltlm.method import Learner, Method
from tiltlm.problem import Problem
from tiltlm.samplers.scenes import OnePrompt, Pool
from tiltlm.twists.draws import TwistDraws
from tiltlm.twists.learned import LearnedTwist


def twist_draws(
    problem: Problem, method: Method, learner: Learner, feed: TwistFeed, called: str, stores: Stores
) -> Experience:
    """Of several processes the first one draws where the reward costs money."""
    objective: Any = method.objective(problem)
    assert learner.values is not None
    n = (1 if feed.positives == "csmc" else feed.particles) if feed.wants_exact else None
    scene = problem.scene(feed.prompts, n)
    if feed.supply == "stored" and n is not None:
        assert stores.exact is not None
        scene = OnePrompt(problem.prompts["train"], Pool(stores.exact().to(problem.device), n))
    draws = TwistDraws(
        problem.target, LearnedTwist(learner.values, objective.squashed), scene, problem.width,
        problem.stream.child(called, "draws"),
        objective.needs if feed.positives == "particles" else objective.needs_beside_positives,
        feed.particles, feed.positives, feed.drawn_by, tempered=feed.tempered, induced=objective.induced,
        backups=objective.backups, prefixes=feed.prefixes,
    )  # fmt: skip
    return FromFirst(draws) if problem.facts.paid else draws
