"""Log-probabilities of tokens through the output head (`output.py`), tile by tile of the vocabulary both ways.

[B, T, V] is never held. In the backward pass a tile's logits are computed again instead of kept; with p = softmax(logits)
and g, one number a row, the gradient reaching log p(y),

    d = (p − onehot(y)) · curve′,    dh = −g · d·W,    dW = dᵀ·(−g·h),
    curve′ = scale/temperature · (1 − (logits·temperature/cap)²).

A tile is computed as W·hᵀ, [tile, M]: each row of dW is then written once, and matrix kernels of the CPU take
their arguments as they lie (1.7 times the speed of h·Wᵀ over the whole of a large vocabulary).

In half precision the level is h·W[y], the target's own logit: what is rounded is a log-ratio to the target, and an error
stays below 2⁻⁸ of what −log p(y) is made of. Softmax knows nothing of a number that a whole row lacks, so nothing but a cap
wants the level back. Where neither bias nor curve is there, what the kernel hands over in bfloat16 is ln p(v)/p(y):

    −log p(y) = log Σ exp ln p(v)/p(y),    d = p(y) · (exp ln p(v)/p(y) − onehot(y)/p(y)),

the sum in float32, d, which is multiplied again, in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tiltlm.models.output import HALF, STRAIGHT, Curve, dtype_of_products, tiles

CHUNK_ENTRIES = 1_000_000
"""Logits held at once while scoring, in entries: 4 MB of float32, which stays inside the processor's cache.

Never fewer than there are entries in the hidden states: thinner tiles would save no memory that matters.
"""

FAR = 40.0
"""−log p(y) from which p(v)/p(y) is not made in bfloat16: its largest number is exp(88), and a gradient multiplies it."""


@dataclass(frozen=True)
class Fixed:
    """Logits added without gradient, curve(head(states)): a reference under a twist. states [M, D']."""

    states: Tensor
    head: nn.Linear
    curve: Curve = STRAIGHT


def head_log_prob(
    states: Tensor, head: nn.Linear, targets: Tensor, fixed: Fixed | None = None, curve: Curve = STRAIGHT
) -> Tensor:
    """log softmax(curve(head(states)))[targets] in float32 or wider: [M, D], [M] -> [M], tile by tile both ways."""
    dtype, under = dtype_of_products(head.weight), None
    entries = 2 * CHUNK_ENTRIES if dtype in HALF else CHUNK_ENTRIES  # a product that is faster wants larger tiles
    width = max(states.shape[1], entries // max(1, len(states)))
    other = dtype if fixed is None else dtype_of_products(fixed.head.weight)
    with torch.autocast(states.device.type, enabled=False):
        if fixed is not None:
            weight = fixed.head.weight.detach().to(other)
            under = _Logits.of(fixed.states.detach(), weight, _bias(fixed.head).detach(), targets, fixed.curve)
        return _HeadLogProb.apply(states.to(dtype), head.weight, _bias(head), targets, width, curve, under)


def _bias(head: nn.Linear) -> Tensor:
    """The head's bias; an empty tensor where it has none."""
    return head.bias if head.bias is not None else head.weight.new_zeros(0)


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


@dataclass(frozen=True)
class _Rows:
    """What is scored: rows' logits, those added to them if any, and their targets, int64 [M]."""

    made: _Logits
    under: _Logits | None
    targets: Tensor

    @property
    def narrow(self) -> bool:
        """Whether logits are products in bfloat16 and nothing else: they are ln p(v)/p(y) then."""
        made = self.made
        bare = self.under is None and made.curve.straight and not made.bias.numel()
        return bare and made.states.dtype == torch.bfloat16

    def logits(self, tile: slice) -> Tensor:
        """Those of the vocabulary entries in `tile`, [tile, M]."""
        logits = self.made(tile)
        return logits if self.under is None else logits.add_(self.under(tile))

    def targets_in(self, tile: slice) -> tuple[Tensor, Tensor]:
        """Which targets lie in `tile`: their places inside it, and their places in the batch."""
        column = ((self.targets >= tile.start) & (self.targets < tile.stop)).nonzero()[:, 0]
        return self.targets[column] - tile.start, column

    def scored(self, parts: list[slice], shifted: bool = True) -> tuple[Tensor, Tensor]:
        """The targets' logits and the log Σ exp of all, [M] each.

        shifted: by the largest of a tile, without which large logits have no exponential, and small ones no sum.
        """
        dtype = torch.promote_types(self.made.states.dtype, torch.float32)
        own, norms = self.targets.new_empty(len(self.targets), dtype=dtype), []
        for tile in parts:
            logits = self.logits(tile)
            row, column = self.targets_in(tile)
            own[column] = logits[row, column]
            norms.append(_log_sum_exp(logits) if shifted else logits.exp_().sum(0).log_())
        return own, _log_sum_exp(torch.stack(norms))


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
        rows = _Rows(_Logits.of(states, weight.to(states.dtype), bias, targets, curve), under, targets)
        parts = tiles(curve.entries or len(weight), width)
        own, log_norm = rows.scored(parts, shifted=not rows.narrow)
        if rows.narrow and not bool(log_norm.isfinite().all()):
            own, log_norm = rows.scored(parts)
        ctx.save_for_backward(states, rows.made.weight, bias, targets, log_norm)
        ctx.parts, ctx.curve, ctx.under, ctx.dtype = parts, curve, under, weight.dtype
        return own - log_norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return (*_HeadLogProb._backward(ctx, grad), None, None, None, None)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, log_norm = ctx.saved_tensors
        rows = _Rows(_Logits.of(states, weight, bias, targets, ctx.curve), ctx.under, targets)
        slopes = _slopes(rows, log_norm)
        factor = -grad * slopes.factor
        weighed = (states * factor[:, None]).to(states.dtype)
        to_states = torch.zeros_like(states, dtype=grad.dtype) if ctx.needs_input_grad[0] else None
        to_weight = torch.empty_like(weight, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] and bias.numel() else None
        for tile in ctx.parts:
            d = slopes(tile)
            if to_bias is not None:
                to_bias[tile] = d @ factor
            d = d.to(states.dtype)
            if to_states is not None:
                to_states += d.t() @ weight[tile]
            if to_weight is not None:
                to_weight[tile] = d @ weighed
        if to_weight is not None:
            to_weight[ctx.parts[-1].stop :] = 0
        if to_states is not None:
            to_states = to_states.mul_(factor[:, None]).to(states.dtype)
        return to_states, to_weight, to_bias


def _slopes(rows: _Rows, log_norm: Tensor) -> _Slopes:
    """The slopes of log p(y), log_norm [M] the log Σ exp of the rows' logits."""
    if rows.narrow and bool(log_norm.max() < FAR):
        return _NarrowSlopes(rows, log_norm, (-log_norm).exp())
    return _Slopes(rows, log_norm, torch.ones_like(log_norm))


@dataclass(frozen=True)
class _Slopes:
    """d = −∂ log p(y) / ∂(W·h), tile by tile, but for a factor [M] of each row."""

    rows: _Rows
    log_norm: Tensor
    factor: Tensor

    def __call__(self, tile: slice) -> Tensor:
        """(p − onehot(y))·curve′, [tile, M], float32 or wider."""
        logits, curve = self.rows.made(tile), self.rows.made.curve
        slope = curve.slope(logits)
        if self.rows.under is not None:
            logits += self.rows.under(tile)
        d = logits.sub_(self.log_norm).exp_()
        d[self.rows.targets_in(tile)] -= 1
        return d if curve.straight else d.mul_(slope)


class _NarrowSlopes(_Slopes):
    """The same of logits that are ln p(v)/p(y), where no −log p(y) is FAR."""

    def __call__(self, tile: slice) -> Tensor:
        """(p − onehot(y))/p(y), [tile, M], in the dtype of products; p(y) − 1 is rounded once, however small."""
        d, places = self.rows.made.products(tile), self.rows.targets_in(tile)
        own = d[places].to(self.log_norm.dtype).exp_() - self.log_norm[places[1]].exp()
        d.exp_()[places] = own.to(d.dtype)
        return d
