"""Another processor's rounding, on this one: `pytest --other-rounding`.

Processors sum the terms of a matrix product in different orders (by the width of their vectors, by how many rows there
are), and sums of floating-point numbers depend on the order. Here the terms are shuffled, by an order that depends on
the shapes alone: the same product twice is the same bit for bit, and a row has other bits in another batch. Attention
becomes products too. What passes so does not hang on one machine's kernels.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

aten = torch.ops.aten
LIBRARY = torch.library.Library("aten", "IMPL")


@cache
def order(rows: int, terms: int, columns: int) -> Tensor:
    """A fixed permutation of the terms for each shape of a product."""
    seed = 1_000_003 + 7919 * terms + 31 * rows + columns
    return torch.randperm(terms, generator=torch.Generator().manual_seed(seed))


def mm(a: Tensor, b: Tensor) -> Tensor:
    """[M, K] · [K, N]."""
    if a.is_floating_point():
        shuffled = order(a.shape[0], a.shape[1], b.shape[1])
        a, b = a.index_select(1, shuffled), b.index_select(0, shuffled)
    return aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """[B, M, K] · [B, K, N]."""
    if a.is_floating_point():
        shuffled = order(a.shape[0] * a.shape[1], a.shape[2], b.shape[2])
        a, b = a.index_select(2, shuffled), b.index_select(1, shuffled)
    return aten.bmm.out(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta·bias + alpha·(a · b); half precision is added up in float32 and rounded once, as torch's kernels do."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return (beta * bias.float() + alpha * mm(a.float(), b.float())).to(a.dtype)
    return beta * bias + alpha * mm(a, b)


def install() -> None:
    """From here on, for the whole process."""
    torch.backends.cuda.enable_flash_sdp(False)  # despite its name also the processor's fused attention
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that its own kernels are replaced: that is the point
        for name, product in (("mm", mm), ("bmm", bmm), ("addmm", addmm)):
            LIBRARY.impl(name, product, "CPU")
