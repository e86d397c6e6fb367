"""What a method is fed, from what a problem has: the data's own rows, stored draws of the reference, fresh ones, or the
policy's own.

    answers   the data's own; or exact draws of pi*, fresh at every step
    pairs     the data's own; the best and the worst of stored, labelled draws; or fresh draws, the winner by a coin that
              knows the reward: P(first) = σ(r_1 − r_2), Bradley–Terry
    groups    the data's own; stored draws, some of each group at every step; or fresh draws
              (fresh draws are the reference's, or with source live the policy's own)
    judged    the data's own verdicts; else pairs, their better side judged good and their worse one bad
    values    draws of the reference with their rewards, stored or fresh
    live      the policy's own draws
    draws     a twist's weighted draws (`twists.draws`)

The same objective on another feed is another method: a value, not a class.
"""

from __future__ import annotations

from tiltlm.feeds.available import default_feed, owned, rows_drawn, shares, source_of, unshared, why_not
from tiltlm.feeds.course import Course, course_of
from tiltlm.feeds.drawn import by_coin
from tiltlm.feeds.fixed import Stores, first_of, fixed, judged, mapped, rows_of
from tiltlm.feeds.settings import NEW, AnyFeed, Draws, Feed, Rounds, TwistFeed

__all__ = [
    "NEW",
    "AnyFeed",
    "Course",
    "Draws",
    "Feed",
    "Rounds",
    "Stores",
    "TwistFeed",
    "by_coin",
    "course_of",
    "default_feed",
    "first_of",
    "fixed",
    "judged",
    "mapped",
    "owned",
    "rows_drawn",
    "rows_of",
    "shares",
    "source_of",
    "unshared",
    "why_not",
]
