"""What a method is fed, as settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tiltlm.judges.settings import Judging
from tiltlm.problem import Source
from tiltlm.samplers.serving import HERE, Serving
from tiltlm.settings import ADDED, SPEED, at_least_one

NEW: tuple[Source, ...] = ("fresh", "live")
"""Rows that are drawn at every step."""


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
class Rounds:
    """Draw, grade, build, update, validate; and again."""

    count: int = 3
    """How many."""

    n: int = 4
    """Draws of every training prompt in a round."""

    prompts: int = 0
    """Training prompts that are answered, the first ones (0: all)."""

    start: Literal["base", "previous"] = "base"
    """What an update begins from: the reference model (or --net.weights), or what the round before ended with."""

    reference: Literal["base", "previous"] = "base"
    """Whose log-probabilities log-ratios are taken to, likewise."""

    right: float | None = None
    """Reward from which a completion counts as right (not named: the largest there is)."""

    cap: int = 0
    """Right answers to a prompt that are learnt in a round, at most (0: all)."""

    unique: bool = False
    """The same answer to a prompt counts once."""

    weigh: Literal["rows", "prompts"] = "rows"
    """What counts alike: every answer (pair), or every prompt, however many it has."""

    pairs: int = 0
    """Pairs of a prompt, at most (0: every right answer with every wrong one)."""

    cut_off: Literal["keep", "drop"] = "keep"
    """Wrong answers that did not end by themselves, in pairs."""

    rationalize: bool = False
    """Prompts without a right answer are asked again with a hint; what is right then is learnt as if without."""

    show_hint: float = 0.0
    """Part of those that is learnt with the hint in the prompt."""

    accumulate: bool = False
    """Learn from what earlier rounds found as well."""

    growth: float = 1.0
    """Factor of the number of updates from one round to the next."""

    gain: float = 0.0
    """End where a round's accuracy on validation prompts is not significantly above the last one's: at this level of an
    exact McNemar test (0: go on)."""

    collapse: float = 0.0
    """End where that accuracy falls below this part of the reference's (0: go on)."""

    samples: str = field(default="", metadata=ADDED)
    """A file of answers for the first round to learn from instead of drawing: lines of ours (answers.jsonl, of
    `tiltlm sample`), or STaR's generated.csv."""

    valid_samples: str = field(default="", metadata=ADDED)
    """Likewise of answers to validation prompts, on which every round's loss is told."""

    batch_size: int = field(default=256, metadata=SPEED)
    """Rows drawn at once."""

    def __post_init__(self) -> None:
        at_least_one(self, "count", "n", "batch_size")
        for name in ("prompts", "cap", "pairs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} of Rounds is 0 (all) or more; got {getattr(self, name)}")
        if not 0 < self.growth < math.inf:
            raise ValueError(f"growth of Rounds is a factor, finite and above 0; got {self.growth}")
        if self.right is not None and not math.isfinite(self.right):
            raise ValueError(f"right of Rounds is a finite reward; got {self.right}")
        for name, most in (("show_hint", "to 1"), ("gain", "to below 1"), ("collapse", "to 1")):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "gain" and value == 1):
                raise ValueError(f"{name.replace('_', '-')} of Rounds is a part, from 0 {most}; got {value}")
        if self.show_hint and not self.rationalize:
            raise ValueError("hints are shown in rationalized answers: set rationalize as well")
        if self.samples and self.rationalize:
            raise ValueError(
                "answers of a file are not asked for again with a hint: leave samples out, or rationalize"
            )


@dataclass(frozen=True)
class Feed:
    """What a policy or a value learns from."""

    source: Literal["task", "own", "stored", "fresh", "live", "rounds"] = "task"
    """The data's own rows, stored draws of the reference, fresh ones at every step, the policy's own at every step or in
    rounds; task: what the method names (online ones: live), or else what the task takes first."""

    draws: Draws = Draws()
    size: int = 2
    """Completions of a prompt that meet in a group (of stored ones others at every step), or that pairs are made of."""

    pairing: Literal["best-worst", "all"] = "best-worst"
    """Pairs of stored draws: the best and the worst of the first `size`, or every two; ties are left out."""

    n: int = 0
    """Draws of each prompt in a step, live or fresh, of several (0: 4; of one prompt, all of the batch)."""

    judge: Judging = field(default=Judging(), metadata=ADDED)
    """Who scores new rows in the place of the reward, buying some of the reward's verdicts."""

    rounds: Rounds = field(default=Rounds(), metadata=ADDED)
    """What happens in a round."""

    draw: Serving = field(default=HERE, metadata=ADDED)
    """Who draws stored, fresh and live rows: a server, or this process."""

    def __post_init__(self) -> None:
        if self.size < 2 or self.n < 0:
            raise ValueError(f"a group has two completions or more, and n is not negative; got {self}")

    def files(self) -> list[str]:
        """Files that settings name and whose content decides the result."""
        return [self.rounds.samples, self.rounds.valid_samples]


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

    def files(self) -> list[str]:
        """None: no setting names a file."""
        return []

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
