"""Resampling: which particles live on, and how often.

Every scheme is unbiased: a particle of normalised weight W has K·W children on average. They differ in spread:

    multinomial   K independent draws
    residual      ⌊K·W⌋ children each, the rest multinomial in the fractional parts
    stratified    one uniform in each of K equal strata
    systematic    one uniform for all: points (k + u)/K; least spread in practice

(Douc, Cappé & Moulines 2005.) The *conditional* forms answer: given that one particle, in slot 0, has a child in
slot 0, what do the others do? Conditional sequential Monte Carlo needs exactly that law; multinomial and
systematic have it here (Andrieu, Doucet & Holenstein 2010; Chopin & Singh 2015, §4).

G groups of K particles each; log-weights in nats, any constant per group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Scheme = Literal["multinomial", "residual", "stratified", "systematic"]


def normalised(log_w: Tensor) -> Tensor:
    """Weights that sum to 1 in every group: [G, K] -> float64 [G, K]."""
    return torch.softmax(log_w.double(), -1)


def effective_sample_size(log_w: Tensor) -> Tensor:
    """1 / Σ W², between 1 and K: [G, K] -> float64 [G]."""
    return 1 / normalised(log_w).square().sum(-1)


def ancestors(log_w: Tensor, uniform: Tensor, scheme: Scheme) -> Tensor:
    """Whose child each slot holds: log-weights [G, K], uniforms float64 [G, K] -> int64 [G, K]."""
    return SCHEMES[scheme](normalised(log_w), uniform)


def _inverse(weights: Tensor, points: Tensor) -> Tensor:
    """The particle whose share of (0, 1) each point falls in; never one of weight zero."""
    cdf = weights.cumsum(-1)
    total = cdf[:, -1:]
    inside = torch.minimum(points * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, inside.contiguous(), right=True).clamp_max(weights.shape[1] - 1)


def multinomial(weights: Tensor, uniform: Tensor) -> Tensor:
    return _inverse(weights, uniform)


def stratified(weights: Tensor, uniform: Tensor) -> Tensor:
    k = weights.shape[1]
    return _inverse(weights, (torch.arange(k, device=weights.device) + uniform) / k)


def systematic(weights: Tensor, uniform: Tensor) -> Tensor:
    return stratified(weights, uniform[:, :1].expand_as(uniform))


def residual(weights: Tensor, uniform: Tensor) -> Tensor:
    k = weights.shape[1]
    whole = (k * weights + 1e-12).floor()  # 3 · (1/3) is one child, whatever the last digit says
    fraction = (k * weights - whole).clamp_min(0)
    fraction = torch.where(fraction.sum(-1, keepdim=True) > 0, fraction, weights)
    drawn = _inverse(fraction / fraction.sum(-1, keepdim=True), uniform)
    cdf = whole.cumsum(-1)
    slot = torch.arange(k, device=weights.device).expand_as(weights).to(cdf)
    kept = torch.searchsorted(cdf, slot.contiguous(), right=True).clamp_max(k - 1)
    return torch.where(slot < cdf[:, -1:], kept, drawn)


SCHEMES: dict[Scheme, Callable[[Tensor, Tensor], Tensor]] = {
    "multinomial": multinomial,
    "residual": residual,
    "stratified": stratified,
    "systematic": systematic,
}


def conditional_ancestors(log_w: Tensor, uniform: Tensor, scheme: Scheme) -> Tensor:
    """`ancestors` given that particle 0 has a child in slot 0; uniforms float64 [G, 2K].

    Raises ValueError for schemes whose conditional law is not at hand.
    """
    if scheme not in CONDITIONAL:
        raise ValueError(
            f"conditional SMC needs {' or '.join(CONDITIONAL)} resampling; {scheme} has no conditional form here"
        )
    return CONDITIONAL[scheme](normalised(log_w), uniform)


def conditional_multinomial(weights: Tensor, uniform: Tensor) -> Tensor:
    found = multinomial(weights, uniform[:, : weights.shape[1]])
    found[:, 0] = 0
    return found


def conditional_systematic(weights: Tensor, uniform: Tensor) -> Tensor:
    """With x = K·W_0, f = ⌊x⌋ and u = x − f, particle 0 has f + 1 children if the offset falls below u, else f.

    Given that it was chosen, the first happens with probability u(f + 1)/x. The other slots are shuffled, for slot
    0 is a uniformly random one of the lineage's.
    """
    k = weights.shape[1]
    x = k * weights[:, 0]
    f = x.floor()
    u = x - f
    more = uniform[:, 0] * x < u * (f + 1)
    offset = torch.where(more, u * uniform[:, 1], u + (1 - u) * uniform[:, 1])
    points = (torch.arange(k, device=weights.device) + offset[:, None]) / k
    found = _inverse(weights, points)
    found[:, 0] = 0  # its own first child; rounding may say otherwise where its weight is next to nothing
    order = uniform[:, k + 1 :].argsort(-1) + 1  # slots 1 … K−1, shuffled
    return torch.cat([found[:, :1], found.gather(1, order)], 1)


CONDITIONAL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multinomial": conditional_multinomial,
    "systematic": conditional_systematic,
}
