"""What n draws of a question are worth, by how one of them is chosen; estimated from N ≥ n graded draws of each.

    pass@n  whether any of n is right           1 − C(N − c, n) / C(N, n), c of the N being right (Chen et al. 2021,
                                                arXiv:2107.03374, eq. 1)
    best@n  whether that of the highest score   Σ_i C(N − i, n − 1) / C(N, n) · right_(i), i = 1 … N in descending order of
            among n is right                    score (Hosseini et al. 2024, arXiv:2402.06457)
    maj@n   whether what most of n say is right

The first two are means over all subsets of n, so without bias and with less noise than one subset; the third is a mean over
the ⌊N/n⌋ stretches of n draws in their order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


def pass_at(right: Tensor, n: int) -> Tensor:
    """pass@n of every question, float64 [P]. right: bool [P, N]. Raises ValueError unless N ≥ n ≥ 1."""
    total = _at_least(right, n)
    wrong = total - right.sum(1)
    return torch.tensor([1 - math.comb(int(w), n) / math.comb(total, n) for w in wrong], dtype=torch.float64)


def best_at(right: Tensor, score: Tensor, n: int) -> Tensor:
    """best@n of every question, float64 [P]; draws of equal score are equally likely to be taken.

    right: bool [P, N]; score: [P, N]. Raises ValueError unless N ≥ n ≥ 1.
    """
    total = _at_least(right, n)
    chance = [math.comb(total - 1 - i, n - 1) / math.comb(total, n) for i in range(total)]
    best = torch.tensor(chance, dtype=torch.float64)  # of being the best of n, by place
    order = score.double().argsort(1, descending=True)
    ranked, scores = right.double().gather(1, order), score.double().gather(1, order)
    return torch.stack([(_evened(r, s) * best).sum() for r, s in zip(ranked, scores, strict=True)])


def _evened(right: Tensor, score: Tensor) -> Tensor:
    """`right` [N], draws of equal score sharing their mean."""
    _, tie = score.unique(return_inverse=True)
    counts = torch.bincount(tie)
    return (torch.bincount(tie, right) / counts)[tie]


def majority_at(right: Tensor, answers: Sequence[Sequence[str]], n: int) -> Tensor:
    """maj@n of every question, float64 [P]: of answers that as many draws give, the one drawn first; draws that nothing was
    read off (empty) have no vote. right: bool [P, N]; answers: [P][N]. Raises ValueError unless N ≥ n ≥ 1."""
    total = _at_least(right, n)
    found = []
    for own, said in zip(right.tolist(), answers, strict=True):
        stretches = [slice(k, k + n) for k in range(0, total - n + 1, n)]
        found.append(sum(_elected(own[part], said[part]) for part in stretches) / len(stretches))
    return torch.tensor(found, dtype=torch.float64)


def _elected(right: Sequence[bool], answers: Sequence[str]) -> bool:
    votes = Counter(answer for answer in answers if answer)
    chosen = max(votes, key=lambda answer: votes[answer], default="")
    return any(r for r, answer in zip(right, answers, strict=True) if answer and answer == chosen)


def ranking(right: Tensor, score: Tensor) -> Tensor:
    """Of every question with right and wrong draws: which part of its (right, wrong) pairs has the right one of the higher
    score, a tie counting half; float64 [those]. right: bool [P, N]; score: [P, N]."""
    found = []
    for own, scores in zip(right, score.double(), strict=True):
        if own.any() and not own.all():
            gap = scores[own][:, None] - scores[~own][None, :]
            found.append(((gap > 0).double() + (gap == 0).double() / 2).mean())
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def _at_least(right: Tensor, n: int) -> int:
    total = right.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"of {total} draws of a question 1 to {total} can be looked at together; got {n}")
    return total
