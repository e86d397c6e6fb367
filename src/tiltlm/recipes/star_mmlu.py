"""STaR and iterated DPO (jakob-bjorner/star), in a world of graded questions that needs nothing from the hub.

`sums` are sums of three digits, worked out column by column by a small model that carries in 35 % of its answers: minutes
on a laptop. `sums-small` are sums of two digits.
"""

from __future__ import annotations

from dataclasses import replace

from tiltlm.feeds import Draws, Feed, TwistFeed
from tiltlm.fit import Fit
from tiltlm.policies.dpo import DPO
from tiltlm.policies.exo_rw import ExoRw
from tiltlm.policies.log_variance import LogVariance
from tiltlm.policies.reinforce import Reinforce
from tiltlm.policies.sft import SFT
from tiltlm.recipes.preset import Preset
from tiltlm.recipes.rounds import HINTED, SMALL, rounds
from tiltlm.stages.cells import Cell
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import RulerSettings
from tiltlm.stages.sums import FIT
from tiltlm.tasks.sums import Sums
from tiltlm.twists.ctl import CTL
from tiltlm.twists.q_sharp import QSharp

TASKS: dict[str, str] = {
    "sums": "sums of three digits, column by column, by a small model that mostly forgets to carry",
    "sums-hinted": "the same, by a model that carries only where its prompt tells the result",
    "sums-small": "sums of two digits, likewise, and a smaller model",
}

METHODS = (
    "reference", "star", "rest-em", "seed-dpo", "online-dpo", "irpo", "exo-rw", "rloo", "log-variance", "q-sharp", "ctl",
)  # fmt: skip
"""What a comparison takes where none are named."""

BETA = 0.2

RULER = RulerSettings(prompts=200, n=4)

LOG_Z = LogZSettings(by="listing", draws=500, prompts=200)
"""The reference is nearly sure of all but the first letter: two completions have all but .002 of the probability. By
reference, 500 draws of each prompt would leave no bias to speak of either, at a hundred times the cost."""

UPDATE = Fit(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, steps=200, warmup=20, decay="linear", floor=0.05)

GENTLE = replace(UPDATE, lr=2e-4, weight_decay=0.0)

PAIRS = replace(GENTLE, batch_size=32, epochs=1.0)

CELLS: dict[str, Cell] = {
    "sft": Cell(SFT(), Feed(), UPDATE),
    "dpo": Cell(DPO(beta=0.1), Feed("stored", Draws(3), size=3, pairing="all"), PAIRS),
    "exo-rw": Cell(ExoRw(beta_pi=0.5), Feed("stored", Draws(4), size=4), replace(GENTLE, epochs=1.0)),
    "rloo": Cell(Reinforce("leave_one_out", None), Feed(n=4), GENTLE),
    "log-variance": Cell(LogVariance(), Feed(n=1, size=4), replace(GENTLE, batch_size=16)),
    "q-sharp": Cell(QSharp(), Feed("stored", Draws(4)), replace(UPDATE, epochs=4.0)),
    "ctl": Cell(CTL(), TwistFeed(particles=16, prompts=4), UPDATE),
}

VARIANTS: dict[str, dict[str, Cell]] = {
    "sums": rounds(SMALL), "sums-hinted": rounds(HINTED), "sums-small": rounds(SMALL)
}  # fmt: skip


def preset(name: str) -> Preset:
    """The task called `name` with its settings."""
    task = {"sums": Sums(beta=BETA), "sums-hinted": Sums(hints=True, beta=BETA), "sums-small": small()}[name]
    methods = METHODS if "irpo" in VARIANTS[name] else ("reference", *VARIANTS[name])
    return Preset(replace(task, name=name), CELLS, RULER, log_z=LOG_Z, variants=VARIANTS[name], methods=methods)


def small() -> Sums:
    """Two digits, and a network that learns them in a fifth of the time."""
    language = replace(Sums().language, stories=8000, layers=2, fit=replace(FIT, epochs=3.0))
    return Sums(language, digits=2, width=64, train=400, valid=200, test=200, beta=BETA)
