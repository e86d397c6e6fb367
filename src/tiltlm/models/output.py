"""From a body's hidden states to logits: the output head, and what the network makes of what it gives.

Between body and logits a network may do more than W·h + b. Here it is, whatever the configuration calls it,

    logits = curve(W·entry(h) + b),      curve(x) = cap·tanh(scale·x/cap)/temperature      (no cap: scale·x/temperature)

with `entry` a factor (MiniCPM3 divides its states) or a module (BERT's kin transform theirs). Nobody's field names are
trusted with this: `look` runs the network once, puts numbers of its own choice, up to 20000 in size, in the place of
what the head gave, and reads the curve off the logits that come out. What is neither scale nor soft cap is refused.

Scoring never holds [B, T, V]: the head is applied tile by tile of the vocabulary. In the backward pass a tile's logits
are computed again instead of kept; with p = softmax(logits) and g the gradient reaching log p(y),

    d = g · (onehot(y) − p) · curve′,    dh = d·W,    dW = dᵀ·h,
    curve′ = scale/temperature · (1 − (logits·temperature/cap)²).

A tile is computed as W·hᵀ, [tile, M]: each row of dW is then written once, and matrix kernels of the CPU take
their arguments as they lie (1.7 times the speed of h·Wᵀ over the whole of a large vocabulary).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_ENTRIES = 1_000_000
"""Logits held at once while scoring, in entries: 4 MB of float32, which stays inside the processor's cache.

Never fewer than there are entries in the hidden states: thinner tiles would save no memory that matters.
"""

DECODING_TILE = 1024
"""Vocabulary entries per matrix product while decoding on a CPU: 1.5 times as fast as one product over 50257."""


@dataclass(frozen=True)
class Curve:
    """What becomes of W·h + b: cap·tanh(scale·x/cap)/temperature; without a cap scale·x/temperature.

    entries: how many of the head's outputs are logits, the first ones (None: all; some heads are padded).
    """

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0
    entries: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The curve of every entry of `x`."""
        if self.cap is None:
            factor = self.scale / self.temperature
            return x if factor == 1 else x * factor
        return torch.tanh(x * (self.scale / self.cap)) * (self.cap / self.temperature)

    def in_place(self, x: Tensor) -> Tensor:
        """The same, written over `x`."""
        if self.cap is None:
            factor = self.scale / self.temperature
            return x if factor == 1 else x.mul_(factor)
        return x.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)

    def slope(self, y: Tensor) -> Tensor | float:
        """The derivative where the curve's value is `y`."""
        steepest = self.scale / self.temperature
        if self.cap is None:
            return steepest
        return (y * (self.temperature / self.cap)).square_().neg_().add_(1).mul_(steepest)


STRAIGHT = Curve()
"""Logits as the head gives them."""


@dataclass(frozen=True)
class Fixed:
    """Logits added without gradient, curve(head(states)): a reference under a twist. states [M, D']."""

    states: Tensor
    head: nn.Linear
    curve: Curve = STRAIGHT


def head_logits(states: Tensor, head: nn.Linear, curve: Curve = STRAIGHT) -> Tensor:
    """curve(head(states)), [M, D] -> [M, V]; on a CPU and without gradients, tile by tile of a large vocabulary."""
    size = head.weight.shape[0]
    if torch.is_grad_enabled() or states.device.type != "cpu" or size <= 4 * DECODING_TILE:
        return curve(head(states)[..., : curve.entries])
    logits = states.new_empty(len(states), size)
    for tile in _tiles(size, DECODING_TILE):
        torch.mm(states, head.weight[tile].t(), out=logits[:, tile])
    return curve.in_place(logits if head.bias is None else logits.add_(head.bias))[:, : curve.entries]


def head_log_prob(
    states: Tensor, head: nn.Linear, targets: Tensor, fixed: Fixed | None = None, curve: Curve = STRAIGHT
) -> Tensor:
    """log softmax(curve(head(states)))[targets] in float32 or wider: [M, D], [M] -> [M], tile by tile both ways."""
    width = max(states.shape[1], CHUNK_ENTRIES // max(1, len(states)))
    states, under = states.to(head.weight.dtype), None
    if fixed is not None:
        weight = fixed.head.weight.detach()
        under = fixed.states.detach().to(weight.dtype), weight, _bias(fixed.head).detach(), fixed.curve
    with torch.autocast(states.device.type, enabled=False):
        return _HeadLogProb.apply(states, head.weight, _bias(head), targets, width, curve, under)


def _bias(head: nn.Linear) -> Tensor:
    """The head's bias; an empty tensor where it has none."""
    return head.bias if head.bias is not None else head.weight.new_zeros(0)


def _tiles(size: int, width: int) -> list[slice]:
    return [slice(begin, min(begin + width, size)) for begin in range(0, size, width)]


Under = tuple[Tensor, Tensor, Tensor, Curve] | None
"""States, weight, bias and curve of a head whose logits are added without gradient."""


def _logits_of(tile: slice, states: Tensor, weight: Tensor, bias: Tensor, curve: Curve) -> Tensor:
    """Logits of the vocabulary entries in `tile`, float32 or wider, [tile, M]."""
    logits = weight[tile] @ states.t()
    if bias.numel():
        logits += bias[tile, None]
    return curve.in_place(logits.to(torch.promote_types(logits.dtype, torch.float32)))


def _targets_in(tile: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets lie in `tile`: their places inside it, and their places in the batch."""
    column = ((targets >= tile.start) & (targets < tile.stop)).nonzero()[:, 0]
    return targets[column] - tile.start, column


class _HeadLogProb(torch.autograd.Function):
    """See the module's docstring. An empty bias stands for none."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        width: int,
        curve: Curve,
        under: Under,
    ) -> Tensor:
        picked = states.new_empty(len(states), dtype=torch.promote_types(states.dtype, torch.float32))
        norms: list[Tensor] = []
        for tile in _tiles(curve.entries or len(weight), width):
            logits = _logits_of(tile, states, weight, bias, curve)
            if under is not None:
                logits += _logits_of(tile, *under)
            row, column = _targets_in(tile, targets)
            picked[column] = logits[row, column]
            norms.append(logits.logsumexp(0))
        log_norm = torch.stack(norms).logsumexp(0)
        ctx.save_for_backward(states, weight, bias, targets, log_norm)
        ctx.width, ctx.curve, ctx.under = width, curve, under
        return picked - log_norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return (*_HeadLogProb._backward(ctx, grad), None, None, None, None)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, log_norm = ctx.saved_tensors
        to_states = torch.zeros_like(states, dtype=grad.dtype) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] and bias.numel() else None
        for tile in _tiles(ctx.curve.entries or len(weight), ctx.width):
            logits = _logits_of(tile, states, weight, bias, ctx.curve)
            slope = ctx.curve.slope(logits)
            if ctx.under is not None:
                logits += _logits_of(tile, *ctx.under)
            d = logits.sub_(log_norm).exp_().mul_(-grad)
            row, column = _targets_in(tile, targets)
            d[row, column] += grad[column]
            if ctx.curve != STRAIGHT:
                d *= slope
            if to_bias is not None:
                to_bias[tile] = d.sum(1)
            d = d.to(states.dtype)
            if to_states is not None:
                to_states += d.t() @ weight[tile]
            if to_weight is not None:
                torch.mm(d, states, out=to_weight[tile])
        return None if to_states is None else to_states.to(states.dtype), to_weight, to_bias
