"""D2PO: OPO labelled by a judge that learns as it goes (Singhal et al. 2024, arXiv:2405.01511).

    labels as OPO's, of r_phi in the place of r; of a few pairs gold's verdict is bought, which overrides r_phi's order and
    teaches r_phi (`judges/`)

The labels bought, not the completions drawn, are what it is to save. It ends at pi* of r_phi as that then is, not of the
gold reward: with labels bought for every pair it is OPO with hard labels, with none OPO on a fixed reward model. Verdicts
are hard labels: they have no finite optimum of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tiltlm.method import Method
from tiltlm.policies.opo import OPO


@dataclass(frozen=True)
class D2PO(OPO):
    """OPO, its labels a judge's (`--feed.judge`)."""

    judged: ClassVar[bool] = True
    optimum: ClassVar[str] = "pi* of beta and the judge's reward, where verdicts are few; not of the gold reward"


NAMES: dict[str, str] = {"d2po": "D2PO: online DPO labelled by a judge that learns from few gold verdicts"}
METHODS: dict[str, Method] = {"d2po": D2PO()}
