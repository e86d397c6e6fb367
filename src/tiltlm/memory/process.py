"""What one of several processes holds, and at which part of a step it holds the most.

    held all the time   weights, gradients (a step's last until the next ones) and AdamW's two moments, float32
    beside them         the most that any part of a step needs: drawing, scoring, an update

With weights in parts (`sharded`) a process holds its share of them, and beside it two layers and what stands outside the
layers while an update computes, their gradients with them, and the whole of all divided networks while new rows are drawn
and scored; of a judge's while it scores. Before they are divided every process holds the whole.

With `--shard` no network is ever whole: of those that are not trained a process holds its slice of the layers and what
stands outside these, and beside that a layer while it computes. On a CPU the first process reads one network after the
other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from tiltlm.memory.head import FLOAT
from tiltlm.memory.network import Network, Pass

Kind = Literal["draw", "score", "update"]


@dataclass(frozen=True)
class Use:
    """What a part of a step does with a network. Uses that are called alike happen together; `score`s one by one."""

    part: str
    kind: Kind
    batch: Pass


@dataclass(frozen=True)
class Held:
    """A network that a process holds.

    processes   that hold a part of its weights each
    copies      held and trained side by side, used one by one (the members of an ensemble)
    inside      its weights are another network's, counted there (a head on the reference's own body)
    apart       divided, it is whole while it scores alone, and a copy at a time; what the step trains is whole from the
                drawing of new rows to its update
    by_layers   it is never whole (`--shard`)
    """

    name: str
    network: Network
    uses: tuple[Use, ...] = ()
    processes: int = 1
    copies: int = 1
    inside: bool = False
    apart: bool = False
    by_layers: bool = False

    @property
    def parameters(self) -> int:
        return self.copies * (self.network.own if self.inside else self.network.parameters)

    @property
    def weights(self) -> int:
        """Bytes all the time."""
        frozen = self.by_layers and not self.network.trained
        everywhere = self.copies * self.network.parts[1] if frozen else 0
        return FLOAT * (everywhere + (self.parameters - everywhere) // self.processes)

    @property
    def gradients(self) -> int:
        return FLOAT * self.copies * self.network.trained // self.processes

    @property
    def moments(self) -> int:
        return 2 * self.gradients

    @property
    def undivided(self) -> int:
        """Bytes of it in whole, where it is whole before its weights are divided, and while it is asked; else 0."""
        return FLOAT * self.parameters if self.processes > 1 and not self.by_layers else 0

    @property
    def gathered(self) -> int:
        """Bytes of weights, and of their gradients, that are brought together while an update computes."""
        if self.processes == 1:
            return 0
        if self.inside:
            return FLOAT * 2 * self.network.own + (self._layer(True) if self.by_layers else 0)
        layer, rest = self.network.parts
        return FLOAT * (2 * layer + rest + sum(self.network.trained_parts))

    def together(self, part: str) -> int:
        """Bytes of it that are brought together in a part of a step."""
        kinds = {use.kind for use in self.uses if use.part == part}
        if "update" in kinds:
            return self.gathered
        if self.by_layers:
            return self._layer(bool(kinds))
        if self.apart:
            return self.undivided // self.copies if kinds else 0
        return self.undivided

    def _layer(self, asked: bool) -> int:
        """Bytes of it that are together while a layer computes: of what is trained with what stands outside the layers."""
        layer, rest = self.network.parts
        if self.inside:
            return FLOAT * (layer * asked + self.network.own)
        if not self.network.trained:
            return FLOAT * layer if asked else 0
        return FLOAT * (2 * layer * asked + rest) if asked or not self.apart else 0

    def beside(self, use: Use) -> int:
        """Bytes that a use needs beside weights, gradients and moments."""
        return _needed(self.network, use.kind, use.batch)


def _together(uses: list[tuple[Kind, int]]) -> int:
    """What uses of one part need: networks score one after the other, and draw and learn side by side."""
    needed = [value for _, value in uses]
    return max(needed) if uses[0][0] == "score" else sum(needed)


@cache
def _needed(network: Network, kind: Kind, batch: Pass) -> int:
    """Bytes that a pass needs; networks are few, and asked for the same ones again and again."""
    return {"draw": network.draw, "score": network.score, "update": network.update}[kind](batch)


@dataclass(frozen=True)
class Process:
    """The networks that a process holds; all bytes are of one process."""

    held: tuple[Held, ...]

    @property
    def always(self) -> int:
        return sum(each.weights + each.gradients + each.moments for each in self.held)

    @cached_property
    def parts(self) -> dict[str, int]:
        """What every part of a step needs beside that, in its order."""
        found: dict[str, list[tuple[Kind, int]]] = {}
        for each in self.held:
            for use in each.uses:
                found.setdefault(use.part, []).append((use.kind, each.beside(use)))
        return {part: _together(uses) + self.gathered(part) for part, uses in found.items()}

    def gathered(self, part: str) -> int:
        """Bytes of divided networks that are brought together in a part."""
        return sum(each.together(part) for each in self.held)

    @property
    def start(self) -> int:
        """While the weights are still to be divided: all networks whole, nothing trained yet; 0 where nothing is."""
        if not any(each.undivided for each in self.held):
            return self._reading
        return sum(each.undivided or each.weights for each in self.held)

    @property
    def _reading(self) -> int:
        """Bytes of the first process on a CPU, where every network is read by it alone: the largest whole, the others in
        parts. (For GPUs it reads into its machine's memory.)"""
        read = [FLOAT * each.parameters // each.copies for each in self.held if each.by_layers]
        gpu = any(use.batch.gpu for each in self.held for use in each.uses)
        return 0 if gpu or not read else max(read) + sum(each.weights for each in self.held)

    @property
    def when(self) -> str:
        """The part at which it holds the most."""
        if self.start > self.always + max(self.parts.values(), default=0):
            return "the start"
        return max(self.parts, key=lambda name: self.parts[name], default="a step")

    @property
    def most(self) -> int:
        """Bytes at that part."""
        return max(self.start, self.always + max(self.parts.values(), default=0))
