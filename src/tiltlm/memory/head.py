"""What the output head takes (`models.scoring`): it goes through the vocabulary tile by tile, in places that depend on the
tokens, so it is not run but counted by hand.

    kept       states where it reads them, in the dtype of its products; in bfloat16 a copy of its weights
    forward    besides: states as they were and in float32; the level's factors and their products; tiles
    backward   besides: the states' gradient and its addend, the weights' gradient and a tile of it; tiles

A tile is logits in float32 and what they are made of: the bfloat16 product before it, a curve's slope or the logits of a
reference under them; the tile before is let go when the next is there.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiltlm.models.scoring import CHUNK_ENTRIES

FLOAT, HALF = 4, 2
"""Bytes of a number in float32 and in bfloat16."""

PLACE = FLOAT + 4 * 8
"""Bytes that are kept of a place beside states: a norm, and four indices by which states and targets are found."""


@dataclass(frozen=True)
class Head:
    """A head that scores, `width` numbers a place to `vocabulary` logits.

    trained: its weights have a gradient. under: the logits of a reference's head, as large, are added (a twist's).
    """

    places: int
    width: int
    vocabulary: int
    bfloat16: bool = False
    trained: bool = False
    under: bool = False

    @property
    def kept(self) -> int:
        """Bytes from the forward pass to the backward pass."""
        weights = self.vocabulary * self.width
        once = HALF * (self._states + weights) if self.bfloat16 else FLOAT * self._states
        return once * (2 if self.under else 1) + PLACE * self.places

    @property
    def forward(self) -> int:
        """The most bytes while log-probabilities are made."""
        return self.kept + 2 * FLOAT * self._states + max(self._level, self._tiles)

    @property
    def backward(self) -> int:
        """The most bytes while their gradients are made."""
        back = 2 * FLOAT * self._states
        if self.trained:
            back += self.width * (FLOAT * self.vocabulary + (HALF if self.bfloat16 else FLOAT) * self._tile)
        return self.kept + max(self._level, back + self._tiles)

    @property
    def _states(self) -> int:
        return self.places * self.width

    @property
    def _level(self) -> int:
        """States and the weights of their targets, these in bfloat16 too, and products."""
        return (3 * FLOAT + HALF) * self._states if self.bfloat16 else 0

    @property
    def _tile(self) -> int:
        """Entries of the vocabulary in a tile."""
        entries = 2 * CHUNK_ENTRIES if self.bfloat16 else CHUNK_ENTRIES
        return min(self.vocabulary, max(self.width, entries // max(1, self.places)))

    @property
    def _tiles(self) -> int:
        """Bytes: of a tile, what is made of it and what it is made of, and of the tile before."""
        number = FLOAT + (HALF if self.bfloat16 else 0)
        several = 2 if self._tile < self.vocabulary else 1
        return self.places * self._tile * (several * number + FLOAT + (number if self.under else 0))
