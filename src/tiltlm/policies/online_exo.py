"""EXO and DPO on rewards, online: the objectives of `exo_rw` and `dpo_rw` on groups that the policy has just drawn.

Both have pi* as the minimum of every single group, so who draws moves no optimum: it decides which groups are looked at.
With groups of two, online DPO on rewards is `opo` with soft labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tiltlm.method import Method
from tiltlm.policies.dpo_rw import DpoRw
from tiltlm.policies.exo_rw import ExoRw
from tiltlm.problem import Source


@dataclass(frozen=True)
class OnlineExo(ExoRw):
    """EXO on rewards, on the policy's own groups."""

    source: ClassVar[Source | None] = "live"


@dataclass(frozen=True)
class OnlineDpoRw(DpoRw):
    """DPO on rewards, on the policy's own groups."""

    source: ClassVar[Source | None] = "live"


NAMES: dict[str, str] = {
    "online-exo": "EXO on rewards, on the policy's own groups",
    "online-dpo-rw": "DPO on rewards, on the policy's own groups",
}
METHODS: dict[str, Method] = {"online-exo": OnlineExo(), "online-dpo-rw": OnlineDpoRw()}
