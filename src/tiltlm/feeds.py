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

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.nn.functional import logsigmoid

from tiltlm.experience import Experience, Generated, Live, Offline, Subsets, referenced
from tiltlm.fit import Fit
from tiltlm.groups import Groups, all_pairs, as_groups, best_and_worst
from tiltlm.method import Learner, Lesson, Method
from tiltlm.problem import Facts, Fed, Problem, Source, Split
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.scenes import OnePrompt, Pool, Scene
from tiltlm.samples import Pairs, Samples
from tiltlm.seeds import Stream
from tiltlm.settings import SPEED, at_least_one
from tiltlm.twists.draws import TwistDraws
from tiltlm.twists.learned import LearnedTwist
from tiltlm.twists.objective import TwistMethod


@dataclass(frozen=True)
class Draws:
    """Completions of the reference that are stored and labelled."""

    n: int = 4
    """Of every prompt."""

    prompts: int = 0
    """Training prompts that are answered (0: all)."""

    batch_size: int = field(default=64, metadata=SPEED)
    """Rows drawn at once."""

    def __post_init__(self) -> None:
        at_least_one(self, "n", "batch_size")
        if self.prompts < 0:
            raise ValueError(f"prompts of Draws must be 1 or more, or 0 for all; got {self.prompts}")


@dataclass(frozen=True)
class Feed:
    """What a policy or a value learns from."""

    source: Literal["task", "own", "stored", "fresh", "live"] = "task"
    """The data's own rows, stored draws of the reference, fresh ones at every step, the policy's own at every step; task:
    what the method names (online ones: live), or else what the task takes first."""

    draws: Draws = Draws()
    size: int = 2
    """Completions of a prompt that meet in a group (of stored ones others at every step), or that pairs are made of."""

    pairing: Literal["best-worst", "all"] = "best-worst"
    """Pairs of stored draws: the best and the worst of the first `size`, or every two; ties are left out."""

    n: int = 0
    """Draws of each prompt in a step, live or fresh, of several (0: 4; of one prompt, all of the batch)."""

    def __post_init__(self) -> None:
        if self.size < 2 or self.n < 0:
            raise ValueError(f"a group has two completions or more, and n is not negative; got {self}")


@dataclass(frozen=True)
class TwistFeed:
    """What a twist learns from. (Its batch is its particles: fit.batch-size does nothing.)"""

    particles: int = 100
    """Draws per prompt and step."""

    prompts: int = 1
    """Prompts (conditions) a step."""

    positives: Literal["particles", "exact", "csmc"] = "particles"
    """What stands for pi*: the draws by their weights, exact draws, or conditional SMC around one exact draw."""

    supply: Literal["fresh", "stored"] = "fresh"
    """Where exact draws come from: a fresh search at every step, or the stored ones (over-fits)."""

    drawn_by: Literal["q", "reference", "mixed", "resampled", "exact"] = "q"
    """Who draws: the twist-induced proposal, the reference, half of each, q resampled, or exact draws."""

    tempered: float = 1.0
    """Power of the twist while drawing."""

    prefixes: bool = False
    """FUDGE: half of the prefixes from exact draws, labelled by fresh rollouts (the original's bce_psigma)."""

    @property
    def wants_exact(self) -> bool:
        """Whether its steps take exact draws of pi*."""
        return self.positives != "particles" or self.drawn_by == "exact"

    def __post_init__(self) -> None:
        at_least_one(self, "particles", "prompts")
        if not 0 <= self.tempered < math.inf:
            raise ValueError(f"tempered is a power, 0 or more; got {self.tempered}")
        if self.drawn_by == "mixed" and self.particles % 2:
            raise ValueError(f"mixed draws are half q's, half the reference's: not of {self.particles} particles")
        if self.supply == "stored" and not self.wants_exact:
            raise ValueError("supply says where exact draws come from: set positives to exact or csmc as well")
        if self.prefixes and self.positives == "particles":
            raise ValueError(
                "`prefixes` are those of exact draws: set positives to exact or csmc as well; got positives particles"
            )


AnyFeed = Feed | TwistFeed


@dataclass(frozen=True)
class Stores:
    """What other runs have stored for this one: labelled groups of a split, exact draws to train on; and how rows get the
    reference's log-probabilities (samples, split) -> samples."""

    groups: Callable[[Split], Groups] | None = None
    exact: Callable[[], Samples] | None = None
    refer: Callable[[Samples, Split], Samples] | None = None


# ---- what can be fed ------------------------------------------------------------------------------------------


def owned(facts: Facts, fed: Fed) -> bool:
    """Whether the data holds it, or what it can be made of."""
    made_of: dict[Fed, set[Fed]] = {
        "judged": {"judged", "pairs", "groups"}, "groups": {"groups", "pairs"}, "pairs": {"pairs", "groups"}
    }  # fmt: skip
    return bool(made_of.get(fed, {fed}) & facts.owns)


NEW: tuple[Source, ...] = ("fresh", "live")
"""Rows that are drawn at every step."""


def source_of(facts: Facts, method: Method, feed: AnyFeed) -> Source:
    """Where the rows come from."""
    fed = method.fed
    if fed == "live":
        return "live"
    if isinstance(feed, TwistFeed) or fed in ("draws", "nothing"):
        return "fresh"
    if feed.source != "task":
        return feed.source
    if method.source is not None:
        return method.source
    if fed == "answers":
        return "own" if owned(facts, fed) else "fresh"
    if facts.source == "own":
        return "own" if owned(facts, fed) else "fresh"
    return facts.source


def why_not(facts: Facts, method: Method, feed: AnyFeed) -> str | None:
    """Why such a problem cannot feed the method so, or None."""
    fed = method.fed
    if isinstance(feed, TwistFeed):
        return _why_no_twist(facts, feed) or _unheeded(method, feed)
    source = source_of(facts, method, feed)
    if fed == "live" and feed.source not in ("task", "live"):
        return f"it learns from the policy's own draws, and from no others: leave --feed.source {feed.source} out"
    if source == "live" and fed in ("answers", "values"):
        of = "answers of pi* or the data" if fed == "answers" else "draws of the reference"
        return f"it learns from {of}, not from the policy's own: --feed.source task"
    if 0 < feed.n < method.least and facts.prompts != "one":
        return f"its baseline wants {method.least} draws of a prompt in a step or more: --feed.n {method.least}"
    if feed.n and source in NEW and facts.prompts == "one":
        return "there is one prompt, and a step's batch is all of it: --feed.n does nothing, set --fit.batch-size"
    if source == "own" and not owned(facts, fed):
        holds = ", ".join(sorted(facts.owns)) or "nothing of its own"
        return f"it learns from {fed}, and the data holds {holds}: take --feed.source stored or fresh"
    if source == "stored" and facts.prompts != "several":
        return "stored draws are for many prompts; here fresh ones cost the same: --feed.source fresh"
    if source == "stored" and fed == "answers":
        return "answers to imitate are the data's own, or fresh exact draws: --feed.source own or fresh"
    if source == "stored" and fed in ("groups", "pairs", "judged") and feed.size > feed.draws.n:
        wanted = f"groups of {feed.size} (--feed.size) want as many draws of a prompt"
        return f"{wanted}, and {feed.draws.n} are stored: --feed.draws.n {feed.size}"
    if source == "fresh" and fed == "answers":
        why = facts.no_exact_draws()
        return None if why is None else f"it imitates exact draws of pi*, and {why}"
    return None


def _why_no_twist(facts: Facts, feed: TwistFeed) -> str | None:
    if feed.supply == "stored" and facts.prompts != "one":
        return "stored exact draws (--feed.supply stored) are of one prompt; leave supply at fresh"
    if feed.prefixes and not facts.network:
        return "a table's prompts are numbers, and nothing can be drawn behind a prefix: leave --feed.prefixes out"
    return facts.no_exact_draws() if feed.wants_exact else None


def _unheeded(method: Method, feed: TwistFeed) -> str | None:
    """What the feed asks for and the method would not look at, or None."""
    plain = isinstance(method, TwistMethod) and method.plain
    if not plain:
        return (
            "prefixes with labels of their own are FUDGE's: leave --feed.prefixes out" if feed.prefixes else None
        )
    if feed.drawn_by != "q" or feed.tempered != 1:
        return (
            "FUDGE draws from the reference, and its psi is a probability: leave --feed.drawn-by and --feed.tempered out; "
            f"got drawn-by {feed.drawn_by}, tempered {feed.tempered:g}"
        )
    if feed.prefixes != (feed.positives != "particles"):
        return (
            "FUDGE learns from draws of the reference, and with prefixes from exact ones too: set prefixes and positives "
            f"together; got prefixes {feed.prefixes}, positives {feed.positives}"
        )
    return None


# ---- fixed rows -----------------------------------------------------------------------------------------------

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
    return _as_wanted(method, found, Lesson(problem, learner, OnePrompt(problem.prompts["test"]), 1, order))


def _as_wanted(method: Method, found: Experience, lesson: Lesson) -> Experience:
    wanted: Experience = method.experience(found, lesson)
    return wanted


# ---- the experience -------------------------------------------------------------------------------------------


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
        return Course(_twist(problem, method, learner, feed, called, stores), fit.of(None), None)
    if source_of(problem.facts, method, feed) in NEW:
        return Course(_new(problem, method, learner, feed, fit, called), fit.of(None), None)
    data = rows_of(problem, method, feed, stores, "train", tell)
    if not len(data):
        raise ValueError("nothing to learn from: every group is tied, the reward does not tell completions apart")
    how, said = fit.of(len(data)), method.about(data)
    if said:
        tell(said)
    return Course(fixed(problem, method, learner, feed, data, how.batch_size, called), how, len(data))


def unshared(facts: Facts, feed: Feed, batch_size: int) -> str | None:
    """Why a batch of new rows cannot be shared out among prompts, or None."""
    if facts.prompts == "one" or feed.n <= batch_size:
        return None
    return f"{feed.n} draws of a prompt (--feed.n) do not fit a batch of {batch_size} (--fit.batch-size)"


def shares(facts: Facts, feed: Feed, batch_size: int) -> tuple[int, int]:
    """(prompts of a step, rows of each): the batch shared out. Raises ValueError where it cannot be."""
    if facts.prompts == "one":
        return 1, batch_size
    why, n = unshared(facts, feed, batch_size), feed.n or min(4, batch_size)
    if why is not None:
        raise ValueError(why)
    return batch_size // n, n


def _new(problem: Problem, method: Method, learner: Learner, feed: Feed, fit: Fit, called: str) -> Experience:
    """Rows that are new at every step."""
    count, n = shares(problem.facts, feed, fit.batch_size)
    several = problem.facts.prompts == "several"
    if several:
        count = min(count, len(problem.prompts["train"]))
    own = problem.stream.child(called, "data" if several and method.fed == "live" else "draws")
    scene = problem.scene(count, n if method.fed == "answers" else None)
    found: Experience
    if method.fed == "live" and problem.fresh is None:
        assert learner.policy is not None
        found = Live(
            learner.policy, problem.target.reward, problem.prompts["train"], count, problem.width, own, n,
            problem.reference if method.wants_reference else None,
        )  # fmt: skip
    else:
        found = Generated(_maker(problem, method, learner, feed, scene, n), own)
    return _as_wanted(method, found, Lesson(problem, learner, scene, n, own))


def _maker(
    problem: Problem, method: Method, learner: Learner, feed: Feed, scene: Scene, n: int
) -> Callable[[Stream], Any]:
    """stream -> the rows of a step."""
    live = source_of(problem.facts, method, feed) == "live"
    model: Any = learner.policy if live else problem.reference

    def drawn(own: Stream, each: int) -> Samples:
        prompts = scene(own.child("conditions"))[0]
        some = draw(model, prompts, n=each, max_new_tokens=problem.width, stream=own)
        return problem.target.scored(some.with_(log_ref=some.log_q) if model is problem.reference else some)

    def answers(own: Stream) -> Any:
        return scene(own)[1]

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


def _twist(
    problem: Problem, method: Method, learner: Learner, feed: TwistFeed, called: str, stores: Stores
) -> TwistDraws:
    objective: Any = method.objective(problem)
    assert learner.values is not None
    n = (1 if feed.positives == "csmc" else feed.particles) if feed.wants_exact else None
    scene = problem.scene(feed.prompts, n)
    if feed.supply == "stored" and n is not None:
        assert stores.exact is not None
        scene = OnePrompt(problem.prompts["train"], Pool(stores.exact().to(problem.device), n))
    return TwistDraws(
        problem.target, LearnedTwist(learner.values, objective.squashed), scene, problem.width,
        problem.stream.child(called, "draws"),
        objective.needs if feed.positives == "particles" else objective.needs_beside_positives,
        feed.particles, feed.positives, feed.drawn_by, tempered=feed.tempered, induced=objective.induced,
        backups=objective.backups, prefixes=feed.prefixes,
    )  # fmt: skip


def default_feed(method: Method, facts: Facts) -> AnyFeed:
    """The feed of a method's kind with its defaults: of many prompts a few a step, with fewer particles each."""
    if method.fed != "draws":
        several = facts.prompts != "one"
        return Feed(n=1) if method.source == "live" and several else Feed()
    return replace(TwistFeed(), prompts=4, particles=24) if facts.prompts == "several" else TwistFeed()
