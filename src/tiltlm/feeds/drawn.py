"""Rows that are drawn at every step: by the reference, or by the policy itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltlm import ranks
from tiltlm.experience import Experience, Generated, Live, referenced
from tiltlm.feeds.available import prompts_of_step, source_of
from tiltlm.feeds.fixed import Stores, Tell, as_wanted, judged
from tiltlm.feeds.served import Followed, Following, drawer_of
from tiltlm.feeds.settings import Feed
from tiltlm.fit import Fit
from tiltlm.groups import Groups
from tiltlm.judges.judged import JudgedBy, as_rows
from tiltlm.judges.settings import Judging
from tiltlm.method import Learner, Lesson, Method
from tiltlm.problem import Problem
from tiltlm.samplers.scenes import Scene
from tiltlm.samplers.serving import Drawer
from tiltlm.samplers.shared import draw_batches_shared, draw_shared
from tiltlm.samples import Pairs, Samples
from tiltlm.seeds import Stream


def drawn_rows(
    problem: Problem, method: Method, learner: Learner, feed: Feed, fit: Fit, called: str, stores: Stores,
    tell: Tell = lambda text: None,
) -> Experience:  # fmt: skip
    """Rows that are new at every step, scored by the reward or, where the feed names one, by a judge."""
    several = problem.facts.prompts == "several"
    prompts = len(problem.prompts["train"]) if several else 1
    count, n = prompts_of_step(problem.facts, feed, fit.batch_size, prompts)
    own = problem.stream.child(called, "data" if several and method.fed == "live" else "draws")
    scene = problem.scene(count, n if method.fed == "answers" else None)
    found: Experience
    asked = feed.judge.kind != "none"
    live = source_of(problem.facts, method, feed) == "live"
    drawer = drawer_of(problem, learner, feed, live)
    if method.fed == "live" and problem.fresh is None:
        assert learner.policy is not None
        reward = None if asked else problem.target.reward
        found = Live(
            feed.draw.of(learner.policy), reward, problem.prompts["train"], count, problem.width, own, n,
            problem.reference if method.wants_reference or asked else None, drawer,
        )  # fmt: skip
    else:
        found = Generated(_maker(problem, method, learner, feed, scene, n, drawer), own)
    if isinstance(drawer, Following):
        found = Followed(found, drawer)
    if asked:
        found = _judged_by(problem, method, feed.judge, found, stores, own.child("judge"), tell)
    return as_wanted(method, found, Lesson(problem, learner, scene, n, own, live))


def _judged_by(
    problem: Problem, method: Method, judging: Judging, found: Any, stores: Stores, own: Stream, tell: Tell
) -> JudgedBy:
    """`found` scored by the judge that the settings describe; the pairs that it starts with are the reference's."""
    assert stores.judge is not None
    beta_pi = getattr(method, "beta_pi", problem.beta_pi)

    def begin() -> Samples:
        prompts = ranks.from_first(lambda: problem.scene(judging.warm)(own.child("warm", "prompts"))[0])
        n = 2 * -(-judging.warm // len(prompts))
        drawn = draw_batches_shared(
            problem.reference, prompts, n=n, max_new_tokens=problem.width, stream=own.child("warm"), batch_size=256
        )
        return drawn.select(slice(0, 2 * judging.warm))

    def implicit(samples: Samples) -> Tensor:
        assert samples.log_q is not None and samples.log_ref is not None
        return beta_pi * (samples.log_q - samples.log_ref).sum(1)

    rows = problem.texts or partial(as_rows, tokenizer=problem.tokenizer, eos_ids=problem.reference.eos_ids)
    return JudgedBy(
        found, stores.judge, problem.target.reward, rows,
        implicit if judging.kind == "self" else None, begin if judging.warm else None, judging.monitor,
        tell,
    )  # fmt: skip


def _maker(
    problem: Problem, method: Method, learner: Learner, feed: Feed, scene: Scene, n: int, drawer: Drawer | None
) -> Callable[[Stream], Any]:
    """stream -> the rows of a step."""
    live = source_of(problem.facts, method, feed) == "live"
    policy: Any = learner.policy
    model = feed.draw.of(policy if live else problem.reference) if drawer is None else policy
    by_reference = not live and feed.draw.exact

    def drawn(own: Stream, each: int) -> Samples:
        prompts = ranks.from_first(lambda: scene(own.child("conditions"))[0])
        return draw_shared(model, prompts, scored, drawer, n=each, max_new_tokens=problem.width, stream=own)

    def scored(some: Samples) -> Samples:
        some = some.with_(log_ref=some.log_q) if by_reference else referenced(some, problem.reference)
        return some if feed.judge.kind != "none" else problem.target.scored(some)

    def answers(own: Stream) -> Any:
        return ranks.from_first(lambda: scene(own)[1])

    def pairs(own: Stream) -> Pairs:
        return by_coin(drawn(own, 2 * n), n, own.child("coin"))

    makers: dict[str, Callable[[Stream], Any]] = {
        "answers": answers,
        "values": lambda own: drawn(own, n),
        "live": lambda own: drawn(own, n),
        "groups": lambda own: Groups(drawn(own, n * feed.size), feed.size),
        "pairs": pairs,
        "judged": lambda own: judged(pairs(own)),
    }
    return makers[method.fed]


def by_coin(drawn: Samples, n: int, coin: Stream) -> Pairs:
    """2n scored draws a prompt as n pairs, the winner by a Bradley–Terry coin of the reward: P(first) = σ(r_1 − r_2)."""
    assert drawn.reward is not None
    reward = drawn.reward.reshape(-1, 2, n)
    gap = (reward[:, 0] - reward[:, 1]).flatten()
    first = coin.uniform(range(len(gap)), 1)[:, 0].to(gap.device) < logsigmoid(gap.double()).exp()
    block = torch.arange(len(reward), device=gap.device)[:, None] * 2 * n
    a = (block + torch.arange(n, device=gap.device)).flatten()
    return Pairs(drawn.select(torch.where(first, a, a + n)), drawn.select(torch.where(first, a + n, a)))
