"""From a body's hidden states to logits: the output head, and what the network makes of what it gives.

Between body and logits a network may do more than W·h + b. Here it is, whatever the configuration calls it,

    logits = curve(W·entry(h) + b),      curve(x) = cap·tanh(scale·x/cap)/temperature      (no cap: scale·x/temperature)

with `entry` a factor (MiniCPM3 divides its states) or a module (BERT's kin transform theirs). Nobody's field names are
trusted with this: `look` runs the network once, puts numbers of its own choice, up to 20000 in size, in the place of
what the head gave, and reads the curve off the logits that come out. What is neither scale nor soft cap is refused.

Half precision (weights in it, or float32 weights under autocast) multiplies in 16 bits and adds up in float32, but a matrix
kernel rounds what it hands over to 16 bits again: 2⁻⁸ of a logit of 100 is 0.4 nats. Hence `level`, one number a
row near the logits that matter: taken off inside the kernel, before it rounds, and added again in float32,

    logits = round(W·h − level) + level.

Decoding takes the largest of the first logits, scoring the target's own (`scoring.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)
"""Dtypes whose matrix products are rounded around a level."""

LEVEL_ENTRIES = 1024
"""Vocabulary entries whose largest logit is the level while decoding: the first ones, in most tokenizers the commonest.
They are multiplied twice."""

DECODING_TILE = 1024
"""Vocabulary entries per matrix product while decoding on a CPU: 1.5 times as fast as one product over 50257."""

HALF_TILE = 4096
"""The same in half precision: a product that is faster wants larger tiles."""


@dataclass(frozen=True)
class Curve:
    """What becomes of W·h + b: cap·tanh(scale·x/cap)/temperature; without a cap scale·x/temperature.

    entries: how many of the head's outputs are logits, the first ones (None: all; some heads are padded).
    """

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0
    entries: int | None = None

    @property
    def straight(self) -> bool:
        """Whether it leaves every entry as it is."""
        return self.cap is None and self.scale == self.temperature

    def __call__(self, x: Tensor) -> Tensor:
        """The curve of every entry of `x`."""
        if self.cap is None:
            return x if self.straight else x * (self.scale / self.temperature)
        return torch.tanh(x * (self.scale / self.cap)) * (self.cap / self.temperature)

    def in_place(self, x: Tensor) -> Tensor:
        """The same, written over `x`."""
        if self.cap is None:
            return x if self.straight else x.mul_(self.scale / self.temperature)
        return x.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)

    def slope(self, y: Tensor) -> Tensor | float:
        """The derivative where the curve's value is `y`."""
        steepest = self.scale / self.temperature
        if self.cap is None:
            return steepest
        return (y * (self.temperature / self.cap)).square_().neg_().add_(1).mul_(steepest)


STRAIGHT = Curve()
"""Logits as the head gives them."""


def head_logits(states: Tensor, head: nn.Linear, curve: Curve = STRAIGHT) -> Tensor:
    """curve(head(states)), [M, D] -> [M, V]; on a CPU and without gradients, tile by tile of a large vocabulary.

    Of half-precision products in float32; see the module's docstring.
    """
    size, dtype = head.weight.shape[0], dtype_of_products(head.weight)
    if dtype in HALF:
        logits = _levelled_logits(states.to(dtype), head.weight.to(dtype))
        return curve(_plus(logits, head.bias)[..., : curve.entries])
    if torch.is_grad_enabled() or states.device.type != "cpu" or size <= 4 * DECODING_TILE:
        return curve(head(states)[..., : curve.entries])
    logits = states.new_empty(len(states), size)
    for tile in tiles(size, DECODING_TILE):
        torch.mm(states, head.weight[tile].t(), out=logits[:, tile])
    return curve.in_place(_plus(logits, head.bias))[:, : curve.entries]


def _levelled_logits(states: Tensor, weight: Tensor) -> Tensor:
    """W·h in float32, [..., D] -> [..., V], of half-precision products, rounded around a level a row."""
    rows = states.reshape(-1, states.shape[-1])
    with torch.autocast(states.device.type, enabled=False):
        with torch.no_grad():
            level = (rows @ weight[:LEVEL_ENTRIES].t()).amax(1, keepdim=True)
        if torch.is_grad_enabled():
            logits = torch.addmm(level, rows, weight.t(), beta=-1) + level.float()
        else:
            logits, wide = level.new_empty(len(rows), len(weight), dtype=torch.float32), level.float()
            for tile in tiles(len(weight), HALF_TILE):
                part = logits[:, tile].copy_(torch.addmm(level, rows, weight[tile].t(), beta=-1))
                part += wide
    return logits.unflatten(0, states.shape[:-1])


def _plus(logits: Tensor, bias: Tensor | None) -> Tensor:
    return logits if bias is None else logits.add_(bias)


def dtype_of_products(weight: Tensor) -> torch.dtype:
    """What products with `weight` are made in: its own dtype, or autocast's, as for any layer (never of float64)."""
    kind = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def tiles(size: int, width: int) -> list[slice]:
    """`size` entries, `width` at a time."""
    return [slice(begin, min(begin + width, size)) for begin in range(0, size, width)]
