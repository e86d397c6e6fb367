"""OPO, online DPO: pairs that the policy has just drawn, labelled by a reward (Guo et al. 2024, arXiv:2402.04792, with a
judge; Singhal et al. 2024, arXiv:2405.01511, with a reward).

    p = σ((r_1 − r_2)/beta_r),      z = beta_pi·[h(y_1) − h(y_2)],      h(y) = log p(y|x) − log pi_ref(y|x)
    L = −p·log σ(z) − (1 − p)·log σ(−z),        dL/dz = σ(z) − p

Expected gradient zero at pi* of beta = beta_r·beta_pi, whoever drew the pairs: there σ(z) = p in every pair at once. So of
larger groups the best and the worst row may stand for all. `sampled` labels are 1 with probability p, else 0: the same in
expectation, noisier. `hard` ones, the papers', are 1 for the larger reward: they ignore by how much it is larger, z grows
without end in every pair, and no finite policy is optimal; such a training lives by being stopped early.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from tiltlm.experience import Around, Experience
from tiltlm.groups import Groups, extremes
from tiltlm.method import Lesson, Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, positive, stated
from tiltlm.policies.exo_rw import group_log_ratios
from tiltlm.problem import Fed, Source
from tiltlm.seeds import Stream

Labels = Literal["soft", "sampled", "hard"]


def opo_loss(h: Tensor, label: Tensor, beta_pi: float) -> Tensor:
    """−p·log σ(z) − (1 − p)·log σ(−z): log-ratios [G, 2], P(the first row is better) [G] -> [G], nats."""
    return binary_cross_entropy_with_logits(beta_pi * (h[:, 0] - h[:, 1]), label, reduction="none")


def labels_of(pairs: Groups, labels: Labels, beta_r: float) -> Tensor:
    """P(the first row is better) of groups of two, [G]; NaN where rewards tie and labels are hard. Verdicts override.

    Raises ValueError where labels are sampled and some pair's coin was not tossed (`Coins`).
    """
    reward = pairs.reward
    gap = reward[:, 0] - reward[:, 1]
    said = torch.full_like(gap, torch.nan) if pairs.preferred is None else pairs.preferred.to(gap)
    if labels == "sampled":
        if bool(said.isnan().any()):
            raise ValueError(
                "sampled labels are tossed where the pairs come from (opo.Coins, which `experience` puts around them)"
            )
        return said
    silver = (gap / beta_r).sigmoid() if labels == "soft" else _hard(gap)
    return torch.where(said.isnan(), silver, said)


def _hard(gap: Tensor) -> Tensor:
    return torch.where(gap == 0, torch.nan, (gap > 0).to(gap.dtype))


@dataclass(frozen=True)
class Coins(Around):
    """Another experience's groups as pairs, each with a winner drawn by a coin: P(first) = σ((r_1 − r_2)/beta_r). A verdict
    that stands already stays."""

    beta_r: float
    stream: Stream

    def batch(self, step: int) -> Groups:
        pairs = extremes(self.experience.batch(step))
        label = labels_of(pairs, "soft", self.beta_r)
        coin = self.stream.child("coin", step).uniform(range(len(pairs)), 1)[:, 0].to(label.device)
        return replace(pairs, preferred=(coin < label).to(label.dtype))


def told_apart(label: Tensor) -> Tensor:
    """The weight of every pair, [G]: 0 where a hard label has no winner; all 1 where none has (the step is empty)."""
    told = ~label.isnan()
    return (told | ~told.any()).float()


def pair_metrics(h: Tensor, pairs: Groups, label: Tensor, beta: float) -> dict[str, Tensor]:
    """What methods on labelled pairs report, [G] each, detached; NaN where a pair has no label.

    margin: beta·Δh in favour of the likelier winner. accuracy: whether the policy's favourite is that one (a tie of either
    counts half). label_entropy: nats; 0 of hard labels. tied: equal rewards and no verdict. h, reward: means.
    """
    h, known = h.detach(), ~label.isnan()
    margin = beta * (h[:, 0] - h[:, 1]) * (2 * label - 1).sign()
    tied = pairs.reward[:, 0] == pairs.reward[:, 1]
    if pairs.preferred is not None:
        tied = tied & pairs.preferred.isnan()
    return {
        "margin": torch.where(known, margin, torch.nan),
        "accuracy": torch.where(known, (margin.sign() + 1) / 2, torch.nan),
        "label_entropy": torch.special.entr(label) + torch.special.entr(1 - label),
        "tied": tied.to(h.dtype),
        "h": h.mean(1),
        "reward": pairs.reward.mean(1),
    }


@dataclass(frozen=True)
class OPO(Policy):
    """OPO; the target's beta is the product of its two temperatures."""

    labels: Labels = "soft"
    """soft: P(better) by the rewards; sampled: a coin of that chance; hard: the larger reward wins (the papers')."""

    beta_r: float | None = None
    """Temperature of the labels (None: what makes the product the target's beta)."""

    beta_pi: float = 0.5
    """Temperature of the log-ratios, as of EXO on rewards. (The papers' 0.05 stands with hard labels, where it says how far
    apart a pair is pushed before it counts as learnt; here a small one makes for labels near 1/2.)"""

    passes: int = 1
    """Updates per batch of draws."""

    fed: ClassVar[Fed] = "groups"
    source: ClassVar[Source | None] = "live"
    optimum: ClassVar[str] = (
        "pi* of beta = beta_r·beta_pi, whoever drew the pairs; with hard labels, none that is finite"
    )

    def __post_init__(self) -> None:
        positive(beta_r=self.beta_r, beta_pi=self.beta_pi, passes=self.passes)

    def bound(self, beta: float) -> Self:
        return replace(self, beta_r=beta / self.beta_pi) if self.beta_r is None else self

    @property
    def caution(self) -> str:
        if self.labels != "hard":
            return ""
        return "hard labels have no finite optimum: margins grow until the training is stopped; watch KL to the reference"

    def experience(self, experience: Experience, lesson: Lesson) -> Experience:
        """`experience`; where labels are sampled, with a coin for every pair."""
        if self.labels != "sampled":
            return experience
        return Coins(experience, stated(self.bound(lesson.problem.beta).beta_r), lesson.stream)

    def prepare(self, batch: Groups) -> Groups:
        return extremes(batch)

    def weight(self, batch: Groups) -> Tensor:
        return told_apart(labels_of(batch, self.labels, stated(self.beta_r)))

    def loss(self, model: LanguageModel, batch: Groups) -> Outcome:
        h, label = group_log_ratios(model, batch), labels_of(batch, self.labels, stated(self.beta_r))
        metrics = pair_metrics(h, batch, label, self.beta_pi)
        loss = torch.where(label.isnan(), 0.0, opo_loss(h, label.nan_to_num(0.5).to(h), self.beta_pi))
        return Outcome(loss, metrics | {"gap": loss.detach() - metrics["label_entropy"]})


NAMES: dict[str, str] = {"opo": "online DPO: the policy's own pairs, labelled by the reward"}
METHODS: dict[str, Method] = {"opo": OPO()}
