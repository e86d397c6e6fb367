"""Who draws, who scores: where a training step's batch comes from.

An experience answers `batch(step)` and depends on nothing but the step number, its own stream and (if it draws
live) the policy's weights. So it has no position to save: after an interruption, the same step gives the same
batch. (One in which a judge learns `Keeps` what that has learnt.)

    Offline     rows of fixed data, reshuffled every epoch
    Once        rows of fixed data, each of them once
    Generated   fresh rows made for every step
    Live        completions drawn by the policy being trained, scored as they come
    FromFirst   another experience's batches, made by the first of several processes for all
    Referenced  pairs, with a live reference's log-probabilities filled in
    Subsets     groups, cut to a random few of their rows
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tiltlm import ranks
from tiltlm.groups import Groups
from tiltlm.models.base import LanguageModel
from tiltlm.samplers.serving import Drawer
from tiltlm.samplers.shared import draw_shared
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.target import Reward


class Experience(Protocol):
    """Answers with the batch of a training step."""

    def batch(self, step: int) -> Any:
        """The batch of step 0, 1, 2, …"""


@runtime_checkable
class Keeps(Protocol):
    """An experience that something of its own learns in (a judge): a checkpoint holds that too.

    All of several processes come to `save` and `restore`, with the same folder.
    """

    def batch(self, step: int) -> Any: ...

    def numbers(self) -> dict[str, float]:
        """What is to be logged beside the step's metrics."""

    def save(self, folder: Path) -> None:
        """Write everything that later batches depend on to a new folder."""

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote."""


@dataclass(frozen=True)
class Around:
    """What adds something to another experience's batches: a checkpoint holds what that one keeps, if it does."""

    experience: Experience

    def numbers(self) -> dict[str, float]:
        return self.experience.numbers() if isinstance(self.experience, Keeps) else {}

    def save(self, folder: Path) -> None:
        if isinstance(self.experience, Keeps):
            self.experience.save(folder)

    def restore(self, folder: Path) -> None:
        if isinstance(self.experience, Keeps):
            self.experience.restore(folder)


class Redrawable(Experience, Protocol):
    """An experience that can draw a step's rows once more."""

    def batch(self, step: int, again: int = 0) -> Any:
        """The batch of a step; again = 1, 2, …: other draws for the same step, of a sub-stream of their own."""


def rows_of_step(size: int, batch_size: int, step: int, stream: Stream) -> Tensor:
    """Which of `size` rows step `step` uses: each epoch is one random order, cut into whole batches."""
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch size {batch_size} does not fit {size} rows of data (1 to {size})")
    epoch, place = divmod(step, size // batch_size)
    return _order(stream.child("epoch", epoch), size)[place * batch_size : (place + 1) * batch_size].clone()


@lru_cache(maxsize=4)
def _order(stream: Stream, size: int) -> Tensor:
    """An epoch's order: kept, so that a step does not shuffle all rows to take its own."""
    return stream.permutation(size)


@dataclass(frozen=True)
class Offline:
    """Fixed rows (Samples, Pairs): `batch_size` a step, every epoch in a new order."""

    data: Any
    batch_size: int
    stream: Stream

    def batch(self, step: int) -> Any:
        return self.data.select(rows_of_step(len(self.data), self.batch_size, step, self.stream))


@dataclass(frozen=True)
class Once:
    """Fixed rows (Samples, Pairs), each once: in a random order, cut as evenly as can be, `batch_size` a step at most."""

    data: Any
    batch_size: int
    stream: Stream

    @property
    def steps(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def batch(self, step: int) -> Any:
        """Raises IndexError behind the last row."""
        if not 0 <= step < self.steps:
            raise IndexError(
                f"{len(self.data)} rows make {self.steps} batches of {self.batch_size}; there is no batch {step}"
            )
        begin, end = (k * len(self.data) // self.steps for k in (step, step + 1))
        return self.data.select(self.stream.permutation(len(self.data))[begin:end])


def is_fixed(experience: Experience) -> bool:
    """Whether its batches are rows that are there already: no network is asked for them."""
    inner = experience.experience if isinstance(experience, Subsets) else experience
    return isinstance(inner, Offline | Once)


@dataclass(frozen=True)
class Generated:
    """Fresh rows for every step: `make(stream)` builds a batch from a stream of its own."""

    make: Callable[[Stream], Any]
    stream: Stream

    def batch(self, step: int, again: int = 0) -> Any:
        return self.make(_once_more(self.stream.child(step), again))


def _once_more(stream: Stream, again: int) -> Stream:
    return stream.child("again", again) if again else stream


@dataclass(frozen=True)
class Live:
    """`n` completions by `policy` of `batch_size` prompts a step, scored by `reward` and `reference`, where given.

    drawer: what draws in the policy's place (None: the policy itself, in this process).
    `prompt_index` of a batch counts within all `prompts`, so a reward that knows its prompts stays aligned.
    """

    policy: LanguageModel
    reward: Reward | None
    prompts: Tokens
    batch_size: int
    max_new_tokens: int
    stream: Stream
    n: int = 1
    reference: LanguageModel | None = None
    drawer: Drawer | None = None

    def batch(self, step: int, again: int = 0) -> Samples:
        order = _once_more(self.stream.child("prompts"), again)
        chosen = rows_of_step(len(self.prompts), self.batch_size, step, order)
        chosen = chosen.to(self.prompts.device)

        def scored(drawn: Samples) -> Samples:
            samples = replace(drawn, prompts=self.prompts, prompt_index=chosen[drawn.prompt_index])
            samples = samples if self.reward is None else samples.with_(reward=self.reward(samples))
            return samples if self.reference is None else referenced(samples, self.reference)

        return draw_shared(
            self.policy, self.prompts.select(chosen), scored, self.drawer, n=self.n, max_new_tokens=self.max_new_tokens,
            stream=_once_more(self.stream.child("draw", step), again),
        )  # fmt: skip


@dataclass(frozen=True)
class FromFirst:
    """Another experience's batches: of several processes the first one makes them (where a reward is paid, say), and all
    get the same."""

    experience: Experience

    def batch(self, step: int) -> Any:
        return ranks.from_first(lambda: self.experience.batch(step))


@torch.no_grad()
def referenced(samples: Samples, reference: LanguageModel) -> Samples:
    """`samples` with the reference's log-probability of every token."""
    return samples.with_(log_ref=reference.log_prob(samples))


def referenced_pairs(pairs: Pairs, reference: LanguageModel, batch_size: int = 256) -> Pairs:
    """`pairs` with the reference's log-probability of every token: once, before training starts."""
    starts = range(0, len(pairs), batch_size)
    parts = [_referenced_pairs(pairs.select(slice(b, b + batch_size)), reference) for b in starts]
    chosen, rejected = (torch.cat(side) for side in zip(*parts, strict=True))
    return Pairs(pairs.chosen.with_(log_ref=chosen), pairs.rejected.with_(log_ref=rejected))


@torch.no_grad()
def _referenced_pairs(pairs: Pairs, reference: LanguageModel) -> tuple[Tensor, Tensor]:
    log_ref = reference.log_prob(pairs.both())
    widths = pairs.chosen.tokens.shape[1], pairs.rejected.tokens.shape[1]
    return log_ref[: len(pairs), : widths[0]], log_ref[len(pairs) :, : widths[1]]


@dataclass(frozen=True)
class Referenced:
    """Another experience's batches of pairs, referenced as they come by a live reference."""

    experience: Experience
    reference: LanguageModel

    def batch(self, step: int) -> Pairs:
        pairs = self.experience.batch(step)
        return referenced_pairs(pairs, self.reference, len(pairs))


@dataclass(frozen=True)
class Subsets:
    """Another experience's batches of groups, cut to a random `size` rows each: other ones at every step."""

    experience: Experience
    size: int
    stream: Stream

    def batch(self, step: int) -> Groups:
        groups: Groups = self.experience.batch(step)
        return groups.subsets(self.size, self.stream.child(step))
