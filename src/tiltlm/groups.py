"""`Groups`: K completions of every prompt, side by side. A preference pair is a group of two that knows its winner.

Rows g·K … g·K + K − 1 of `samples` answer one prompt; what a method wants of them ([G, K] rewards, log-ratios) is a
reshape away. A group has its K rows in any order: nothing here depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.samples import Pairs, Samples
from tiltlm.seeds import Stream


@dataclass(frozen=True)
class Groups:
    """`samples` [G·K rows], `size` K ≥ 2 of them to a group, all of a group answering one prompt.

    preferred: float [G], in groups of two: 1 where somebody said that the first row is better, 0 the second, NaN where
    nobody was asked or they tied; a verdict overrides what the rewards say. None: nobody was asked of any.
    """

    samples: Samples
    size: int
    preferred: Tensor | None = None

    def __post_init__(self) -> None:
        if self.size < 2 or len(self.samples) % self.size:
            raise ValueError(
                f"groups need 2 rows or more each; got {len(self.samples)} rows in groups of {self.size}"
            )
        index = self.samples.prompt_index.reshape(-1, self.size)
        if bool((index != index[:, :1]).any()):
            mixed = int((index != index[:, :1]).any(1).nonzero()[0])
            raise ValueError(
                f"the rows of a group must answer one prompt; group {mixed} answers {index[mixed].tolist()}"
            )
        if self.preferred is not None and (self.size != 2 or self.preferred.shape != (len(self),)):
            raise ValueError(
                f"`preferred` is a verdict on each of {len(self)} groups of two; got {list(self.preferred.shape)} in "
                f"groups of {self.size}"
            )

    def __len__(self) -> int:
        return len(self.samples) // self.size

    @property
    def reward(self) -> Tensor:
        """The rewards, [G, K]. Raises ValueError where there are none."""
        if self.samples.reward is None:
            raise ValueError("these groups have no reward: label them first (`tiltlm score`)")
        return self.samples.reward.reshape(-1, self.size)

    def select(self, index: Tensor | slice) -> Groups:
        """The groups at `index`."""
        first = torch.arange(len(self), device=self.samples.device)[index] * self.size
        rows = first[:, None] + torch.arange(self.size, device=first.device)
        preferred = None if self.preferred is None else self.preferred[index]
        return Groups(self.samples.select(rows.flatten()), self.size, preferred)

    def to(self, device: torch.device | str) -> Groups:
        preferred = None if self.preferred is None else self.preferred.to(device)
        return Groups(self.samples.to(device), self.size, preferred)

    def subsets(self, size: int, stream: Stream) -> Groups:
        """A random `size` of every group's rows, drawn without replacement: group g's choice follows from g alone."""
        if not 2 <= size <= self.size:
            raise ValueError(f"subsets have 2 to {self.size} rows here; got {size}")
        if size == self.size:
            return self
        order = stream.uniform(torch.arange(len(self)), self.size).argsort(1)[:, :size].sort(1).values
        rows = torch.arange(len(self))[:, None] * self.size + order
        return Groups(self.samples.select(rows.flatten().to(self.samples.device)), size)


def best_and_worst(groups: Groups) -> tuple[Pairs, int]:
    """Every group's best row preferred to its worst, and how many groups were left out, all their rows being tied."""
    reward = groups.reward
    high, low = reward.max(1), reward.min(1)
    kept = (high.values > low.values).nonzero()[:, 0]
    rows = [kept * groups.size + side.indices[kept] for side in (high, low)]
    pairs = Pairs(groups.samples.select(rows[0]), groups.samples.select(rows[1]))
    return pairs, len(groups) - len(kept)


def extremes(groups: Groups) -> Groups:
    """Every group's best and worst row as a group of two, never one row twice; groups of two as they are."""
    if groups.size == 2:
        return groups
    order = groups.reward.sort(dim=1, descending=True, stable=True).indices[:, [0, -1]]
    base = torch.arange(len(groups), device=order.device)[:, None] * groups.size
    return Groups(groups.samples.select((base + order).flatten()), 2)


def all_pairs(groups: Groups) -> tuple[Pairs, int]:
    """Every two rows of a group of unlike reward, the better one chosen, and how many pairs tied and were left out."""
    first, second = torch.combinations(torch.arange(groups.size), 2).t().to(groups.samples.device)
    base = torch.arange(len(groups), device=first.device)[:, None] * groups.size
    a, b = (base + first).flatten(), (base + second).flatten()
    reward = groups.reward.flatten()
    gap = reward[a] - reward[b]
    chosen, rejected = torch.where(gap > 0, a, b), torch.where(gap > 0, b, a)
    kept = gap != 0
    pairs = Pairs(groups.samples.select(chosen[kept]), groups.samples.select(rejected[kept]))
    return pairs, int((~kept).sum())


def as_groups(pairs: Pairs, chosen: float = 1.0, rejected: float = 0.0) -> Groups:
    """Pairs as groups of two with the rewards `chosen` and `rejected`."""
    both, n = pairs.both(), len(pairs)
    device = both.device
    reward = torch.cat([torch.full((n,), chosen, device=device), torch.full((n,), rejected, device=device)])
    order = torch.stack([torch.arange(n), torch.arange(n) + n], 1).flatten().to(device)
    return Groups(both.with_(reward=reward).select(order), 2)
