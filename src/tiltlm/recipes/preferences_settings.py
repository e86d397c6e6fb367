"""The settings of the preference-alignment recipes. Presets are in `preferences.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tiltlm.data.mapping import mapping_of
from tiltlm.engine import Optim
from tiltlm.objective import positive
from tiltlm.recipes.fitting import Fit
from tiltlm.recipes.twisted_settings import at_least_one
from tiltlm.run import ADDED
from tiltlm.train import Pace


@dataclass(frozen=True)
class Data:
    """Where dialogues or preferences come from, and how they are divided."""

    train: tuple[str, ...] = ()
    """Files (jsonl, json, csv, tsv, parquet, .gz), folders or hub names; empty: dialogues of the project's own making. A
    number behind a colon is a weight: `a.jsonl:2 b.parquet:0.5` has every row of a twice, a random half of b's once."""

    test: tuple[str, ...] = ()
    """Likewise; empty: carved from `train`."""

    format: str = "auto"
    """auto (by the columns), hh, tldr, imdb."""

    valid_rows: int = 64
    """Rows carved from `train` that choose checkpoints."""

    test_rows: int = 128
    """Rows carved from `train` where no test data is named; else the most that are used (0: all)."""

    keep: tuple[str, ...] = ()
    """Further columns of the data (an answer, say) that a function of your own takes as reward: (prompt, completion) are
    judged with those of the prompt's row."""

    limit: int = 0
    """Rows of the training data at most (0: all)."""

    own: int = 2000
    """Dialogues made where no data is named."""

    columns: tuple[str, ...] = field(default=(), metadata=ADDED)
    """Where columns have other names: `prompt=question chosen=response_j`; dots reach inside, as in
    `chosen=messages.-1.content`."""

    encoding: str = field(default="", metadata=ADDED)
    """What text files are written in: utf-16, latin-1, cp1252, … (empty: their byte order mark, or UTF-8)."""

    def __post_init__(self) -> None:
        mapping_of(self.columns)
        at_least_one(self, "valid_rows", "own")


@dataclass(frozen=True)
class Base:
    """The base model, and how every model here reads text."""

    model: str = ""
    """A hub name or folder; empty: a small Llama that the stage `base` trains on the dialogues themselves."""

    start: str = ""
    """A model (hub name, folder or run) to align instead of the one that the stage `sft` trains; it brings its tokenizer,
    and `model` is not needed."""

    most_tokens: int = 512
    """Prompt and completion together."""

    new_tokens: int = 200
    """Of a completion, at most; longer ones are cut and do not count as finished."""

    temperature: float = 0.8
    """Divides the logits of policy and reference alike: in drawing, in training, in measuring."""

    stop: tuple[str, ...] = ()
    """The tokens that end a completion, by id or text, the one that is written first (default: all that the model's own
    files name: tokenizer, generation_config, chat template)."""

    device: str = "cpu"
    """cpu, cuda, cuda:N, mps, or auto: the first of cuda, mps and cpu that is there."""

    lora: int = 0
    """Rank of LoRA adapters for SFT and alignment (0: train every weight); the reference is the model without them."""

    checkpointing: bool = False
    """Save memory: compute activations again in the backward pass."""

    packing: bool = False
    """SFT: several examples in one row, where that is exact for this model (it is tried out first)."""

    fit: Fit = Fit(Optim(lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01), Pace(steps=500, warmup=50), batch_size=32)
    """How the own model is trained."""

    @property
    def named(self) -> str:
        """The model that everything begins with; empty for the project's own."""
        return self.start or self.model

    def __post_init__(self) -> None:
        at_least_one(self, "most_tokens", "new_tokens")
        positive(temperature=self.temperature)
        if self.new_tokens >= self.most_tokens:
            raise ValueError(
                f"new_tokens ({self.new_tokens}) must leave room for a prompt in {self.most_tokens} tokens"
            )


@dataclass(frozen=True)
class Train:
    """How long and how a stage trains, counted in epochs as the papers do."""

    epochs: float = 1.0
    """Passes over the data; a part of one is allowed."""

    batch_size: int = 128
    """Rows (pairs, groups) a step."""

    lr: float = 1e-5
    micro_batch: int = 0
    """Rows per forward pass (0: the whole batch); changes memory, not the result."""

    warmup: int = 0
    checkpoints: int = 10
    """How many are kept, evenly spread over the training."""

    evaluations: int = 10
    """How often held-out data is looked at on the way, and the best checkpoint chosen (0: never, the last is it)."""

    patience: int = 0
    """End after so many evaluations without a new best (0: go on)."""

    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "checkpoints")
        positive(epochs=self.epochs, lr=self.lr)

    def fit(self, rows: int) -> Fit:
        """For so many rows of data: Adam (0.9, 0.95), cosine to 0, clipped at 1, as published."""
        if rows < 1:
            raise ValueError("there is nothing to train on: every row was left out")
        size = min(self.batch_size, rows)
        steps = max(1, round(self.epochs * rows / size))
        every = max(1, round(steps / self.checkpoints))
        optim = Optim(
            lr=self.lr, betas=(0.9, 0.95), clip=1.0, micro_batch=self.micro_batch, precision=self.precision
        )
        return Fit(
            optim,
            Pace(steps=steps, warmup=self.warmup, floor=0.0),
            batch_size=size,
            checkpoint_every=every,
            keep_every=every,
            evaluate_every=max(1, round(steps / self.evaluations)) if self.evaluations else 0,
            patience=self.patience if self.evaluations else 0,
        )


@dataclass(frozen=True)
class Judge:
    """The reward model."""

    train: Train = Train(checkpoints=1)
    body: str = ""
    """A model to put the head on (hub name, folder or run); empty: `base.start`, or else `base.model`."""

    margin: float = 0.0
    """Times a pair's own `margin` (where the data has one) is what its rewards should differ by at least."""

    center: float = 0.0
    """Weight of (r_c + r_r)², which holds rewards near 0."""


@dataclass(frozen=True)
class Goal:
    """The target: pi* ∝ pi_ref · exp(r / beta), beta = beta_r · beta_pi."""

    reward: str = ""
    """reward-model:MODEL, classifier:MODEL:LABEL, log-odds:MODEL:LABEL, FILE.py:FUNCTION (f(prompts, completions,
    **columns), columns as `data.keep` names them), an https:// endpoint, or a sum: 'a.py:f + 0.5*classifier:MODEL:LABEL';
    empty: the reward model that the stage `reward-model` trains."""

    beta_r: float = 0.5
    """Temperature of the rewards within a group."""

    beta_pi: float = 0.5
    """Temperature of the log-ratios within a group."""

    def __post_init__(self) -> None:
        positive(beta_r=self.beta_r, beta_pi=self.beta_pi)

    @property
    def beta(self) -> float:
        """The target's temperature."""
        return self.beta_r * self.beta_pi


@dataclass(frozen=True)
class Draws:
    """Completions of the reference, to be labelled."""

    n: int = 4
    """K: of every prompt."""

    prompts: int = 0
    """Training prompts that are answered (0: all)."""

    batch_size: int = 64
    """Rows drawn at once; changes speed only."""

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"a group has two completions or more; got draws.n = {self.n}")


@dataclass(frozen=True)
class Align:
    """What a policy learns from, and how."""

    source: Literal["labelled", "data"] = "labelled"
    """labelled: the reference's own completions, scored by the reward. data: the pairs (or groups) of the data itself,
    whose winners get reward 1 and losers 0; for KTO also its verdicts on single answers."""

    size: int = 2
    """Completions of a prompt that meet in a group, drawn anew at every step."""

    pairing: Literal["best-worst", "all"] = "best-worst"
    """How methods on pairs make them of the `size` first completions of a group; ties are left out and counted."""

    train: Train = Train(lr=1e-6)
    watched: int = 64
    """Validation prompts that the policy answers at every evaluation, for E[r], KL and J."""

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ValueError(f"a group has two completions or more; got align.size = {self.size}")


@dataclass(frozen=True)
class Test:
    """How a policy is measured, on prompts of the test split."""

    prompts: int = 512
    n: int = 4
    """Completions of each."""

    checkpoints: int = 10
    """Checkpoints measured on the way, for the frontier (1: the best one alone)."""

    batch_size: int = 128

    def __post_init__(self) -> None:
        at_least_one(self, "prompts", "n", "checkpoints")
