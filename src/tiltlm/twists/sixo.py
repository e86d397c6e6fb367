"""SIXO: tell prefixes of pi* from prefixes of pi_ref by logistic regression; the log-odds are the twist.

    L = − Σ_k A_k log σ(log psi_t(x^k)) − (1/n) Σ_j log σ(−log psi_t(z^j)),    x ~ pi*, z ~ pi_ref, at every t

Expected gradient zero at the density ratio pi*_t / pi_ref,t = psi*_t / Z (Lawson et al. 2022, arXiv:2206.05952;
Zhao et al. 2024, arXiv:2404.17546, §4.2): psi* up to one constant, which changes neither guided decoding nor where
SMC resamples. Positives by weights that the batch normalises (draws of another than pi*): as K grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltlm.method import Method
from tiltlm.twists.objective import Draws, Need, Rows, TwistObjective, cat_rows, equal, positive_weights, rows_of


@dataclass(frozen=True)
class SIXO(TwistObjective):
    """Positives by their weights; as many fresh draws of the reference for the same prompts."""

    optimum: ClassVar[str] = "psi* / Z (positives by weight: as K grows)"
    needs: ClassVar[tuple[Need, ...]] = ("proposal", "reference")

    @property
    def needs_beside_positives(self) -> tuple[Need, ...]:
        return ("reference",)

    def prepare(self, batch: Draws) -> Rows:
        positives = batch.need("proposal") if batch.positives is None else batch.positives
        negatives = batch.need("reference")
        one = torch.ones(len(positives), device=positives.device)
        first = rows_of(positives, positive_weights(positives), batch.prompts, one)
        return cat_rows(first, rows_of(negatives, equal(negatives), batch.prompts), batch.prompts)

    def per_token(self, out: Tensor, goal: Tensor) -> Tensor:
        return -logsigmoid(torch.where(goal > 0.5, out, -out))


NAMES: dict[str, str] = {"sixo": "density-ratio estimation"}
METHODS: dict[str, Method] = {"sixo": SIXO()}
