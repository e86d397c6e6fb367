"""A cell of the matrix: one method with its settings, for a task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tiltlm.feeds import NEW, AnyFeed, Feed, TwistFeed, default_feed, source_of, unshared, why_not
from tiltlm.fit import Fit
from tiltlm.method import Method
from tiltlm.models.scattered import is_wanted
from tiltlm.nets import Net
from tiltlm.problem import Facts


@dataclass(frozen=True)
class Cell:
    """A method, what it is fed with, how it is trained, and what network is."""

    method: Any
    feed: Any = Feed()
    fit: Fit = Fit()
    net: Net = Net()

    def why_not(self, facts: Facts) -> str | None:
        """Why this cell makes no sense for such a problem, or None."""
        method: Method = self.method
        trained = method.trained()
        if trained.trains == "nothing":
            return method.why_not(facts)
        return (
            method.why_not(facts)
            or (trained.why_not(facts) if trained is not method else None)
            or why_not(facts, trained, self.feed)
            or self.net.why_not(trained, facts)
            or self._no_head(facts)
            or self._unwatched(facts)
            or self._undivided(facts)
            or self._batch(facts)
        )

    def counted(self, facts: Facts) -> Cell:
        """This cell with those settings at their defaults that, beside its others, do not matter."""
        feed = self.feed
        if not isinstance(feed, Feed) or source_of(facts, self.method.trained(), feed) == "live":
            return self
        return replace(self, feed=replace(feed, draw=feed.draw.still))

    def files(self) -> list[str]:
        """Files and folders that settings name and whose content decides the result."""
        return [*self.method.files(), *self.feed.files(), *self.net.files()]

    def _no_head(self, facts: Facts) -> str | None:
        """Why a head on the reference cannot be the policy here, or None."""
        trained, feed = self.method.trained(), self.feed
        if self.net.policy != "head" or trained.trains != "policy" or not facts.network:
            return None
        own = isinstance(feed, Feed) and source_of(facts, trained, feed) in ("live", "rounds")
        if own and not feed.draw.exact:
            asked = "--feed.draw.url" if feed.draw.url else "--feed.draw.precision"
            return f"a server and bfloat16 draw from a whole model, and a head is none: leave {asked} out"
        if (self.fit.shard or is_wanted()) and self.net.judges == "last":
            return (
                "a head that reads tokens runs its body along every row, as often as rows are long, which differs between "
                "processes: leave --shard and --fit.shard off, or take --net.judges next"
            )
        return None

    def _undivided(self, facts: Facts) -> str | None:
        """Why the weights cannot be held in parts, where they are to be."""
        if self.fit.shard and not facts.network:
            return "--fit.shard divides networks of layers, and here tables are trained: leave it off"
        return None

    def _unwatched(self, facts: Facts) -> str | None:
        if self.fit.evaluations and isinstance(self.feed, Feed) and self.feed.source == "rounds":
            return "a round is validated at its end, not on the way: --fit.evaluations 0"
        if self.fit.evaluations and not facts.held_out:
            return "there are no held-out prompts to evaluate on while it trains: --fit.evaluations 0"
        return None

    def _batch(self, facts: Facts) -> str | None:
        size, feed, trained = self.fit.batch_size, self.feed, self.method.trained()
        fresh = source_of(facts, trained, feed) in NEW
        if fresh and self.fit.epochs:
            return "epochs count passes over fixed data, and here every batch is new: --fit.epochs 0, and set --fit.steps"
        if isinstance(feed, TwistFeed):
            if size == Fit().batch_size:
                return None
            its = "a twist's batch is its particles (--feed.particles) times its prompts (--feed.prompts)"
            return f"{its}; --fit.batch-size {size} does nothing: leave it out"
        least = trained.least
        if fresh and size < least:
            return f"its baseline wants {least} draws of a prompt in a step or more: --fit.batch-size {least}"
        return unshared(facts, feed, size) if fresh else None

    def depends_on_beta(self, facts: Facts) -> bool:
        """Whether training needs the target's temperature, beyond what the method's own settings say of it."""
        trained = self.method.trained()
        if trained.fed == "draws" or self.fit.evaluations:
            return True
        return trained.fed == "answers" and source_of(facts, trained, self.feed) == "fresh"


def default_cell(method: Method, facts: Facts) -> Cell:
    """A method's settings for a problem that no paper has settings for."""
    trained = method.trained()
    net = Net(policy="head") if facts.conditioned and trained.trains == "policy" else Net()
    if trained.trains in ("twist", "value"):
        fit = Fit(lr=1e-3, clip=0.0, decay="none", steps=128, batch_size=64 if trained.fed == "draws" else 100)
    else:
        fit = Fit(lr=1e-4, steps=128, batch_size=100)
    if not facts.network:  # the numbers of a table are its parameters: they take larger steps
        fit = replace(fit, lr=0.03, decay="cosine", steps=500)
    feed: AnyFeed = default_feed(trained, facts)
    if isinstance(feed, Feed) and facts.conditioned and trained.source != "live":
        feed = replace(feed, n=1 if trained.least == 1 else 4)
    return Cell(method, feed, fit, net)
