"""A number with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """value ± stderr, from n independent observations. stderr 0: exact."""

    value: float
    stderr: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4f}" if self.stderr == 0 else f"{self.value:.4f} ± {self.stderr:.4f}"


def mean(x: Tensor) -> Estimate:
    """The mean of independent observations x [n], its standard error from their spread.

    Several draws for one prompt are not independent: average them first, one number per prompt.
    """
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"mean needs a list of numbers, [n] with n >= 1; got shape {list(x.shape)}")
    x = x.double()
    stderr = x.std(unbiased=True).item() / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return Estimate(x.mean().item(), stderr, len(x))


def per_prompt(x: Tensor, prompt_index: Tensor, n_prompts: int) -> Tensor:
    """Row values [N] averaged within each prompt, [P] float64; NaN for a prompt without rows."""
    total = x.new_zeros(n_prompts, dtype=x.double().dtype).index_add(0, prompt_index, x.double())
    count = total.new_zeros(n_prompts).index_add(0, prompt_index, total.new_ones(len(x)))
    return total / count
