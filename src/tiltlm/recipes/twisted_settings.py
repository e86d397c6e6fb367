"""The settings of the twisted-SMC recipes. Defaults are the small presets'; the paper's are in `twisted.PAPER`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tiltlm.engine import Optim
from tiltlm.recipes.fitting import Fit
from tiltlm.rewards.by_name import text_function
from tiltlm.rewards.masking import mask
from tiltlm.rewards.words import ANIMALS
from tiltlm.ruler.bounds import ESTIMATORS
from tiltlm.train import Pace

DATA = Path(os.environ.get("TILTLM_DATA", "../shared/data"))
"""Where the small presets look for a pretrained stories model and for labelled text ($TILTLM_DATA)."""


def found(*parts: str) -> str:
    """A path under DATA, or "" where there is no such thing: the project then makes its own."""
    path = DATA.joinpath(*parts)
    return str(path) if path.exists() else ""


def at_least_one(settings: Any, *names: str) -> None:
    """Raise ValueError for settings that must be 1 or more and are not."""
    for name in names:
        value = getattr(settings, name)
        if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"{option} of {type(settings).__name__} must be 1 or more; got {value}")


def shared_out(batch_size: int, conditions: int, name: str) -> None:
    """Raise ValueError unless a batch can be shared out among so many conditions."""
    if batch_size < conditions:
        raise ValueError(
            f"{name}: a batch of {batch_size} cannot be shared out among {conditions} conditions: lower "
            f"--{name}.conditions, or raise --{name}.fit.batch-size"
        )


@dataclass(frozen=True)
class Language:
    """The reference model and what it is asked."""

    model: str = ""
    """A hub name or folder; empty: a small Llama that the stage `reference` trains on text of its own making."""

    prompt: str = "Once upon a time, there was a"
    prompt_ids: tuple[int, ...] = ()
    """Token ids to use instead of the prompt's text."""

    new_tokens: int = 12
    """T: every completion has this many tokens, as published; with `stop`, at most."""

    stop: tuple[str, ...] = ()
    """Tokens that end a completion before that, by id or text (default: none, whatever the model's files name)."""

    device: str = "cpu"
    """cpu, cuda, cuda:N, mps, or auto: the first of cuda, mps and cpu that is there."""

    stories: int = 6000
    """Stories that the own model is trained on."""

    fit: Fit = Fit(Optim(lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01), Pace(steps=700, warmup=50), batch_size=32)
    """How the own model is trained."""

    def __post_init__(self) -> None:
        at_least_one(self, "new_tokens", "stories")


@dataclass(frozen=True)
class ClassifierSettings:
    """A text classifier trained here: on what, and from what."""

    data: tuple[str, ...] = ()
    """csv or jsonl files of labelled text; empty: sentences of the project's own making."""

    text: str = "text"
    """The column that holds the text."""

    label: str = "label"
    """The column that holds the label."""

    classes: tuple[str, ...] = ()
    """label=class, one a label; labels not named are left out. Empty: labels are classes."""

    body: str = ""
    """A causal LM to start from (folder or hub name); empty: the reference."""

    held_out: float = 0.2
    """Part of the rows that accuracy is measured on."""

    most_tokens: int = 64
    """Texts are cut here, while training."""

    fit: Fit = Fit(Optim(lr=1e-3, weight_decay=0.01), Pace(steps=300, warmup=30), batch_size=32)


@dataclass(frozen=True)
class Goal:
    """The target: pi* ∝ pi_ref · exp(r / beta)."""

    beta: float = 1.0
    """Divides the reward: smaller leans harder on it. (The original's --beta_temp is 1/beta.)"""

    reward: Literal["words", "classifier", "infill", "continuation", "file"] = "words"
    """words: how many of a list are in the text. classifier: log P(label | text). infill: the tokens that must
    follow, another set for every row. continuation: the same for all rows. file: a function of your own."""

    words: tuple[str, ...] = ANIMALS
    """words: what is looked for; r = logsigmoid(5·hits − 5), lower-case whole words."""

    classifier: str = ""
    """A sequence-classification model (hub name, folder or run); empty: the one that the stage `classifier` trains."""

    label: str = ""
    """The class whose log-probability is the reward: its name or number."""

    threshold: float | None = None
    """Reward the side of this score instead: log 1[log-odds of the label > threshold], floored at log 1e-16."""

    above: bool = True
    """Which side of the threshold."""

    condition_tokens: int = 1
    """infill: how many tokens follow the gap."""

    continuation: str = ""
    """continuation: the text that must follow."""

    kind: Literal["log", "probability"] = "log"
    """infill, continuation: r = log pi_ref(c | x, y), or pi_ref(c | x, y) itself."""

    file: str = ""
    """file: FILE.py:FUNCTION, f(prompts, completions) -> one number each; or any reward by name, as `tiltlm score` takes
    it, or a sum: 'mine.py:f + 0.5*classifier:MODEL:LABEL'."""

    r_max: float | None = None
    """An upper bound of the reward, for exact draws by rejection. Not named: 0 of words, classifiers and what must follow
    (1 of its probability), and of `file` the sum of its terms' own bounds, where each has one."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive: it divides the reward; got {self.beta}")
        if self.reward == "infill" and (self.beta != 1 or self.kind != "log"):
            raise ValueError(
                "infill: gap and continuation are drawn in one go, which is exact for r = log pi_ref(c | x, y) at beta 1 "
                f"alone; got kind {self.kind} at beta {self.beta}"
            )
        if self.reward == "continuation" and not self.continuation:
            raise ValueError("continuation: name the text that must follow, --goal.continuation TEXT")
        if self.reward == "file" and not self.file:
            raise ValueError("file: name your own function, --goal.file FILE.py:FUNCTION")
        if self.reward == "classifier" and not self.label:
            raise ValueError("classifier: name the class whose log-probability is the reward, --goal.label NAME")
        odd = [word for word in self.words if not (word.isalpha() and word == word.lower())]
        if odd or not self.words:
            raise ValueError(f"words are looked for as single lower-case words; got {list(odd)}")

    @property
    def most(self) -> float:
        """No reward is larger: r_max, or the bound that the reward has by itself; infinite where neither is known."""
        if self.r_max is not None:
            return self.r_max
        if self.reward == "file":
            return text_function(self.file).most
        return 1.0 if self.kind == "probability" and self.reward == "continuation" else 0.0

    def bound(self) -> float:
        """`most`, for exact draws. Raises ValueError where no bound is known."""
        if math.isinf(self.most):
            raise ValueError(
                f"exact draws by rejection need an upper bound of the reward, and {mask(self.file)} states none: name it, "
                "--goal.r-max (the most that any completion can get)"
            )
        return self.most


@dataclass(frozen=True)
class ExactSettings:
    """Exact draws of pi*."""

    n: int = 2000
    """How many are stored (infill: conditions, each with one draw)."""

    purpose: Literal["measuring", "training"] = "measuring"
    """Draws to measure with, or others to train on: what a method learned from says little about it."""

    stored: str = ""
    """Take the stored draws of this file (a run's exact.safetensors) instead of drawing."""

    batch_size: int = 1000
    """Draws of the reference at once; changes speed only."""

    max_tries: float = 1e7
    """Refuse if the search would take more draws of the reference than this."""

    def __post_init__(self) -> None:
        at_least_one(self, "n", "batch_size")


@dataclass(frozen=True)
class Twist:
    """The twist's network."""

    body: Literal["copy", "frozen", "lora"] = "copy"
    """A trained copy of the reference's body, the reference's own (frozen), or a copy with LoRA adapters."""

    mlp_layers: int = 0
    """Hidden layers of the head (0: linear)."""

    mlp_factor: int = 1
    """Width of the hidden layers, in widths of what the head reads."""

    lora_rank: int = 8


@dataclass(frozen=True)
class Learn:
    """How one method trains: on what draws, and for how long."""

    fit: Fit = Fit(Optim(lr=1e-3, clip=0.0), Pace(steps=256, decay="none"), checkpoint_every=64)
    particles: int = 100
    """Draws per prompt (condition) and step: a twist's batch (fit.batch-size is not used)."""

    conditions: int = 1
    """infill: conditions per step."""

    positives: Literal["particles", "exact", "csmc"] = "particles"
    """What stands for pi*: the draws by their weights, exact draws, or conditional SMC around one exact draw."""

    supply: Literal["fresh", "stored"] = "fresh"
    """Where exact draws come from: a fresh search at every step, or the stored ones (over-fits)."""

    drawn_by: Literal["q", "reference", "mixed", "resampled", "exact"] = "q"
    """Who draws: the twist-induced proposal, the reference, half of each, q resampled, or exact draws."""

    tempered: float = 1.0
    """Power of the twist while drawing."""

    dpg: float = 0.0
    """Weight of DPG's loss in a mixture (0: none)."""

    keep: tuple[int, ...] = ()
    """Steps whose checkpoints stay, and are measured too: the curve of the KLs against updates."""

    @property
    def wants_exact(self) -> bool:
        """Whether its steps take exact draws of pi*."""
        return self.positives != "particles" or self.drawn_by == "exact"

    def __post_init__(self) -> None:
        at_least_one(self, "particles", "conditions")
        if self.drawn_by == "mixed" and self.particles % 2:
            raise ValueError(f"mixed draws are half q's, half the reference's: not of {self.particles} particles")
        if self.fit.batch_size != Fit().batch_size:
            raise ValueError(
                f"a twist's batch is its particles (times conditions); fit.batch-size {self.fit.batch_size} does nothing"
            )
        if self.supply == "stored" and self.positives == "particles" and self.drawn_by != "exact":
            raise ValueError("supply says where exact draws come from: set positives to exact or csmc as well")


@dataclass(frozen=True)
class LearnCTL(Learn):
    contrast: Literal["final", "next"] = "final"
    """Hold every step against pi*, or against the next step (nested variational inference)."""


@dataclass(frozen=True)
class LearnSoftQ(Learn):
    target: Literal["log", "linear", "mean"] = "log"
    multi_step: float = 0.0


@dataclass(frozen=True)
class LearnFudge(Learn):
    prefixes: bool = False
    """Half of the prefixes from exact draws, labelled by fresh rollouts (the original's bce_psigma)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefixes != (self.positives != "particles"):
            raise ValueError(
                "FUDGE learns from draws of the reference, and with `prefixes` from exact ones too: set prefixes and "
                f"positives together; got prefixes {self.prefixes}, positives {self.positives}"
            )
        if self.dpg or self.drawn_by != "q" or self.tempered != 1:
            raise ValueError(
                "FUDGE draws from the reference, and its psi is a probability: no dpg, drawn-by or tempered"
            )


@dataclass(frozen=True)
class LearnPPO:
    """PPO: the twist's network as a policy head ("head"), or the whole model ("full")."""

    fit: Fit = Fit(Optim(lr=1e-3, clip=0.0), Pace(steps=256, decay="none"), batch_size=100, checkpoint_every=64)
    policy: Literal["head", "full"] = "head"
    passes: int = 4
    """Updates per batch."""

    conditions: int = 100
    """infill: conditions per step, among which the batch is shared out."""

    keep: tuple[int, ...] = ()


@dataclass(frozen=True)
class LearnValue:
    """The law of the reward for Q# and CD."""

    fit: Fit = Fit(Optim(lr=1e-3, clip=0.0), Pace(steps=256, decay="none"), batch_size=100, checkpoint_every=64)
    atoms: tuple[float, ...] = (-8.0, -6.0, -5.0, -4.0, -3.0, -2.5, -2.0, -1.5, -1.0, -0.7, -0.4, -0.2, -0.1, 0.0)
    """The rewards the law is over; others count as the nearest."""

    conditions: int = 1


@dataclass(frozen=True)
class LearnPolicy:
    """The foundation's policies on this target."""

    fit: Fit = Fit(Optim(lr=1e-4), Pace(steps=128), batch_size=100, checkpoint_every=64)


@dataclass(frozen=True)
class LogZSettings:
    """How the common log Z is found, once for all methods."""

    by: Literal["reference", "enumeration", "bounds", "rejection"] = "reference"
    """reference: one long importance run of the reference. rejection: how many of its tries the search for exact draws
    kept. enumeration: infill, every gap (short ones). bounds: SMC bounds with CTL's twist."""

    draws: int = 40_000
    particles: tuple[int, ...] = (32, 500)
    repeats: int = 20
    """Pairs of bounds; infill: one for each of the first `conditions` exact draws instead."""

    conditions: int = 100
    """infill: on how many conditions log Z is known; the methods are measured on some of these."""

    width: float = 0.0
    """Draw on until the certificate of log Z is at most so many nats wide (0: `draws` or `repeats`, and no more)."""

    limit: int = 50
    """With a width: at most so many times `draws` or `repeats`."""

    batch_size: int = 2000

    def __post_init__(self) -> None:
        at_least_one(self, "draws", "particles", "repeats", "conditions", "batch_size", "limit")
        if not self.width >= 0 or (self.width and self.by not in ("reference", "bounds")):
            raise ValueError(
                f"a width of log Z's certificate goes with --log-z.by reference or bounds and is positive; got "
                f"{self.width} by {self.by}"
            )


@dataclass(frozen=True)
class Test:
    """How methods are measured."""

    n: int = 2000
    """Draws of q (infill: per condition)."""

    conditions: int = 100
    """infill: conditions that q is measured on."""

    exact: int = 2000
    """Exact draws used, at most."""

    batch_size: int = 500
    """Rows at once; changes speed only."""

    absolute: bool = True
    """Off: E[r], KL(q‖ref) and the objective alone, which need neither exact draws nor log Z."""

    def __post_init__(self) -> None:
        at_least_one(self, "n", "conditions", "exact", "batch_size")


@dataclass(frozen=True)
class Bounds:
    """Log Z bounds against the number of particles."""

    particles: tuple[int, ...] = (4, 16, 64, 256)
    repeats: int = 20
    estimators: tuple[str, ...] = ("iwae", "smc", "smc-ess")
    proposals: tuple[Literal["twist", "reference"], ...] = ("twist", "reference")

    def __post_init__(self) -> None:
        at_least_one(self, "particles", "repeats")
        unknown = [name for name in self.estimators if name not in ESTIMATORS]
        if unknown or not set(self.estimators) - {"iwae"} or not self.proposals:
            raise ValueError(
                f"bounds want estimators of {', '.join(ESTIMATORS)}, one of them by SMC (importance sampling's midpoint may"
                f" be nats off), and a proposal; got estimators {self.estimators}, proposals {self.proposals}"
            )


@dataclass(frozen=True)
class Frontier:
    """Reward against KL to the reference over temperatures."""

    betas: tuple[float, ...] = (1.0, 1 / 3, 0.1)
    methods: tuple[str, ...] = ("ctl", "ppo")


@dataclass(frozen=True)
class Show:
    """Qualitative samples."""

    particles: int = 64
    threshold: float = 0.0
    """Resample when ESS ≤ threshold · particles (0: never, as in the original's notebook)."""

    conditions: int = 3
    """infill: how many conditions."""

    def __post_init__(self) -> None:
        at_least_one(self, "particles", "conditions")


@dataclass(frozen=True)
class Reach:
    """Certified intervals for log Z at growing lengths, each with a CTL twist of its own."""

    width: float = 0.1
    """The table says how many runs a certificate of so many nats takes."""

    lengths: tuple[int, ...] = (20, 50, 100, 200)
    particles: tuple[int, ...] = (64, 256)
    repeats: int = 20

    def __post_init__(self) -> None:
        at_least_one(self, "lengths", "particles", "repeats")
