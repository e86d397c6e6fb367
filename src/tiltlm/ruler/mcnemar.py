"""Two models on the same questions, each answer right or wrong: McNemar's test.

    b = questions that the first alone answers right,    c = the second alone,    d = (b + c)/n the discordance

Questions that both answer right, or both wrong, say nothing of which is better. If neither is, each discordant one fell
to either side with chance ½, so b ~ Bin(b + c, ½). The test is exact: p = min(1, 2·P(Bin(b + c, ½) ≤ min(b, c)))
(McNemar 1947, Psychometrika 12; the binomial law instead of its normal approximation).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class McNemar:
    """How many questions both answer right, the first alone, the second alone, neither."""

    both: int
    first: int
    second: int
    neither: int

    @staticmethod
    def of(first: Tensor, second: Tensor) -> McNemar:
        """first, second: [n], 1 where the question was answered right, else 0."""
        one, other = first == 1, second == 1
        counts = (one & other, one & ~other, ~one & other, ~one & ~other)
        return McNemar(*(int(each.sum()) for each in counts))

    @property
    def n(self) -> int:
        return self.both + self.first + self.second + self.neither

    @property
    def discordance(self) -> float:
        """The share of questions that one answers right and the other does not."""
        return (self.first + self.second) / self.n

    @property
    def p(self) -> float:
        """Two-sided, exact; 1 where they answer alike."""
        from scipy.special import bdtr

        discordant = self.first + self.second
        return min(1.0, float(2 * bdtr(min(self.first, self.second), discordant, 0.5))) if discordant else 1.0

    def __str__(self) -> str:
        return (
            f"{self.n} questions: both right {self.both}, the first alone {self.first}, the second alone {self.second}, "
            f"neither {self.neither}"
        )


def is_binary(x: Tensor) -> bool:
    """Whether every observation is 0 or 1: right or wrong, one answer a question."""
    return bool(((x == 0) | (x == 1)).all())
