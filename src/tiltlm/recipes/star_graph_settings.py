"""The settings of the star-graph recipes. Defaults are the walker's; the paper's are in `star_graph.paper`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tiltlm.data.star_graph import StarGraph
from tiltlm.engine import Optim
from tiltlm.policies.reinforce import Baseline
from tiltlm.recipes.fitting import Fit
from tiltlm.train import Pace


@dataclass(frozen=True)
class World:
    """Which graphs, and how many."""

    degree: int = 2
    """Arms of a graph."""

    path_length: int = 3
    """Nodes of an arm, the start included."""

    nodes: int = 10
    """Node labels to choose from."""

    reverse: bool = False
    """Write paths goal first."""

    teacherless: bool = False
    """Predict all tokens of a path at once, from the prompt and dummies."""

    pretrain: int = 0
    """Graphs for pre-training; 0: fresh ones at every step (with a folder: all there are)."""

    posttrain: int = 8000
    """Graphs for everything after pre-training."""

    test: int = 1000
    """Graphs for measuring."""

    imitate: Literal["random_arm", "goal"] = "random_arm"
    """What pre-training copies: a random arm of each graph (the walker), or the path to the goal (the paper)."""

    folder: str = ""
    """Read the original's text files in this folder (the first `posttrain`, … graphs), instead of generating."""

    def __post_init__(self) -> None:
        if min(self.pretrain, self.posttrain, self.test) < 0:
            raise ValueError(f"numbers of graphs must not be negative; got {self}")
        _ = self.graph  # impossible graphs are refused here, before any work

    @property
    def graph(self) -> StarGraph:
        return StarGraph(self.degree, self.path_length, self.nodes, self.reverse)


@dataclass(frozen=True)
class Network:
    """The language model: by name, or a GPT-2 from scratch."""

    name: str = ""
    """A hub name or folder; empty: from scratch, with the sizes below."""

    tokenizer: str = ""
    """A hub name or folder; empty: one token per node."""

    layers: int = 3
    width: int = 64
    heads: int = 4
    mlp: int = 128
    """Width of the feed-forward layers."""

    activation: str = "relu"
    init_std: float = 0.08
    """Standard deviation of the first weights."""

    dropout: float = 0.0
    device: str = "cpu"
    """cpu, cuda, cuda:N, mps, or auto: the first of cuda, mps and cpu that is there."""


@dataclass(frozen=True)
class Test:
    """How methods are measured."""

    graphs: int = 1000
    """Test graphs, at most the world's."""

    n: int = 1
    """Completions drawn per graph."""

    batch_size: int = 512
    """Rows at once; changes speed only."""


@dataclass(frozen=True)
class RolloutSettings:
    """What is drawn from the reference."""

    n: int = 2
    """Labelled completions per graph (0: none, only pairs)."""

    pairs: str = ""
    """Take the pairs from this .jsonl file, in the original's format, instead of drawing them."""

    max_tries: int = 1000
    """Draws per graph until the first wrong one, for the pairs."""

    batch_size: int = 1024
    """Rows at once; changes speed only."""


@dataclass(frozen=True)
class ValueSettings:
    """How the value model is trained, and on what."""

    data: Literal["rollouts", "pairs"] = "rollouts"
    """Labelled rollouts, or the paper's pairs (half right by construction, so not calibrated)."""

    start: Literal["reference", "pretrained"] = "reference"
    """The body's first weights: the trained reference's, or those of the network it began as."""

    head: Literal["v", "q"] = "v"
    """v reads a token and judges it; q judges every next token at once."""

    mlp_layers: int = 0
    """Hidden layers of the head (0: linear)."""

    lm_weight: float = 1.0
    """Weight of the language-modelling loss on the same completions."""

    fit: Fit = Fit(
        Optim(lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01),
        Pace(steps=4000, warmup=30, until=0.05, watch=("value_loss/2",)),
        batch_size=128,
    )


@dataclass(frozen=True)
class Goal:
    """The target's temperature: pi* ∝ pi_ref · exp(r / beta), with r = 1 for the right path, else 0."""

    beta: float = 0.1
    """Divides the reward: smaller leans harder on it."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive: it divides the reward; got {self.beta}")


@dataclass(frozen=True)
class Guide:
    """Guided decoding."""

    top_k: int = 4
    """The reference's likeliest tokens that the value scores at each step (0: all)."""

    temperature: float = 1.0
    """Divides the reference's logits before the value's offset is added."""

    also: tuple[float, ...] = (0.3, 1.0)
    """Further temperatures of the target at which Q# and CD are measured; one value model serves all."""

    calibrate: bool = False
    """Add the logit of the reference's mean success rate to a value learned on pairs, which leave it out."""

    def __post_init__(self) -> None:
        if not all(beta > 0 for beta in self.also):
            raise ValueError(f"beta must be positive: it divides the reward; got also {self.also}")


@dataclass(frozen=True)
class ReinforceSettings:
    """What REINFORCE weighs its samples by."""

    baseline: Baseline = "batch_mean"
    """none, batch_mean, or leave_one_out (needs n >= 2)."""

    beta: float = 0.0
    """Pull towards the reference; > 0 makes pi* of that beta the fixed point. The paper has none."""

    n: int = 1
    """Samples per graph and step."""

    wrong: float = 0.0
    """The reward of a wrong path (right: 1)."""


BASE_FIT = Fit(
    Optim(lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01),
    Pace(steps=4000, warmup=30, until=0.05, watch=("nll/3",)),
)
"""Pre-training of the walker: until the third token, which only looking up can tell, is known."""

POLICY_FIT = Fit(Optim(lr=3e-4, betas=(0.9, 0.98), weight_decay=0.01), Pace(steps=400, warmup=40))
"""Training of the walker's policies."""
