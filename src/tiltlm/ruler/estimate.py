"""A number with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from tiltlm.ruler.student import t_975

__all__ = ["Estimate", "mean", "per_prompt", "t_975"]


@dataclass(frozen=True)
class Estimate:
    """value ± stderr, from n independent observations. stderr 0: exact; NaN: of one observation, unknown."""

    value: float
    stderr: float
    n: int

    def __str__(self) -> str:
        if math.isnan(self.stderr):
            return f"{self.value:.4f} ± ?"
        return f"{self.value:.4f}" if self.stderr == 0 else f"{self.value:.4f} ± {self.stderr:.4f}"

    def interval(self) -> tuple[float, float]:
        """The 95% interval by Student's t: honest also for a handful of observations, three seeds say."""
        if self.n < 2:
            return -math.inf, math.inf
        half = t_975(self.n - 1) * self.stderr
        return self.value - half, self.value + half


def mean(x: Tensor) -> Estimate:
    """The mean of independent observations x [n], its standard error from their spread.

    Several draws for one prompt are not independent: average them first, one number per prompt.
    """
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"mean needs a list of numbers, [n] with n >= 1; got shape {list(x.shape)}")
    x = x.double()
    if len(x) > 1 and bool((x == x[0]).all()):  # rounding would give a constant an error
        return Estimate(x[0].item(), 0.0, len(x))
    stderr = x.std(unbiased=True).item() / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return Estimate(x.mean().item(), stderr, len(x))


def per_prompt(x: Tensor, prompt_index: Tensor, n_prompts: int) -> Tensor:
    """Row values [N] averaged within each prompt, [P] float64; NaN for a prompt without rows."""
    total = x.new_zeros(n_prompts, dtype=x.double().dtype).index_add(0, prompt_index, x.double())
    count = total.new_zeros(n_prompts).index_add(0, prompt_index, total.new_ones(len(x)))
    return total / count
