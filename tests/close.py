"""How close two numbers must be, said once.

    EXACT    1e-10   identities, in float64
    NETWORK  1e-6    two routes through a network of float64 weights (some families attend or normalise in float32
                     all the same: GPT-Neo, Llama)
    FLOAT32  1e-5    two routes in float32
    Monte Carlo      four standard errors, in the test itself

Two routes to one number (padded or not, cached or not, in parts or at once) round differently, and how differently is
the processor's affair: the width of its vectors, fused multiply-add, the order of a sum. What they may differ by grows
with the size of what was summed, not of what is left: so a tolerance is relative to the largest of the numbers compared
(to 1 where all are smaller). Where the law is what is tested, use a float64 model, `build(family, torch.float64)`; where
one route is run twice on the same shapes, `torch.equal`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

EXACT, NETWORK, FLOAT32 = 1e-10, 1e-6, 1e-5


def close(got: Tensor, expected: Tensor, within: float = FLOAT32, size: float | None = None) -> None:
    """Every number of `got` lies within `within`·`size` of that of `expected`; -inf only where it is expected."""
    torch.testing.assert_close(got, expected, atol=within * (size or max(1.0, size_of(expected))), rtol=0)


def size_of(x: Tensor) -> float:
    """The largest finite absolute value; 0 where there is none."""
    return torch.cat([torch.zeros(1).to(x), x[x.isfinite()].abs()]).max().item()


def alike(found: Any, wanted: Any, where: str = "") -> None:
    """Nested values whose numbers agree up to rounding, and everything else to the letter."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            alike(found[key], wanted[key], f"{where}: {key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for k, (x, y) in enumerate(zip(found, wanted, strict=True)):
            alike(x, y, f"{where}: {k}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=FLOAT32, abs=1e-6, nan_ok=True), where
    else:
        assert found == wanted, where
