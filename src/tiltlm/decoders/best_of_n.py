"""Best of n: of n draws of the reference keep the one of highest reward.

Its divergence depends on the law of the reward alone (`samplers.best_of`): KL(q‖pi_ref) is at most log n − (n − 1)/n, and
less where rewards tie. That law is known where many groups of n were drawn of a prompt, so the divergence is estimated
there, from all their rewards; elsewhere the bound stands in its place, and what follows from it: J at least, KL(q‖pi*) at
most.

The estimate is a smooth function of the frequencies of the rewards. Its jackknife over groups gives one number a group,

    G·KL − (G − 1)·KL_without_g        (Tukey's pseudo-values; G groups)

whose mean has a bias of 1/G² instead of 1/G and whose spread is that of independent observations, paired with the groups'
best rewards: J and KL(q‖pi*) get their errors from both together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.decoders.sampler import Sampler
from tiltlm.feeds.served import of_reference
from tiltlm.method import Learner, Method
from tiltlm.problem import Problem
from tiltlm.ruler.estimate import per_prompt
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.samplers.best_of import kl_upper_bound
from tiltlm.samplers.serving import HERE, Serving
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.settings import ADDED, at_least_one

ENOUGH = 100
"""Groups of a prompt from which the law of its reward is known well enough to estimate a divergence by."""


@dataclass(frozen=True)
class BestOf(Sampler):
    """Keep the best of `n` draws of the reference."""

    n: int = 8
    """Draws of which one is kept."""

    draw_at: Serving = field(default=HERE, metadata=ADDED)
    """The server that draws (none: this process)."""

    optimum: ClassVar[str] = "not pi*: close to it at a beta that n decides (Beirami et al. 2024)"

    def __post_init__(self) -> None:
        at_least_one(self, "n")
        if self.draw_at.precision != "float32":
            raise ValueError(
                "the best of n is measured as a choice among draws of the reference itself: leave draw_at.precision out"
            )

    def draw(
        self, problem: Problem, learner: Learner, prompts: Tokens, n: int, stream: Stream, batch_size: int = 512
    ) -> Samples:
        return self.groups(problem, prompts, n, stream, batch_size)[0]

    def groups(
        self, problem: Problem, prompts: Tokens, groups: int, stream: Stream, batch_size: int
    ) -> tuple[Samples, Tensor]:
        """The best of every group, [P·groups] rows, and the rewards of all, float64 [P, groups, n].

        Raises ValueError where a reward is NaN.
        """

        def scored(drawn: Samples) -> Samples:
            return problem.target.scored(drawn.with_(log_ref=drawn.log_q, log_q=None), batch_size)

        drawn = of_reference(problem, self.draw_at, prompts, groups * self.n, stream, batch_size, scored)
        assert drawn.reward is not None
        rewards = drawn.reward.double().reshape(len(prompts), groups, self.n)
        if bool(rewards.isnan().any()):
            row = int(rewards.isnan().nonzero()[0, 0])
            raise ValueError(f"a reward of prompt {row} is NaN: no draw is best")
        first = torch.arange(len(prompts) * groups, device=rewards.device) * self.n
        return drawn.select(first + rewards.argmax(2).flatten()), rewards

    def measured(self, problem: Problem, learner: Learner, ruler: Ruler) -> tuple[Measurement, Samples]:
        samples, rewards = self.groups(problem, ruler.prompts, ruler.n, ruler.stream, ruler.batch_size)
        one = len(ruler.prompts) == 1
        assert samples.reward is not None
        reward = samples.reward.double()
        reward = reward if one else per_prompt(reward, samples.prompt_index, len(ruler.prompts))
        if ruler.n >= ENOUGH:
            kl = torch.stack([pseudo_values(own) for own in rewards])
            values = ruler.distances(reward, kl[0] if one else kl.mean(1))
        else:
            values = ruler.bounded(reward, torch.full_like(reward, kl_upper_bound(self.n)))
        return ruler.measurement(ruler.verdicts(samples) | values), samples


def pseudo_values(rewards: Tensor) -> Tensor:
    """Observations of KL(best-of-n ‖ pi_ref), nats [G], from the rewards [G, n] of G groups of plain draws."""
    groups, n = rewards.shape
    atoms, index = rewards.unique(return_inverse=True)
    whole = torch.bincount(index.flatten(), minlength=len(atoms)).double()
    at_once = max(1, 2_000_000 // len(atoms))
    left = []
    for own in index.split(at_once):
        count = torch.zeros(len(own), len(atoms), dtype=torch.float64, device=own.device)
        count.scatter_add_(1, own, torch.ones_like(own, dtype=torch.float64))
        left.append(kl_of_counts(whole - count, n))
    return groups * kl_of_counts(whole[None], n) - (groups - 1) * torch.cat(left)


def kl_of_counts(count: Tensor, n: int) -> Tensor:
    """KL(best-of-n ‖ pi_ref), nats [...], of laws whose values in ascending order have the weights `count` [..., A]."""
    total = count.sum(-1, keepdim=True)
    below = count.cumsum(-1)
    log_f = n * (below / total).log()
    before = n * ((below - count) / total).log()
    log_q = log_f + torch.log(-torch.expm1(before - log_f))
    log_p = (count / total).log()
    return torch.where(count > 0, log_q.exp() * (log_q - log_p), 0.0).nan_to_num(0.0).sum(-1)


NAMES: dict[str, str] = {"best-of-n": "keep the best of n draws of the reference"}
METHODS: dict[str, Method] = {"best-of-n": BestOf()}
