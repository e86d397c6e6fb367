"""DAPO: clip-higher, one token denominator, groups of equal reward drawn again, no pull (Yu et al. 2025, arXiv:2503.14476).

    L = Σ max(−A·ρ, −A·clip(ρ, 1 − low, 1 + high)) over the batch's tokens, / their number      (eq. 8)
    A_i = (R_i − mean(R)) / std(R),      ρ = p/q,      low 0.2, high 0.28

A group whose rewards are all equal has A = 0. Such groups make place for others: the batch is drawn again, of other
prompts where there are any, until it is full of groups that tell answers apart. After `redraws` tries what is missing is
filled with equal groups: a batch never shrinks.

`overlong` punish is the paper's soft punishment (eq. 13): R = r up to (1 − margin)·L tokens, from there linearly down to
r − 1 at the longest answer, L. mask: rows that were cut off carry no gradient (the paper's overlong filtering); their
tokens still count below the fraction line, so that no batch is empty.

The paper has 16 updates on each batch of draws, each on a part of it; here `passes` go over the whole. It punishes; the
default here keeps rewards as they are, since its 1 is meant for rewards of ±1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tiltlm.clipped import (
    Clipped,
    Graded,
    Pull,
    beyond,
    checked,
    clipped_loss,
    graded,
    passed,
    pulled,
    returns_of,
    tied_rows,
    truncated,
    watched,
)
from tiltlm.experience import Around, Redrawable
from tiltlm.method import Lesson, Method
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Objective, Outcome
from tiltlm.problem import Problem
from tiltlm.samples import Samples, cat_samples


def overlong_punishment(lengths: Tensor, longest: int, margin: float) -> Tensor:
    """0 up to (1 − margin)·longest tokens, then linearly down to −1 at `longest` and beyond, float64 [n]."""
    room = margin * longest
    return ((longest - room - lengths.double()) / room).clamp(-1.0, 0.0)


@dataclass(frozen=True)
class Redrawn:
    """A batch, how often it was drawn again, and how many groups of equal reward were left out."""

    samples: Samples
    redraws: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Untied(Around):
    """Live draws whose groups of equal reward are drawn again, `tries` times at most; always as many groups."""

    experience: Redrawable
    tries: int

    def batch(self, step: int) -> Redrawn:
        first: Samples = self.experience.batch(step)
        wanted, tied = len(first.prompt_index.unique()), _tied(first)
        kept, equal, again = [first.select(~tied)], first.select(tied), 0
        dropped = missing = wanted - _groups(kept)
        while missing and again < self.tries:
            again += 1
            more: Samples = self.experience.batch(step, again)
            dropped += _groups([more.select(_tied(more))])
            kept.append(_first_groups(more.select(~_tied(more) & ~_answered(more, kept)), missing))
            missing = wanted - _groups(kept)
        if missing:
            kept.append(_first_groups(equal.select(~_answered(equal, kept)), missing))
        return Redrawn(cat_samples([part for part in kept if len(part)]), again, dropped - missing)


def _tied(samples: Samples) -> Tensor:
    """Whether a row's group has one reward only, bool [n]."""
    if samples.reward is None:
        raise ValueError("these samples have no reward: score them first")
    return tied_rows(samples.reward, samples.prompt_index)


def _groups(parts: list[Samples]) -> int:
    return sum(len(part.prompt_index.unique()) for part in parts)


def _answered(samples: Samples, kept: list[Samples]) -> Tensor:
    """Whether a row's prompt has a group in `kept` already, bool [n]: two groups of one prompt would be taken for one."""
    mine = [part.prompt_index for part in kept if part.prompts is samples.prompts]
    return torch.isin(samples.prompt_index, torch.cat([samples.prompt_index[:0], *mine]))


def _first_groups(samples: Samples, count: int) -> Samples:
    return samples.select(torch.isin(samples.prompt_index, samples.prompt_index.unique()[:count]))


@dataclass(frozen=True)
class DAPO(Clipped):
    """The published settings, without the soft punishment."""

    beta: float | None = None
    """Strength of the pull towards the reference (None: the target's temperature)."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    std: bool = True
    """Divide advantages by their group's standard deviation."""

    kl: Pull = "none"
    """Where the pull goes: k3 in the loss, −beta·(log q − log pi_ref) in the reward, or nowhere."""

    redraws: int = 10
    """How often a batch is drawn again at most for groups of equal reward (0: they stay)."""

    overlong: Literal["keep", "mask", "punish"] = "keep"
    """Answers that are too long: as they come, without gradient where they were cut off, or paid less."""

    longest: int = 0
    """The longest answer, in tokens, for `overlong` punish (0: the task's)."""

    margin: float = 0.2
    """The part of `longest` along which the punishment grows from 0 to 1 (the paper's 4096 of 20480 tokens)."""

    passes: int = 4
    """Updates per batch of draws."""

    truncate: float | None = None
    """Rows of another engine or precision: weigh tokens by min(p/q, truncate) (None: q is taken at its word)."""

    optimum: ClassVar[str] = "biased: with no pull the best answers alone; with it in the reward pi*"

    def __post_init__(self) -> None:
        clips = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        checked(self.kl, self.beta, self.passes, self.truncate, **clips)
        if self.overlong not in ("keep", "mask", "punish"):
            raise ValueError(f"overlong is keep, mask or punish; got {self.overlong!r}")
        if self.redraws < 0 or self.longest < 0 or not 0 < self.margin <= 1:
            raise ValueError(f"redraws and longest must not be negative, margin within (0, 1]; got {self}")

    def objective(self, problem: Problem) -> Objective:
        return replace(self.bound(problem.beta), longest=self.longest or problem.width)

    def experience(self, experience: Redrawable, lesson: Lesson) -> Any:
        """`experience` with its groups of equal reward drawn again."""
        return Untied(experience, self.redraws) if self.redraws else experience

    def prepare(self, batch: Samples | Redrawn) -> Graded:
        drawn = batch if isinstance(batch, Redrawn) else Redrawn(batch)
        samples = drawn.samples
        counts = {"redraws": drawn.redraws, "dropped": drawn.dropped}
        returns = returns_of(samples, self.kl, self.beta)
        more = {name: torch.full_like(returns, count) for name, count in counts.items()}
        return graded(samples, returns + self.punishment(samples).to(returns), self.std, more)

    def punishment(self, samples: Samples) -> Tensor:
        """What too long an answer costs, [n]: 0 unless `overlong` is punish."""
        lengths = samples.mask.sum(1)
        if self.overlong != "punish":
            return torch.zeros_like(lengths)
        if not self.longest:
            raise ValueError("overlong answers are punished by the longest there can be: set longest, in tokens")
        return overlong_punishment(lengths, self.longest, self.margin)

    def weight(self, batch: Graded) -> Tensor:
        return batch.samples.mask.sum(1)

    def loss(self, model: LanguageModel, batch: Graded) -> Outcome:
        seen, advantage = passed(model, batch, self.truncate), batch.advantage[:, None]
        ratio, finished = seen.log_ratio.exp(), batch.samples.finished
        step = clipped_loss(ratio, advantage, self.clip_low, self.clip_high)
        step = truncated(seen.log_drift, self.truncate) * step
        loss = seen.sum(step + pulled(seen, batch.samples, self.kl, self.beta))
        if self.overlong == "mask" and finished is not None:
            loss = torch.where(finished, loss, 0.0)
        out = beyond(ratio, advantage, self.clip_low, self.clip_high)
        return Outcome(loss, watched(batch, seen, seen.mean(ratio), seen.mean(out.to(ratio))))


NAMES: dict[str, str] = {"dapo": "DAPO: GRPO, tied groups drawn again, no pull"}
METHODS: dict[str, Method] = {"dapo": DAPO()}
