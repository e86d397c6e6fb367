"""From a body's hidden states to logits: the output head, and what the network makes of what it gives.

Between body and logits a network may do more than W·h + b. Here it is, whatever the configuration calls it,

    logits = curve(W·entry(h) + b),      curve(x) = cap·tanh(scale·x/cap)/temperature      (no cap: scale·x/temperature)

with `entry` a factor (MiniCPM3 divides its states) or a module (BERT's kin transform theirs). Nobody's field names are
trusted with this: `look` runs the network once, puts numbers of its own choice, up to 20000 in size, in the place of
what the head gave, and reads the curve off the logits that come out. What is neither scale nor soft cap is refused.

Scoring never holds [B, T, V]: the head is applied tile by tile of the vocabulary. In the backward pass a tile's logits
are computed again instead of kept; with p = softmax(logits) and g, one number a row, the gradient reaching log p(y),

    d = (p − onehot(y)) · curve′,    dh = −g · d·W,    dW = dᵀ·(−g·h),
    curve′ = scale/temperature · (1 − (logits·temperature/cap)²).

A tile is computed as W·hᵀ, [tile, M]: each row of dW is then written once, and matrix kernels of the CPU take
their arguments as they lie (1.7 times the speed of h·Wᵀ over the whole of a large vocabulary).

Half precision (weights in it, or float32 weights under autocast) multiplies in 16 bits and adds up in float32, but a matrix
kernel rounds what it hands over to 16 bits again: 2⁻⁸ of a logit of 100 is 0.4 nats. Hence `level`, one number a
row near the logits that matter: taken off inside the kernel, before it rounds, and added again in float32,

    logits = round(W·h − level) + level.

Scoring takes h·W[y], the target's own logit, so that what is rounded is a log-ratio to the target, and an error stays below
2⁻⁸ of what −log p(y) is made of. Softmax knows nothing of a number that a whole row lacks, so there nothing but a cap wants
it back; and p(v)/p(y), a factor p(y) apart what d is made of, is the exponential of what the kernel hands over, in 16 bits
as the next products want it. Decoding takes the largest of the first logits. Softmax and sums are float32.
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

HALF = (torch.bfloat16, torch.float16)
"""Dtypes whose matrix products are rounded around a level."""

FAR = 40.0
"""−log p(y) from which p(v)/p(y) is not made in bfloat16: its largest number is exp(88), and a gradient multiplies it."""

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


@dataclass(frozen=True)
class Fixed:
    """Logits added without gradient, curve(head(states)): a reference under a twist. states [M, D']."""

    states: Tensor
    head: nn.Linear
    curve: Curve = STRAIGHT


def head_logits(states: Tensor, head: nn.Linear, curve: Curve = STRAIGHT) -> Tensor:
    """curve(head(states)), [M, D] -> [M, V]; on a CPU and without gradients, tile by tile of a large vocabulary.

    Of half-precision products in float32; see the module's docstring.
    """
    size, dtype = head.weight.shape[0], _dtype_of_products(head.weight)
    if dtype in HALF:
        logits = _levelled_logits(states.to(dtype), head.weight.to(dtype))
        return curve(_plus(logits, head.bias)[..., : curve.entries])
    if torch.is_grad_enabled() or states.device.type != "cpu" or size <= 4 * DECODING_TILE:
        return curve(head(states)[..., : curve.entries])
    logits = states.new_empty(len(states), size)
    for tile in _tiles(size, DECODING_TILE):
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
            for tile in _tiles(len(weight), HALF_TILE):
                part = logits[:, tile].copy_(torch.addmm(level, rows, weight[tile].t(), beta=-1))
                part += wide
    return logits.unflatten(0, states.shape[:-1])


def _plus(logits: Tensor, bias: Tensor | None) -> Tensor:
    return logits if bias is None else logits.add_(bias)


def head_log_prob(
    states: Tensor, head: nn.Linear, targets: Tensor, fixed: Fixed | None = None, curve: Curve = STRAIGHT
) -> Tensor:
    """log softmax(curve(head(states)))[targets] in float32 or wider: [M, D], [M] -> [M], tile by tile both ways."""
    dtype, under = _dtype_of_products(head.weight), None
    entries = 2 * CHUNK_ENTRIES if dtype in HALF else CHUNK_ENTRIES  # a product that is faster wants larger tiles
    width = max(states.shape[1], entries // max(1, len(states)))
    other = dtype if fixed is None else _dtype_of_products(fixed.head.weight)
    with torch.autocast(states.device.type, enabled=False):
        if fixed is not None:
            weight = fixed.head.weight.detach().to(other)
            under = _Logits.of(fixed.states.detach(), weight, _bias(fixed.head).detach(), targets, fixed.curve)
        return _HeadLogProb.apply(states.to(dtype), head.weight, _bias(head), targets, width, curve, under)


def _dtype_of_products(weight: Tensor) -> torch.dtype:
    """What products with `weight` are made in: its own dtype, or autocast's, as for any layer (never of float64)."""
    kind = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _bias(head: nn.Linear) -> Tensor:
    """The head's bias; an empty tensor where it has none."""
    return head.bias if head.bias is not None else head.weight.new_zeros(0)


def _tiles(size: int, width: int) -> list[slice]:
    return [slice(begin, min(begin + width, size)) for begin in range(0, size, width)]


@dataclass(frozen=True)
class _Logits:
    """A head before its logits are made: states [M, D] and weight [V, D] of one dtype, bias [V] or empty.

    level [M]: what half-precision products are rounded around, in their dtype; None for wider ones.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor
    curve: Curve
    level: Tensor | None

    @staticmethod
    def of(states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, curve: Curve) -> _Logits:
        """`states` are taken to the weight's dtype; the level is the logit of each row's target."""
        states, level = states.to(weight.dtype), None
        if weight.dtype in HALF:
            level = (states.float() * weight[targets].float()).sum(1).to(weight.dtype)
        return _Logits(states, weight, bias, curve, level)

    @property
    def plain(self) -> bool:
        """Whether logits are products, neither bias nor curve between them."""
        return self.curve.straight and not self.bias.numel()

    def products(self, tile: slice) -> Tensor:
        """W·h of the vocabulary entries in `tile`, less the level, in their own dtype, [tile, M]."""
        weight, states = self.weight[tile], self.states.t()
        return weight @ states if self.level is None else torch.addmm(-self.level, weight, states)

    def __call__(self, tile: slice) -> Tensor:
        """Logits of the vocabulary entries in `tile`, float32 or wider, [tile, M]; each row up to a number of its own."""
        logits = self.products(tile)
        if self.level is not None:
            logits = logits.float()
            if self.curve.cap is not None:
                logits += self.level.float()
        if self.bias.numel():
            logits += self.bias[tile, None]
        return self.curve.in_place(logits)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """log Σ exp over the first dimension, written over `logits`: a third of the time of torch's."""
    top = logits.amax(0)
    return logits.sub_(top).exp_().sum(0).log_().add_(top)


def _targets_in(tile: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets lie in `tile`: their places inside it, and their places in the batch."""
    column = ((targets >= tile.start) & (targets < tile.stop)).nonzero()[:, 0]
    return targets[column] - tile.start, column


class _HeadLogProb(torch.autograd.Function):
    """See the module's docstring; states are in the dtype of the products. An empty bias stands for none."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        width: int,
        curve: Curve,
        under: _Logits | None,
    ) -> Tensor:
        made = _Logits.of(states, weight.to(states.dtype), bias, targets, curve)
        picked = states.new_empty(len(states), dtype=torch.promote_types(states.dtype, torch.float32))
        norms: list[Tensor] = []
        for tile in _tiles(curve.entries or len(weight), width):
            logits = made(tile)
            if under is not None:
                logits += under(tile)
            row, column = _targets_in(tile, targets)
            picked[column] = logits[row, column]
            norms.append(_log_sum_exp(logits))
        log_norm = _log_sum_exp(torch.stack(norms))
        ctx.save_for_backward(states, made.weight, bias, targets, log_norm)
        ctx.width, ctx.curve, ctx.under, ctx.dtype = width, curve, under, weight.dtype
        return picked - log_norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return (*_HeadLogProb._backward(ctx, grad), None, None, None, None)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, log_norm = ctx.saved_tensors
        slopes = _slopes(_Logits.of(states, weight, bias, targets, ctx.curve), ctx.under, targets, log_norm)
        factor = -grad * slopes.factor
        weighed = (states * factor[:, None]).to(states.dtype)
        to_states = torch.zeros_like(states, dtype=grad.dtype) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] and bias.numel() else None
        for tile in _tiles(ctx.curve.entries or len(weight), ctx.width):
            d = slopes(tile)
            if to_bias is not None:
                to_bias[tile] = d @ factor
            d = d.to(states.dtype)
            if to_states is not None:
                to_states += d.t() @ weight[tile]
            if to_weight is not None:
                to_weight[tile] = d @ weighed
        if to_states is not None:
            to_states = to_states.mul_(factor[:, None]).to(states.dtype)
        return to_states, to_weight, to_bias


def _slopes(made: _Logits, under: _Logits | None, targets: Tensor, log_norm: Tensor) -> _Slopes:
    """The slopes of log p(y), log_norm the log Σ exp of what `made`, and `under` with it, gives."""
    narrow = under is None and made.plain and made.states.dtype == torch.bfloat16
    if narrow and bool(log_norm.max() < FAR):
        return _NarrowSlopes(made, None, targets, log_norm, (-log_norm).exp())
    return _Slopes(made, under, targets, log_norm, torch.ones_like(log_norm))


@dataclass(frozen=True)
class _Slopes:
    """d = −∂ log p(y) / ∂(W·h), tile by tile, but for a factor [M] of each row."""

    made: _Logits
    under: _Logits | None
    targets: Tensor
    log_norm: Tensor
    factor: Tensor

    def __call__(self, tile: slice) -> Tensor:
        """(p − onehot(y))·curve′, [tile, M], float32 or wider."""
        logits = self.made(tile)
        slope = self.made.curve.slope(logits)
        if self.under is not None:
            logits += self.under(tile)
        d = logits.sub_(self.log_norm).exp_()
        d[_targets_in(tile, self.targets)] -= 1
        return d if self.made.curve.straight else d.mul_(slope)


class _NarrowSlopes(_Slopes):
    """The same of logits that are nothing but products in bfloat16, ln p(v)/p(y), where no −log p(y) is FAR."""

    def __call__(self, tile: slice) -> Tensor:
        """(p − onehot(y))/p(y), [tile, M], in the dtype of products; p(y) − 1 is rounded once, however small."""
        d, places = self.made.products(tile), _targets_in(tile, self.targets)
        own = d[places].to(self.log_norm.dtype).exp_() - self.log_norm[places[1]].exp()
        d.exp_()[places] = own.to(d.dtype)
        return d
