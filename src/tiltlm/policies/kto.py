"""KTO: answers judged one by one, good or bad, no pairs needed (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8).

    good:  L = w_good·(1 − σ(beta·[h(y) − z0])),      bad:  L = w_bad·(1 − σ(beta·[z0 − h(y)]))
    z0 = max(0, mean over the batch of h(x_i, y_j)), j ≠ i: each prompt with another prompt's answer; no gradient

z0 stands for KL(p‖pi_ref). Biased: an answer's log-ratio is pushed up or down by the sign of
w_good·P(good) − w_bad·P(bad), without end; no temperature makes pi* a stationary point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.experience import Experience, referenced
from tiltlm.method import Lesson, Method, Policy
from tiltlm.models.base import LanguageModel
from tiltlm.objective import Outcome, PerRow, positive, stated
from tiltlm.problem import Facts, Fed
from tiltlm.samples import Samples


def kto_loss(h: Tensor, good: Tensor, z0: Tensor, beta: float, w_good: float, w_bad: float) -> Tensor:
    """See the module: log-ratios [n], verdicts bool [n], reference points [n] -> [n]."""
    ahead = beta * (h - z0)
    return torch.where(good, w_good * (-ahead).sigmoid(), w_bad * ahead.sigmoid())


@dataclass(frozen=True)
class Judged:
    """Answers with log_ref; good bool [N]; z0 [N], the reference point of the batch they came in."""

    samples: Samples
    good: Tensor
    z0: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, index: Tensor | slice) -> Judged:
        return Judged(self.samples.select(index), self.good[index], self.z0[index])


@dataclass(frozen=True)
class JudgedAnswers:
    """Batches of Samples with `log_ref` and a `reward` (good: above `threshold`), and the z0 of `policy` as it is now.

    Raises ValueError where all rows of a batch answer one prompt: there is no other prompt's answer then.
    """

    experience: Experience
    policy: LanguageModel
    reference: LanguageModel
    threshold: float = 0.5

    def batch(self, step: int) -> Judged:
        samples: Samples = self.experience.batch(step)
        if samples.reward is None:
            raise ValueError("KTO wants answers that were judged: these have no reward")
        z0 = reference_point(self.policy, self.reference, samples)
        return Judged(samples, samples.reward > self.threshold, z0.expand(len(samples)))


@torch.no_grad()
def reference_point(policy: LanguageModel, reference: LanguageModel, samples: Samples) -> Tensor:
    """max(0, mean h(x_i, y_j)): every prompt of the batch with the answer to the next other prompt."""
    order = samples.prompt_index.argsort(stable=True)
    index = samples.prompt_index[order]
    commonest = int(index.bincount().max())
    if commonest == len(index):
        raise ValueError("KTO wants answers to two prompts or more in a batch; all of these answer one")
    shifted = index.roll(-commonest)
    foreign = replace(samples.select(order), prompt_index=shifted, log_ref=None).select(shifted != index)
    scored = referenced(foreign, reference)
    assert scored.log_ref is not None
    return (policy.log_prob(scored) - scored.log_ref).sum(1).mean().clamp_min(0)


@dataclass(frozen=True)
class KTO(PerRow, Policy):
    """KTO with weights of good and bad answers (their products with the numbers of each should lie within 1 to 4/3)."""

    beta: float | None = None
    """Temperature of the log-ratios (None: the target's)."""

    w_good: float = 1.0
    w_bad: float = 1.0
    fed: ClassVar[Fed] = "judged"
    optimum: ClassVar[str] = "biased: log-ratios grow by the sign of w_good·P(good) − w_bad·P(bad), without end"

    def experience(self, experience: Experience, lesson: Lesson) -> JudgedAnswers:
        """`experience` with the reference point of every batch."""
        assert lesson.learner.policy is not None
        return JudgedAnswers(experience, lesson.learner.policy, lesson.problem.reference)

    def about(self, rows: Samples) -> str:
        assert rows.reward is not None
        good = int((rows.reward > 0.5).sum())
        return balance(good, len(rows) - good, self.w_good, self.w_bad)

    def why_not(self, facts: Facts) -> str | None:
        if facts.prompts == "one":
            return "KTO's reference point takes other prompts' answers, and there is one prompt alone"
        return None

    def __post_init__(self) -> None:
        positive(beta=self.beta, w_good=self.w_good, w_bad=self.w_bad)

    def loss(self, model: LanguageModel, batch: Judged) -> Outcome:
        beta = stated(self.beta)
        if batch.samples.log_ref is None:
            raise ValueError(
                "these answers have no log_ref: score them with the reference first (experience.referenced)"
            )
        h = (model.log_prob(batch.samples) - batch.samples.log_ref).sum(1)
        loss = kto_loss(h, batch.good, batch.z0, beta, self.w_good, self.w_bad)
        score, nan = beta * h.detach(), torch.full_like(h, torch.nan)
        metrics = {"z0": batch.z0, "reward_good": torch.where(batch.good, score, nan)}
        return Outcome(loss, metrics | {"reward_bad": torch.where(batch.good, nan, score)})


def balance(good: int, bad: int, w_good: float, w_bad: float) -> str:
    """How many answers are wanted, and what weights would suit them better, if the paper's rule says so."""
    said = f"{good} wanted answers, {bad} unwanted"
    if not (good and bad):
        return f"{said}: KTO learns from both kinds, and with one alone its log-ratios only rise or only fall"
    ratio = w_good * good / (w_bad * bad)
    if 1 <= ratio <= 4 / 3:
        return said
    better = (
        f"--method.w-bad {w_good * good / bad:.3g}" if ratio > 1 else f"--method.w-good {w_bad * bad / good:.3g}"
    )
    return (
        f"{said}: w_good·wanted / (w_bad·unwanted) is {ratio:.3g}, the paper wants 1 to 4/3: {better} makes it 1"
    )


NAMES: dict[str, str] = {"kto": "KTO, on answers judged one by one"}
METHODS: dict[str, Method] = {"kto": KTO()}
