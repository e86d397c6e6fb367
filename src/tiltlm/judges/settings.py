"""What judges the rows of an online method, as settings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from tiltlm.settings import SPEED, at_least_one

Select = Literal["random", "min-margin", "variance"]
Allocation = Literal["spread", "first", "pool"]


OF_LEARNING = (
    "start",
    "warm_epochs",
    "epochs",
    "batch_size",
    "micro_batch",
    "checkpointing",
    "lr",
    "replay",
    "lora_rank",
    "dpo_beta",
    "most_tokens",
)
"""Settings of a judge that learns."""

SERVED = (*OF_LEARNING, "budget", "window", "relabels", "select", "allocation", "members")
"""Settings that a judge elsewhere has of its own; what is asked of it, `warm` pairs at first, is the trainer's."""


@dataclass(frozen=True)
class Judging:
    """A judge that scores in the place of the reward, and learns from a trickle of gold verdicts."""

    kind: Literal["none", "reward-model", "dpo", "self"] = "none"
    """What scores: the reward itself, a reward model, a second policy's beta·h, or the policy's own h."""

    url: str = ""
    """A judge that runs elsewhere (`tiltlm serve`), whose own settings and gold reward count; $TILTLM_JUDGE_TOKEN is shown
    to it."""

    start: str = ""
    """What the judge begins as: a folder, hub name or run; empty: the reference's body, under a fresh head."""

    budget: int = 0
    """Pairs whose gold verdict is bought, at most (0: no limit)."""

    warm: int = 0
    """Pairs of the reference whose verdicts are bought and learnt before the first step."""

    warm_epochs: int = 1
    """Passes over these."""

    window: int = 256
    """Completions after which the quota of verdicts is open again."""

    relabels: int = 16
    """That quota: pairs whose gold verdict is bought in a window (0: none, the judge stays as it is)."""

    select: Select = "min-margin"
    """Which pairs: any, those whose scores are closest, or those about which the members of an ensemble differ most."""

    allocation: Allocation = "spread"
    """When: evenly over the window, on its first pairs, or at its end out of them all (their labels stay the judge's)."""

    epochs: int = 4
    """Passes over a window's verdicts, once its quota is used up (0: none are learnt from, they are labels alone)."""

    batch_size: int = 16
    """Pairs a step of the judge's training."""

    micro_batch: int = field(default=0, metadata=SPEED)
    """Pairs per forward pass of that (0: the whole batch); changes memory, not the result."""

    checkpointing: bool = field(default=False, metadata=SPEED)
    """Save memory: compute activations again in the backward pass of that."""

    lr: float = 1e-4
    """Its learning rate (AdamW, constant)."""

    replay: int = 0
    """Earlier pairs that each of its trainings takes along."""

    members: int = 1
    """Judges in an ensemble, whose mean scores."""

    lora_rank: int = 0
    """Train adapters of this rank (0: all weights)."""

    dpo_beta: float = 0.05
    """Of the kind dpo: beta in −log σ(beta·Δh), and in the score beta·h."""

    most_tokens: int = 512
    """Of prompt and completion, as the judge reads them; prompts lose their front."""

    monitor: bool = field(default=False, metadata=SPEED)
    """Log the gold reward of every row, too, and how often the judge agrees with it: not charged to the ledger."""

    def __post_init__(self) -> None:
        at_least_one(self, "warm_epochs", "window", "batch_size", "members", "most_tokens")
        for name in ("budget", "warm", "relabels", "epochs", "replay", "lora_rank", "micro_batch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name.replace('_', '-')} of a judge is not negative; got {getattr(self, name)}")
        if not (self.lr > 0 and self.dpo_beta > 0):
            raise ValueError(f"lr and dpo-beta of a judge are positive; got {self.lr} and {self.dpo_beta}")
        if 2 * self.relabels > self.window:
            raise ValueError(
                f"a window of {self.window} completions holds {self.window // 2} pairs: no {self.relabels} of them can be "
                "bought; lower relabels or widen the window"
            )
        if self.budget and self.warm > self.budget:
            raise ValueError(f"{self.warm} pairs to warm up with are more than the budget of {self.budget}")
        if reason := self.why_not():
            raise ValueError(reason)

    def why_not(self) -> str | None:
        """Why these settings do not go together, or None."""
        if self.url and self.kind == "none":
            return "a judge at a url wants its kind named too: reward-model or dpo as it is there, or self"
        if self.kind == "self" and (self.warm or self.start or self.members > 1):
            return "the policy judges itself: there is no judge to warm up, to start from elsewhere, or to have several of"
        if self.select == "variance" and self.members < 2:
            return "an ensemble of one does not differ: select variance wants members, two or more"
        return None

    @property
    def caution(self) -> str:
        """What is to be said once before it judges: which of these settings do nothing beside the others."""
        idle = SERVED if self.url else OF_LEARNING if self.kind == "self" else ()
        found = [f for f in fields(self) if f.name in idle and getattr(self, f.name) != f.default]
        if not found:
            return ""
        said = ", ".join(f"{f.name.replace('_', '-')} {getattr(self, f.name)}" for f in found)
        why = (
            "the judge at the url has settings and a budget of its own"
            if self.url
            else "the policy judges itself, and nothing learns to"
        )
        return f"{why}: here --feed.judge's {said} do nothing"

    @property
    def learns(self) -> bool:
        """Whether a network of its own learns here."""
        return self.kind in ("reward-model", "dpo") and not self.url
