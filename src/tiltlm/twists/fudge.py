"""FUDGE: tilt by the probability of success (Yang & Klein 2021, arXiv:2104.05218, eq. 4).

    log psi = log P_ref(success | prefix)

As a *rule* over a learned law of a reward of 0 or 1 (`Fudge`), it is the twist of the conditional target
pi_ref(y | r = 1): the limit beta → 0 of Q#. As a road to pi* at a finite beta it is biased: it leans as hard as
beta = 0 would, whatever beta is.

As an *objective* (`FudgeLearning`) on a squashed twist psi = σ(output), with the potential phi = exp(r/beta) ≤ 1
as the probability of success (a classifier's probability, say):

    L = Σ_t BCE(σ(output_t), phi(y)),    y ~ pi_ref

Expected gradient zero at psi* for every prefix that is drawn (Zhao et al. 2024, arXiv:2404.17546, §4.4). Prefixes
may also be those of exact draws of pi*; each is then labelled with phi of a fresh reference rollout *behind that
prefix* (the original's rollouts start one token too early).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from tiltlm.method import Method
from tiltlm.problem import Facts, Problem
from tiltlm.samples import Samples
from tiltlm.twists.objective import Draws, Need, Rows, TwistObjective, cat_rows, equal, rows_of
from tiltlm.twists.value import Decode, ValueLearning, ValueRule


@dataclass(frozen=True)
class Fudge(ValueRule):
    """log P(success)."""

    value: ValueLearning = ValueLearning()
    decode: Decode = Decode()
    optimum: ClassVar[str] = "biased: pi_ref(· | success), the limit beta → 0"

    def why_not(self, facts: Facts) -> str | None:
        atoms = self.value.atoms or facts.atoms
        return None if atoms is not None and len(atoms) == 2 else "the rule of FUDGE wants a reward of two values"

    def log_psi(self, law: Tensor, atoms: Tensor) -> Tensor:
        """law: log pmf of a binary reward [..., 2] -> [...], nats."""
        if law.shape[-1] != 2:
            raise ValueError(f"FUDGE needs a binary reward; this value model has {law.shape[-1]} atoms")
        return law[..., 1]


@dataclass(frozen=True)
class FudgeLearning(TwistObjective):
    """Fit σ(output) to phi on reference draws; with `prefixes`, half on the positives' prefixes."""

    r_max: float = 0.0
    """Subtracted from the reward, which makes phi a probability and leaves pi* as it is."""

    optimum: ClassVar[str] = "psi* (phi ≤ 1)"
    needs: ClassVar[tuple[Need, ...]] = ("reference",)
    squashed: ClassVar[bool] = True
    plain: ClassVar[bool] = True

    def objective(self, problem: Problem) -> FudgeLearning:
        most = problem.facts.r_max
        return self if most is None else replace(self, r_max=most)

    def why_not(self, facts: Facts) -> str | None:
        if facts.r_max is None:
            return "FUDGE takes exp(r/beta) for a probability, and this reward has no upper bound to subtract"
        return None

    def prepare(self, batch: Draws) -> Rows:
        reference = batch.need("reference")
        rows = rows_of(reference, equal(reference), batch.prompts, potential(reference, batch.beta, self.r_max))
        if batch.prefixes is None:
            return rows
        positives = batch.need("positives")
        phi = _probability(batch.prefixes - self.r_max / batch.beta)
        half = [rows.weight / 2, equal(positives) / 2]
        first = rows_of(reference, half[0], batch.prompts, rows.goal)
        return cat_rows(first, rows_of(positives, half[1], batch.prompts, phi), batch.prompts)

    def per_token(self, out: Tensor, goal: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(out, goal, reduction="none")


def potential(samples: Samples, beta: float, r_max: float = 0.0) -> Tensor:
    """phi = exp((r − r_max)/beta) of every row, [N]; raises ValueError unless it is a probability."""
    if samples.reward is None:
        raise ValueError("these samples have no reward: score them first")
    return _probability((samples.reward - r_max) / beta)


def _probability(log_phi: Tensor) -> Tensor:
    if bool((log_phi > 1e-6).any()):
        raise ValueError(
            f"FUDGE needs phi = exp(r/beta) ≤ 1, a probability; the largest r/beta is {log_phi.max().item():.4g}: "
            "subtract the reward's upper bound (pi* stays the same)"
        )
    return torch.exp(log_phi.clamp_max(0))


NAMES: dict[str, str] = {
    "fudge": "FUDGE: classification of reference draws",
    "fudge-value": "decode with log P(success) of the law: the limit beta -> 0",
}
METHODS: dict[str, Method] = {
    "fudge": FudgeLearning(),
    "fudge-value": Fudge(),
}
