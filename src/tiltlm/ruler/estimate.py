"""A number with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """value ± stderr, from n independent observations. stderr 0: exact; NaN: of one observation, unknown."""

    value: float
    stderr: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.4f}" if not self.stderr > 0 else f"{self.value:.4f} ± {self.stderr:.4f}"

    def interval(self) -> tuple[float, float]:
        """The 95% interval by Student's t: honest also for a handful of observations, three seeds say."""
        if self.n < 2:
            return -math.inf, math.inf
        half = t_975(self.n - 1) * self.stderr
        return self.value - half, self.value + half


def t_975(freedom: int) -> float:
    """The 97.5% quantile of Student's t; beyond 10 degrees of freedom by its expansion in 1/freedom."""
    if freedom < 1:
        raise ValueError(f"Student's t wants at least one degree of freedom; got {freedom}")
    few = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    z = 1.959964
    far = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    far += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return few[freedom - 1] if freedom <= len(few) else far


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
