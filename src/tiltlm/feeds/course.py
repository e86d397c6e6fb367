"""From a problem, a method and settings to the experience that it learns from."""

from __future__ import annotations

from dataclasses import dataclass

from tiltlm.experience import Experience
from tiltlm.feeds.available import source_of
from tiltlm.feeds.drawn import drawn_rows
from tiltlm.feeds.fixed import Stores, Tell, fixed, rows_of
from tiltlm.feeds.settings import NEW, AnyFeed, TwistFeed
from tiltlm.feeds.twist import twist_draws
from tiltlm.fit import Fit
from tiltlm.method import Learner, Method
from tiltlm.problem import Problem


@dataclass(frozen=True)
class Course:
    """The experience; the fit, its steps counted; and how many fixed rows there are (None: every batch is new)."""

    experience: Experience
    fit: Fit
    rows: int | None


def course_of(
    problem: Problem, method: Method, learner: Learner, feed: AnyFeed, fit: Fit, called: str,
    stores: Stores | None = None, tell: Tell = lambda text: None,
) -> Course:  # fmt: skip
    """What `method` learns from, step by step. called: what its random numbers are named after."""
    stores = stores or Stores()
    if method.caution:
        tell(method.caution)
    if isinstance(feed, TwistFeed):
        return Course(twist_draws(problem, method, learner, feed, called, stores), fit.of(None), None)
    if source_of(problem.facts, method, feed) in NEW:
        if feed.judge.caution:
            tell(feed.judge.caution)
        return Course(drawn_rows(problem, method, learner, feed, fit, called, stores, tell), fit.of(None), None)
    data = rows_of(problem, method, feed, stores, "train", tell)
    if not len(data):
        raise ValueError("nothing to learn from: every group is tied, the reward does not tell completions apart")
    how, said = fit.of(len(data)), method.about(data)
    if said:
        tell(said)
    return Course(fixed(problem, method, learner, feed, data, how.batch_size, called), how, len(data))
