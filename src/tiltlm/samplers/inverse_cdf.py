"""Drawing one token per row by inverting the distribution function, in blocks.

`torch.multinomial` spends one exponential draw per vocabulary entry; this spends one uniform per row. Weights
exp(logit − max) are summed in blocks of 256; the uniform finds its block in the float64 cumulative sums of the
blocks, then its token inside the block. The token's log-probability falls out for free. Because each row has
its own uniform, what a row draws does not depend on its batch mates.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
ROWS_AT_ONCE = 8
"""Rows handled together when the vocabulary is large, so that the weights stay in the processor's cache."""


@torch.no_grad()
def draw_tokens(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability in nats.

    Args: logits [N, V], unnormalised log-probabilities (−inf = impossible); uniform float64 [N] in (0, 1).
    Returns: tokens int64 [N], log_prob float32 or wider [N].
    Raises: ValueError naming the first row that holds NaN or +inf, or has no possible token.
    """
    if logits.shape[1] <= 4096 or logits.device.type != "cpu":
        tokens, log_prob = _draw(logits, uniform)
    else:
        parts = zip(logits.split(ROWS_AT_ONCE), uniform.split(ROWS_AT_ONCE), strict=True)
        drawn = [_draw(*part) for part in parts]
        tokens, log_prob = torch.cat([d[0] for d in drawn]), torch.cat([d[1] for d in drawn])
    if not bool(torch.isfinite(log_prob).all()):
        row = int((~torch.isfinite(log_prob)).nonzero()[0])
        raise ValueError(f"row {row} has NaN or +inf logits, or no possible token at all: nothing can be drawn")
    return tokens, log_prob


def _draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = wide.amax(1, keepdim=True)
    blocks = _weights(wide, top)
    block_cdf = blocks.sum(2).double().cumsum(1)
    total = block_cdf[:, -1]
    aim = uniform.to(total) * total
    block = _first_above(block_cdf, aim)
    rows = torch.arange(len(block), device=logits.device)
    before = torch.where(block > 0, block_cdf[rows, (block - 1).clamp_min(0)], 0.0)
    cdf = blocks[rows, block].double().cumsum(1)
    tokens = block * BLOCK + _first_above(cdf, aim - before)
    picked = wide.gather(1, tokens.clamp_max(wide.shape[1] - 1)[:, None])[:, 0]
    return tokens, picked - top[:, 0] - total.log().to(picked.dtype)


def _weights(logits: Tensor, top: Tensor) -> Tensor:
    """exp(logits − top) in blocks, [n, number of blocks, BLOCK]; zeros behind the last token."""
    n, size = logits.shape
    padding = -size % BLOCK
    weights = logits.new_empty(n, size + padding)
    weights[:, size:] = 0
    torch.sub(logits, top, out=weights[:, :size]).exp_()
    return weights.unflatten(1, (-1, BLOCK))


def _first_above(cdf: Tensor, aim: Tensor) -> Tensor:
    """Per row, the first index whose cumulative weight exceeds `aim`; never one of weight zero.

    Rounding can push `aim` up to the last entry of the cdf; it is held just below, so that the answer is the
    last index of positive weight and not a token that cannot happen. (A cdf of NaN answers with its last index;
    the caller finds NaN in the log-probability.)
    """
    below_end = torch.nextafter(cdf[:, -1], torch.zeros_like(aim))
    found = torch.searchsorted(cdf, torch.minimum(aim, below_end)[:, None], right=True)[:, 0]
    return found.clamp_max(cdf.shape[1] - 1)
