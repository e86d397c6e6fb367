"""Rounds as published: what each draws, builds, learns, and begins from.

    star              one draw, the right ones, SFT from the base (Zelikman et al. 2022, arXiv:2203.14465)
    star-rationalize  and what it gets right with a hint
    rest-em           many draws, at most ten right ones of a prompt (Singh et al. 2023, arXiv:2312.06585)
    seed-sft          STaR as jakob-bjorner/star runs it
    seed-dpo          right over wrong, DPO from the base (the same)
    online-dpo        DPO that goes on from the round before
    irpo              DPO + NLL, reference and start the round before (Pang et al. 2024, arXiv:2404.19733)

A file with no tasks: `rounds` makes stages of any task whose answers are right or wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tiltlm.feeds import Feed, Rounds
from tiltlm.fit import Fit
from tiltlm.nets import Net
from tiltlm.policies.dpo import DPO
from tiltlm.policies.rpo import RPO
from tiltlm.policies.sft import SFT
from tiltlm.stages.cells import Cell

BETA = 0.1
"""Of DPO's log-ratios."""

CAP = 10
"""Right answers of a prompt that ReST-EM keeps."""


@dataclass(frozen=True)
class Scale:
    """How much the presets draw, and how they train: on one machine, or as published.

    sft, dpo, irpo   one round's updates
    draws            of a prompt, by preset
    count            rounds
    """

    sft: Fit
    dpo: Fit
    irpo: Fit
    draws: dict[str, int]
    count: int
    pairs: int = 0
    net: Net = Net()


def rounds(scale: Scale) -> dict[str, Cell]:
    """The presets."""

    def cell(name: str, method: Any, fit: Fit, how: Rounds) -> Cell:
        return Cell(
            method, Feed("rounds", rounds=replace(how, count=scale.count, n=scale.draws[name])), fit, scale.net
        )

    irpo = RPO(BETA, normalise="mean")
    return {
        "star": cell("star", SFT(), scale.sft, Rounds()),
        "star-rationalize": cell("star-rationalize", SFT(), scale.sft, Rounds(rationalize=True, show_hint=0.1)),
        "rest-em": cell("rest-em", SFT(), scale.sft, Rounds(cap=CAP)),
        "seed-sft": cell("seed-sft", SFT(), scale.sft, Rounds()),
        "seed-dpo": cell("seed-dpo", DPO(BETA), scale.dpo, Rounds()),
        "online-dpo": cell("online-dpo", DPO(BETA), scale.dpo, Rounds(start="previous")),
        "irpo": cell("irpo", irpo, scale.irpo, Rounds(start="previous", reference="previous", pairs=scale.pairs)),
    }


SMALL_SFT = Fit(
    lr=1e-3, epochs=1.0, batch_size=64, warmup=20, decay="linear", floor=0.05, betas=(0.9, 0.95), weight_decay=0.01
)
"""Of a model of a third of a million parameters."""

SMALL_DPO = replace(SMALL_SFT, lr=2e-4, batch_size=32, weight_decay=0.0)

SMALL = Scale(
    SMALL_SFT, SMALL_DPO, SMALL_DPO,
    {"star": 2, "star-rationalize": 2, "rest-em": 16, "seed-sft": 2, "seed-dpo": 3, "online-dpo": 3, "irpo": 3}, 3,
)  # fmt: skip
"""For the sums of this project's own making, on a laptop."""

PUBLISHED_SFT = Fit(
    lr=2e-4, epochs=1.0, batch_size=64, micro_batch=32, warmup=45, decay="linear", floor=0.0, betas=(0.9, 0.95),
    precision="bfloat16",
)  # fmt: skip

PUBLISHED_DPO = replace(PUBLISHED_SFT, lr=5e-6, batch_size=24, micro_batch=6)

PUBLISHED = Scale(
    PUBLISHED_SFT, PUBLISHED_DPO, replace(PUBLISHED_DPO, lr=7e-7, batch_size=16),
    {"star": 1, "star-rationalize": 1, "rest-em": 32, "seed-sft": 1, "seed-dpo": 3, "online-dpo": 4, "irpo": 30}, 10, 10,
    Net(policy="lora", lora_rank=16),
)  # fmt: skip
"""Llama-3.1-8B-Instruct with adapters of rank 16, as jakob-bjorner/star trains it (IRPO: as its paper has it)."""
