"""What the twist objectives share: a batch of weighted rows, and a loss on log psi at the drawn tokens.

Every objective here is a sum over drawn prefixes, Σ_k Σ_t weight_{k,t} · f(log psi_t(y^k), goal_{k,t}), averaged
over prompts and tokens. Drawing happens without autograd; the weights are constants; one forward pass of the twist
gives log psi of every prefix with its gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tiltlm.method import Learner, Method, Trains
from tiltlm.models.base import Values
from tiltlm.objective import Outcome
from tiltlm.problem import Fed, Problem
from tiltlm.samplers.guided import Guided
from tiltlm.samples import Samples, cat_samples
from tiltlm.twists.learned import LearnedTwist

Need = Literal["proposal", "positives", "reference", "prefixes"]


@dataclass(frozen=True)
class Draws:
    """What one step's experience holds; every part answers the same prompts (conditions), P of them.

    proposal   rows drawn for importance weighting: log_q, log_ref, log_psi, reward and log_w towards pi*
    positives  rows that stand for pi*: equally weighted, or by their log_w. None: the proposal by its weights
    reference  rows drawn from pi_ref, with reward
    prefixes   [N, T] log phi of a fresh reference rollout behind every prefix of the positives (FUDGE)
    backups    [N, T] E_ref[log psi_t | y_<t] along the proposal (soft Q with mean backups)
    positive_backups   the same along the positives
    """

    prompts: int
    beta: float
    proposal: Samples | None = None
    positives: Samples | None = None
    reference: Samples | None = None
    prefixes: Tensor | None = None
    backups: Tensor | None = None
    positive_backups: Tensor | None = None

    def need(self, name: Need) -> Samples:
        """The part called `name`. Raises ValueError if the experience did not draw it."""
        part: Samples | None = vars(self)[name]
        if part is None:
            raise ValueError(f"this objective learns from {name!r}, which the experience did not draw")
        return part


@dataclass(frozen=True)
class Rows:
    """The batch of a twist's loss.

    weight [N, T]: of every prefix, with its sign; goal [N, T]: what log psi is held against, where a loss has such
    a thing. share [N]: the rows' part in the denominator, summing to the number of prompts.
    """

    samples: Samples
    weight: Tensor
    goal: Tensor
    share: Tensor
    notes: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, index: Tensor | slice) -> Rows:
        notes = {name: x[index] for name, x in self.notes.items()}
        return Rows(self.samples.select(index), self.weight[index], self.goal[index], self.share[index], notes)


def rows_of(samples: Samples, weight: Tensor, prompts: int, goal: Tensor | None = None) -> Rows:
    """Rows with their metrics; `weight` [N] counts for every token of a row, [N, T] for each by itself."""
    weight = weight[:, None].expand(samples.mask.shape) if weight.ndim == 1 else weight
    goal = torch.zeros_like(weight) if goal is None else goal
    goal = goal[:, None].expand(samples.mask.shape) if goal.ndim == 1 else goal
    notes = {name: x for name, x in (("reward", samples.reward), ("log_w", samples.log_w)) if x is not None}
    bare = samples.with_(log_q=None, log_ref=None, log_psi=None, log_w=None, reward=None)
    return Rows(bare, torch.where(samples.mask, weight, 0.0), goal, _share(samples, prompts), notes)


def cat_rows(first: Rows, second: Rows, prompts: int) -> Rows:
    """Both batches as one, of the same prompts; what only one notes is left out of the other's rows (NaN)."""
    samples = cat_samples([first.samples, second.samples])
    width, sizes = samples.tokens.shape[1], (len(first), len(second))

    def wide(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]))

    def noted(rows: Rows, name: str, size: int) -> Tensor:
        return rows.notes.get(name, torch.full((size,), torch.nan, dtype=torch.float64, device=samples.device))

    names = {**first.notes, **second.notes}
    notes = {
        n: torch.cat([noted(first, n, sizes[0]).double(), noted(second, n, sizes[1]).double()]) for n in names
    }
    weight, goal = (
        torch.cat([wide(getattr(first, name)), wide(getattr(second, name))]) for name in ("weight", "goal")
    )
    return Rows(samples, weight, goal, _share(samples, prompts), notes)


def _share(samples: Samples, prompts: int) -> Tensor:
    """What every row counts in the denominator: all together, one per prompt; float64 [N]."""
    return torch.full((len(samples),), prompts / len(samples), dtype=torch.float64, device=samples.device)


def by_prompt(log_w: Tensor, samples: Samples) -> Tensor:
    """Softmax of log-weights [N] or [N, T] within each prompt's rows, float64."""
    n = len(samples.prompts)
    index = samples.prompt_index if log_w.ndim == 1 else samples.prompt_index[:, None].expand_as(log_w)
    log_w = log_w.double()
    top = log_w.new_full((n, *log_w.shape[1:]), -torch.inf).scatter_reduce(0, index, log_w, "amax")
    weight = (log_w - top.gather(0, index).clamp_min(torch.finfo(log_w.dtype).min)).exp()
    return weight / torch.zeros_like(top).scatter_add(0, index, weight).gather(0, index)


def equal(samples: Samples) -> Tensor:
    """Each row's weight where all rows of a prompt count alike, float64 [N]."""
    return by_prompt(torch.zeros(len(samples), device=samples.device), samples)


def positive_weights(samples: Samples) -> Tensor:
    """A: softmax of log_w within each prompt, or equal weights of exact draws, float64 [N]."""
    return equal(samples) if samples.log_w is None else by_prompt(samples.log_w, samples)


def prefix_weights(samples: Samples, beta: float) -> Tensor:
    """log w^psi_t = Σ_{i≤t} (log_ref − log_q) + log_psi_t, what a prefix weighs under its own twist; [N, T].

    A row that ended earlier keeps its final weight, with r/beta in the place of the twist.
    """
    if samples.log_q is None or samples.log_ref is None or samples.log_psi is None or samples.reward is None:
        raise ValueError("prefix weights need log_q, log_ref, log_psi and reward of every row")
    ratio = (samples.log_ref - samples.log_q).double().cumsum(1)
    last = (samples.reward.double() / beta)[:, None]
    return ratio + torch.where(samples.mask, samples.log_psi.double(), last)


def one_value_per_prompt(x: Tensor, samples: Samples, within: float = 0.01) -> bool:
    """Whether x [N] is the same for all rows of a prompt; infinite and NaN entries aside."""
    real = torch.isfinite(x)
    index, x = samples.prompt_index[real], x[real].double()
    high, low = (
        x.new_zeros(len(samples.prompts)).scatter_reduce(0, index, x, how, include_self=False)
        for how in ("amax", "amin")
    )
    return bool((high - low <= within).all())


class TwistMethod(Method):
    """A method that trains a twist at drawn tokens."""

    fed: ClassVar[Fed] = "draws"
    trains: ClassVar[Trains] = "twist"
    squashed: ClassVar[bool] = False
    """Whether psi is σ of the network's output."""

    induced: ClassVar[bool] = False
    """Whether goals want log_q under the twist-induced proposal, whoever drew."""

    plain: ClassVar[bool] = False
    """Whether it learns from draws of the reference alone, whatever the twist would draw."""

    @property
    def backups(self) -> bool:
        """Whether goals want mean backups along the rows."""
        return False

    def decoder(self, problem: Problem, learner: Learner) -> Guided:
        """The reference tilted by the twist."""
        assert learner.values is not None
        return Guided(problem.reference, LearnedTwist(learner.values, self.squashed))


class TwistObjective(TwistMethod, ABC):
    """An objective on log psi at drawn tokens: `prepare` makes rows of draws, `per_token` judges a prefix."""

    optimum: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]

    @property
    def needs_beside_positives(self) -> tuple[Need, ...]:
        """What is needed where positives are brought: less, if the proposal only stood in for them."""
        return self.needs

    @abstractmethod
    def prepare(self, batch: Draws) -> Rows:
        """Constants (weights, goals) of the whole batch, once."""

    @abstractmethod
    def per_token(self, out: Tensor, goal: Tensor) -> Tensor:
        """The loss of a prefix from the twist's output and its goal, elementwise."""

    def weight(self, batch: Rows) -> Tensor:
        return batch.share

    def loss(self, model: Values, batch: Rows) -> Outcome:
        out = model.values(batch.samples)[..., 0]
        each = self.per_token(out, batch.goal.to(out))
        each = torch.where(batch.samples.mask, each * batch.weight.to(out), 0.0)
        return Outcome(each.sum(1) / out.shape[1], batch.notes)
