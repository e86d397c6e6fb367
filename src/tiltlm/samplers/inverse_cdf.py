"""Drawing one token per row by inverting the distribution function, in blocks.

`torch.multinomial` spends one exponential draw per vocabulary entry; this spends one uniform per row. Weights
exp(logit − max) are summed in blocks of 256 (one block, where the vocabulary is smaller); the uniform finds its
block in the float64 cumulative sums of the blocks, then its token inside the block. The token's log-probability
falls out for free. Because each row has its own uniform, what a row draws does not depend on its batch mates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
ROWS_AT_ONCE = 8
"""Rows summed together when the vocabulary is large, so that the weights stay in the processor's cache."""


@dataclass(frozen=True)
class Cdf:
    """Every row's next-token distribution, ready to be drawn from: weights summed by block.

    logits [N, V], unnormalised log-probabilities (−inf = impossible); top [N], the largest of each row;
    cdf float64 [N, blocks], cumulative sums of exp(logit − top).
    """

    logits: Tensor
    top: Tensor
    cdf: Tensor

    @staticmethod
    @torch.no_grad()
    def of(logits: Tensor) -> Cdf:
        step = ROWS_AT_ONCE if logits.shape[1] > 4096 and logits.device.type == "cpu" else max(1, len(logits))
        parts = [_block_sums(part) for part in logits.split(step)]
        top, sums = (torch.cat(side) for side in zip(*parts, strict=True))
        return Cdf(logits, top[:, 0], sums.cumsum(1))

    @property
    def log_norm(self) -> Tensor:
        """logsumexp of each row's logits, float64 [N]; −inf where no token is possible."""
        return self.top.double() + self.cdf[:, -1].log()

    def draw(self, uniform: Tensor, rows: Tensor | None = None) -> Tensor:
        """One token per row (or per entry of `rows`, int64), int64; `uniform` float64 in (0, 1), as many."""
        cdf, top = (self.cdf, self.top) if rows is None else (self.cdf[rows], self.top[rows])
        aim = uniform.to(cdf) * cdf[:, -1]
        block = _first_above(cdf, aim)
        before = pad(cdf, (1, 0)).gather(1, block[:, None])[:, 0]
        inside = _inside(block, self.logits, top, rows).cumsum(1)
        tokens = block * BLOCK + _first_above(inside, aim - before)
        return tokens.clamp_max_(self.logits.shape[1] - 1)


@torch.no_grad()
def draw_tokens(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability in nats.

    Args: logits [N, V], unnormalised log-probabilities (−inf = impossible); uniform float64 [N] in (0, 1).
    Returns: tokens int64 [N], log_prob float32 or wider [N].
    Raises: ValueError naming the first row that holds NaN or +inf, or has no possible token.
    """
    weighed = Cdf.of(logits)
    tokens = weighed.draw(uniform)
    picked = logits.gather(1, tokens[:, None])[:, 0].to(weighed.top.dtype)
    log_prob = picked - weighed.top - weighed.cdf[:, -1].log().to(picked.dtype)
    if not bool(torch.isfinite(log_prob).all()):
        row = int((~torch.isfinite(log_prob)).nonzero()[0])
        raise ValueError(f"row {row} has NaN or +inf logits, or no possible token at all: nothing can be drawn")
    return tokens, log_prob


def _block_sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest logit [n, 1], and the weights exp(logit − top) summed by block, float64 [n, blocks]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    n, size = wide.shape
    block = min(BLOCK, size)
    top = wide.amax(1, keepdim=True).clamp_min(torch.finfo(wide.dtype).min)  # a row of −inf has weight 0, not NaN
    weights = wide.new_empty(n, size + -size % block)
    weights[:, size:] = 0
    torch.sub(wide, top, out=weights[:, :size]).exp_()
    return top, weights.unflatten(1, (-1, block)).sum(2).double()


def _inside(block: Tensor, logits: Tensor, top: Tensor, rows: Tensor | None) -> Tensor:
    """The weights inside each row's block, float64 [n, its width]; the last token again behind the last token."""
    width = min(BLOCK, logits.shape[1])
    column = (block * BLOCK)[:, None] + torch.arange(width, device=logits.device)
    column.clamp_max_(logits.shape[1] - 1)
    picked = logits.gather(1, column) if rows is None else logits[rows[:, None], column]
    return picked.sub(top[:, None]).exp_().double()


def _first_above(cdf: Tensor, aim: Tensor) -> Tensor:
    """Per row, the first index whose cumulative weight exceeds `aim`; never one of weight zero.

    Rounding can push `aim` up to the last entry of the cdf; it is held just below, so that the answer is the
    last index of positive weight and not a token that cannot happen. (A cdf of NaN answers with its last index;
    the caller finds NaN in the log-probability.)
    """
    below_end = torch.nextafter(cdf[:, -1], torch.zeros_like(aim))
    found = torch.searchsorted(cdf, torch.minimum(aim, below_end)[:, None], right=True)[:, 0]
    return found.clamp_max(cdf.shape[1] - 1)
