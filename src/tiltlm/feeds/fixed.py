"""Fixed rows: the data's own, or stored draws of the reference with their rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tiltlm.experience import Experience, Offline, Subsets, referenced
from tiltlm.feeds.available import source_of
from tiltlm.feeds.settings import Feed
from tiltlm.groups import Groups, all_pairs, as_groups, best_and_worst
from tiltlm.judges.base import Judge
from tiltlm.method import Learner, Lesson, Method
from tiltlm.problem import Fed, Problem, Split
from tiltlm.samplers.scenes import OnePrompt
from tiltlm.samples import Pairs, Samples
from tiltlm.seeds import Stream


@dataclass(frozen=True)
class Stores:
    """What other runs have stored for this one: labelled groups of a split, exact draws to train on; how rows get the
    reference's log-probabilities (samples, split) -> samples; and the judge of what a learner draws."""

    groups: Callable[[Split], Groups] | None = None
    exact: Callable[[], Samples] | None = None
    refer: Callable[[Samples, Split], Samples] | None = None
    judge: Judge | None = None


Tell = Callable[[str], None]


def rows_of(
    problem: Problem, method: Method, feed: Feed, stores: Stores, split: Split, tell: Tell = lambda text: None
) -> Any:
    """The fixed rows of a split that a method learns from, the reference's log-probabilities filled in."""
    if source_of(problem.facts, method, feed) == "own":
        return _own(problem, method.fed, feed, stores, split, tell)
    return _stored(problem, method.fed, feed, stores, split, tell)


def _own(problem: Problem, fed: Fed, feed: Feed, stores: Stores, split: Split, tell: Tell) -> Any:
    own = problem.own
    if fed in own:
        found = own[fed](split)
        return (
            found.to(problem.device) if fed in ("answers", "values") else _referred(found, problem, stores, split)
        )
    if fed == "judged":
        return judged(_own(problem, "pairs", feed, stores, split, tell))
    if fed == "groups":
        return _referred(as_groups(own["pairs"](split)), problem, stores, split)
    return _paired(_own(problem, "groups", feed, stores, split, tell), feed, split, tell).to(problem.device)


def _stored(problem: Problem, fed: Fed, feed: Feed, stores: Stores, split: Split, tell: Tell) -> Any:
    assert stores.groups is not None
    groups = stores.groups(split)
    if fed == "values":
        return groups.samples.to(problem.device)
    groups = _referred(groups, problem, stores, split)
    if fed == "groups":
        return groups
    pairs = _paired(groups, feed, split, tell).to(problem.device)
    return judged(pairs) if fed == "judged" else pairs


def _paired(groups: Groups, feed: Feed, split: Split, tell: Tell) -> Pairs:
    whole = groups.to("cpu")
    some = first_of(whole, min(feed.size, whole.size))
    pairs, ties = (all_pairs if feed.pairing == "all" else best_and_worst)(some)
    if ties:
        tell(f"{ties} ties left out of the {split} split")
    return pairs


def _referred(data: Any, problem: Problem, stores: Stores, split: Split) -> Any:
    """`data` with log_ref, on the problem's device."""

    def fill(samples: Samples) -> Samples:
        if samples.log_ref is None:
            samples = stores.refer(samples, split) if stores.refer is not None else _in_batches(samples, problem)
        return samples.to(problem.device)

    return mapped(data, fill)


def mapped(data: Any, fill: Callable[[Samples], Samples]) -> Any:
    """`data` (Samples, Pairs, Groups) with `fill` applied to all of its rows."""
    if isinstance(data, Pairs):
        return Pairs(fill(data.chosen), fill(data.rejected))
    if isinstance(data, Groups):
        return Groups(fill(data.samples), data.size)
    return fill(data)


def _in_batches(samples: Samples, problem: Problem, rows_at_once: int = 128) -> Samples:
    samples = samples.to(problem.device)
    starts = range(0, len(samples), rows_at_once)
    parts = [referenced(samples.select(slice(k, k + rows_at_once)), problem.reference).log_ref for k in starts]
    return samples.with_(log_ref=torch.cat([part for part in parts if part is not None]))


def first_of(groups: Groups, size: int) -> Groups:
    """The first `size` rows of every group."""
    if size > groups.size:
        raise ValueError(f"groups of {groups.size} completions hold no {size}: draw more (--feed.draws.n {size})")
    index = torch.arange(len(groups))[:, None] * groups.size + torch.arange(size)
    return Groups(groups.samples.select(index.flatten()), size)


def judged(pairs: Pairs) -> Samples:
    """Pairs as answers judged one by one: chosen ones with reward 1, then rejected ones with 0."""
    both, n = pairs.both(), len(pairs)
    return both.with_(reward=torch.cat([torch.ones(n), torch.zeros(n)]).to(both.device))


def fixed(
    problem: Problem, method: Method, learner: Learner, feed: Feed, data: Any, batch_size: int, called: str,
    order: Stream | None = None,
) -> Experience:  # fmt: skip
    """Batches of fixed rows as `method` wants them; order: the stream that shuffles them."""
    if order is None:
        stored = "stored" in (problem.facts.source, source_of(problem.facts, method, feed))
        own = problem.orders.get(method.fed, problem.stream.child(called, "data"))
        order = problem.stream.child(called).child("data") if stored else own
    found: Experience = Offline(data, batch_size, order)
    if isinstance(data, Groups):
        found = Subsets(found, min(feed.size, data.size), problem.stream.child(called, "subsets"))
    return as_wanted(method, found, Lesson(problem, learner, OnePrompt(problem.prompts["test"]), 1, order))


def as_wanted(method: Method, found: Experience, lesson: Lesson) -> Experience:
    wanted: Experience = method.experience(found, lesson)
    return wanted
