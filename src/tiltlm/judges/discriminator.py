"""The network, or the ensemble, that scores: r_phi of D2PO, with optimizers of its own that last from training to training.

    L = −log σ( r_phi(x, y_w) − r_phi(x, y_l) )        AdamW, a constant rate

Scoring runs in evaluation mode, without dropout, and reads rows by their true lengths: a row's score depends on no other
row.

Several processes (`ranks`) share out the rows that are scored and those of every update; all come to each call here, with
the same arguments.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tiltlm import parts, ranks
from tiltlm.engine import Engine, Optim
from tiltlm.judges.base import Row
from tiltlm.judges.networks import TOGETHER
from tiltlm.judges.rows import Preference
from tiltlm.models.weights import put
from tiltlm.rewards.bradley_terry import BradleyTerry, Comparisons
from tiltlm.samples import Pairs, Samples
from tiltlm.seeds import Stream
from tiltlm.tensors import load_tensors, save_tensors


class Network(Protocol):
    """What a discriminator is made of, a torch module: `RewardModel`, `LogRatio`, `LastValue`."""

    def encode(self, prompts: Sequence[Any], completions: Sequence[Any], together: int = 1) -> Samples:
        """Rows in the network's own tokens; `together` as in `RewardModel.encode`."""

    def score(self, samples: Samples) -> Tensor:
        """r of every row, [N], with gradient."""


@dataclass(frozen=True)
class Scores:
    """r of rows: the mean over members, and every member's own [members][rows]."""

    mean: list[float]
    members: list[list[float]]


class Discriminator:
    """`networks` (modules, one a member), each trained by itself on the same verdicts, in orders of its own.

    shard: several processes hold a part of every network each, and all of one at a time while it scores.
    """

    def __init__(
        self,
        networks: Sequence[Any],
        lr: float = 1e-4,
        batch_size: int = 16,
        shard: bool = False,
        micro_batch: int = 0,
    ) -> None:
        self.networks, self.batch_size = [network.eval() for network in networks], batch_size
        self.engines = [
            Engine(network, Optim(lr=lr, micro_batch=micro_batch, shard=shard)) for network in self.networks
        ]

    def score(self, prompts: Sequence[Row], completions: Sequence[Row]) -> Scores:
        """r of every row."""
        members = []
        for network, engine in zip(self.networks, self.engines, strict=True):
            with engine.whole():
                members.append(_shared(network, prompts, completions))
        return averaged(members)

    def train(self, preferences: Sequence[Preference], epochs: int, own: Stream) -> None:
        """So many passes over the verdicts, every one in a new order. Raises FloatingPointError where one diverges."""
        for member, (network, engine) in enumerate(zip(self.networks, self.engines, strict=True)):
            with engine.whole():
                data = compared(network, preferences, engine.device)
            with torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []):
                network.train()
                self._passes(engine, data, epochs, own.child(member))
                network.eval()

    def _passes(self, engine: Engine, data: Comparisons, epochs: int, own: Stream) -> None:
        for epoch in range(epochs):
            order = own.child("order", epoch).permutation(len(data))
            for k, some in enumerate(order.split(self.batch_size)):
                own.child("dropout", epoch, k, *ranks.others()).seed_everything()
                engine.update(BradleyTerry(), data.select(some.to(engine.device)))

    def snapshot(self) -> list[Any]:
        """Copies of the networks as they are now, for `scores_of` while these go on learning."""
        return [copy.deepcopy(network).requires_grad_(False) for network in self.networks]

    def save(self, folder: Path) -> None:
        """Write what is trained, and the optimizers, to a new folder: of networks in parts, every process its own."""
        for member, (network, engine) in enumerate(zip(self.networks, self.engines, strict=True)):
            place = folder / f"member-{member}"
            if engine.divided:
                engine.write_part(place)
            elif ranks.is_first():
                place.mkdir(parents=True)
                save_tensors(trained(network), place / "trained.safetensors")
                torch.save(engine.state(), place / "optimizer.pt")

    def restore(self, folder: Path) -> None:
        """Take what `save` wrote, whoever did, bit by bit. Raises ValueError where it is of other networks."""
        for member, (network, engine) in enumerate(zip(self.networks, self.engines, strict=True)):
            place, own = folder / f"member-{member}", trained(network)
            if parts.are_in(place):
                parts.read(place, network, engine.optimizer)
                continue
            found = load_tensors(place / "trained.safetensors", engine.device)
            if {name: x.shape for name, x in found.items()} != {name: x.shape for name, x in own.items()}:
                raise ValueError(
                    f"{place} holds another judge: name the model, members and lora-rank it was made of"
                )
            put(own, found)
            engine.load_state(torch.load(place / "optimizer.pt", weights_only=True))


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: x for name, x in network.named_parameters() if x.requires_grad}


def compared(network: Network, preferences: Sequence[Preference], device: torch.device) -> Comparisons:
    """Verdicts in the network's tokens; the two sides of one see equally much of their prompt."""
    n = len(preferences)
    prompts, chosen, rejected = ([each[k] for each in preferences] for k in range(3))
    both = network.encode([*prompts, *prompts], [*chosen, *rejected], together=2)
    pairs = Pairs(both.select(slice(0, n)), both.select(slice(n, 2 * n)))
    return Comparisons(pairs, torch.zeros(n, device=device))


def scores_of(networks: Sequence[Network], prompts: Sequence[Row], completions: Sequence[Row]) -> Scores:
    """r of every row by every network, and their mean."""
    return averaged([_scored(network, prompts, completions) for network in networks])


def averaged(members: list[list[float]]) -> Scores:
    """What each member says of the rows, and their mean."""
    mean = members[0] if len(members) == 1 else torch.tensor(members, dtype=torch.float64).mean(0).tolist()
    return Scores(mean, members)


def _shared(network: Network, prompts: Sequence[Row], completions: Sequence[Row]) -> list[float]:
    """`_scored`, of several processes each scoring its share of the rows."""
    return ranks.in_shares(
        len(prompts), lambda begin, end: _scored(network, prompts[begin:end], completions[begin:end])
    )


@torch.no_grad()
def _scored(network: Network, prompts: Sequence[Row], completions: Sequence[Row]) -> list[float]:
    """Rows of like length together: as little padding as may be."""
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]) + len(completions[k]))
    found = [0.0] * len(order)
    for begin in range(0, len(order), TOGETHER):
        some = order[begin : begin + TOGETHER]
        rows = network.encode([prompts[k] for k in some], [completions[k] for k in some])
        scores = [score for part in rows.passes() for score in network.score(rows.select(part)).tolist()]
        for k, score in zip(some, scores, strict=True):
            found[k] = score
    return found
