"""Rounds as published: what each draws, builds, learns, and begins from.

    star              one draw, the right ones, SFT from the base (Zelikman et al. 2022, arXiv:2203.14465)
    star-rationalize  and what it gets right with a hint
    rest-em           many draws, at most ten right ones of a prompt (Singh et al. 2023, arXiv:2312.06585)
    seed-sft          STaR as jakob-bjorner/star runs it
    seed-dpo          right over wrong, DPO from the base (the same)
    online-dpo        DPO that goes on from the round before
    irpo              DPO + NLL, reference and start the round before (Pang et al. 2024, arXiv:2404.19733)

A file with no tasks: `rounds` makes stages of any task whose answers are right or wrong; `v_star` the stage of that name.
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
from tiltlm.recipes.preset import Preset
from tiltlm.stages.cells import Cell, default_cell
from tiltlm.stages.v_star import Candidates, VStar

PRESETS: dict[str, str] = {
    "star": "STaR: the right ones of what is drawn, SFT from the base, round by round",
    "star-rationalize": "STaR, and what is right with a hint as well",
    "rest-em": "many draws, ten right ones of a prompt at most, SFT from the base",
    "seed-sft": "STaR as jakob-bjorner/star runs it",
    "seed-dpo": "right over wrong answers, DPO from the base, round by round",
    "online-dpo": "the same, each round going on from the one before",
    "irpo": "DPO + NLL, start and reference the round before",
}

BETA = 0.1
"""Of DPO's log-ratios."""

CAP = 10
"""Right answers of a prompt that ReST-EM keeps."""


HOW: dict[str, tuple[Any, Rounds]] = {
    "star": (SFT(), Rounds()),
    "star-rationalize": (SFT(), Rounds(rationalize=True, show_hint=0.1)),
    "rest-em": (SFT(), Rounds(cap=CAP)),
    "seed-sft": (SFT(), Rounds()),
    "seed-dpo": (DPO(BETA), Rounds()),
    "online-dpo": (DPO(BETA), Rounds(start="previous")),
    "irpo": (RPO(BETA, normalise="mean"), Rounds(start="previous", reference="previous")),
}
"""What is learnt, and from what."""


@dataclass(frozen=True)
class Scale:
    """How much is drawn of every prompt, and how a round's update trains: on one machine, or as published.

    pairs: of a prompt, at most (0: all), for IRPO.
    """

    draws: dict[str, int]
    fits: dict[str, Fit]
    count: int
    pairs: int = 0
    net: Net = Net()


def rounds(scale: Scale) -> dict[str, Cell]:
    """The presets that `scale` has numbers for."""
    found = {}
    for name, n in scale.draws.items():
        method, how = HOW[name]
        how = replace(how, count=scale.count, n=n, pairs=scale.pairs if name == "irpo" else 0)
        found[name] = Cell(method, Feed("rounds", rounds=how), scale.fits[name], scale.net)
    return found


SFT_SMALL = Fit(
    lr=1e-3, epochs=1.0, batch_size=64, warmup=20, decay="linear", floor=0.05, betas=(0.9, 0.95), weight_decay=0.01
)
"""Of a model of a third of a million parameters."""

DPO_SMALL = replace(SFT_SMALL, lr=2e-4, batch_size=32, weight_decay=0.0)

SMALL = Scale(
    {"star": 2, "rest-em": 16, "seed-sft": 2, "seed-dpo": 3, "online-dpo": 3, "irpo": 3},
    {
        "star": SFT_SMALL, "rest-em": SFT_SMALL, "seed-sft": SFT_SMALL, "seed-dpo": DPO_SMALL,
        "online-dpo": replace(DPO_SMALL, lr=5e-5), "irpo": DPO_SMALL,
    },
    3,
)  # fmt: skip
"""For the sums of this project's own making, on a laptop."""

HINTED = Scale(
    {"star": 2, "star-rationalize": 2},
    dict.fromkeys(("star", "star-rationalize"), replace(SFT_SMALL, epochs=3.0)),
    3,
)
"""Where prompts have a slot for a hint."""

SFT_GENTLE, DPO_GENTLE = replace(SFT_SMALL, lr=3e-4), replace(DPO_SMALL, lr=1e-4)

QUESTIONS = Scale(
    {"star": 8, "star-rationalize": 8, "rest-em": 16, "seed-sft": 8, "seed-dpo": 8, "online-dpo": 8, "irpo": 8},
    {
        "star": SFT_GENTLE, "star-rationalize": SFT_GENTLE, "rest-em": SFT_GENTLE, "seed-sft": SFT_GENTLE,
        "seed-dpo": DPO_GENTLE, "online-dpo": DPO_GENTLE, "irpo": DPO_GENTLE,
    },
    3, 10,
)  # fmt: skip
"""Of your own questions and a small model: more draws, since few are right, and smaller steps."""

SFT_PUBLISHED = Fit(
    lr=2e-4, epochs=1.0, batch_size=64, micro_batch=4, warmup=45, decay="linear", floor=0.0, betas=(0.9, 0.95),
    precision="bfloat16",
)  # fmt: skip

DPO_PUBLISHED = replace(SFT_PUBLISHED, lr=5e-6, batch_size=24, micro_batch=2)

PUBLISHED = Scale(
    {"star": 1, "star-rationalize": 1, "rest-em": 32, "seed-sft": 1, "seed-dpo": 3, "online-dpo": 4, "irpo": 30},
    {
        "star": SFT_PUBLISHED, "star-rationalize": SFT_PUBLISHED, "rest-em": SFT_PUBLISHED, "seed-sft": SFT_PUBLISHED,
        "seed-dpo": DPO_PUBLISHED, "online-dpo": DPO_PUBLISHED,
        "irpo": replace(DPO_PUBLISHED, lr=7e-7, batch_size=16),
    },
    10, 10, Net(policy="lora", lora_rank=16, lora_alpha=16.0, lora_modules="all-linear", checkpointing=True),
)  # fmt: skip
"""Llama-3.1-8B-Instruct with adapters of rank and alpha 16 beside all seven projections, as jakob-bjorner/star trains it
(IRPO: rate, batch and pairs of its paper). Micro-batches are smaller than there: they change memory alone."""


V_STAR_DRAWS = 4
"""Of every prompt, in a round of V-STaR."""


def v_star(preset: Preset) -> VStar:
    """V-STaR on a preset's task, with the settings that its rounds of SFT and DPO have there."""
    facts = preset.task.facts()
    known = {name: preset.variants.get(name) or default_cell(HOW[name][0], facts) for name in ("star", "seed-dpo")}
    learn, judge = known.values()
    count = learn.feed.rounds.count
    generator = Feed("rounds", rounds=Rounds(count, V_STAR_DRAWS, accumulate=True))
    verifier = Feed("rounds", rounds=Rounds(1, V_STAR_DRAWS, accumulate=True))
    how = preset.figures.get("v-star", Candidates())
    return VStar(preset.task, replace(learn, feed=generator), replace(judge, feed=verifier), how, preset.seed)
