"""The mathematics of the STaR project's README (github.com/jakob-bjorner/star), worked out exactly.

Figures that stand alone: no task, no method, no training; each takes about a second.
"""

from __future__ import annotations

from tiltlm.run import Recipe
from tiltlm.stages.aleatoric_solve import Aleatoric
from tiltlm.stages.baselines_solve import Baselines
from tiltlm.stages.drift_solve import Drift
from tiltlm.stages.margins_solve import Margins

FIGURES: dict[str, str] = {
    "aleatoric/solve": "rationales for an answer that is chance: which of them each objective asks for",
    "baselines/solve": "policy gradients with the baselines of quiet-STaR: which are unbiased",
    "drift/solve": "STaR where every rationale succeeds equally often: neutral drift",
    "margins/solve": "one pair, one table: DPO's margin grows without bound, IPO's stops",
}


def figure(name: str) -> Recipe:
    """The figure called `name` with its settings."""
    return {each.name: each for each in (Aleatoric(), Baselines(), Drift(), Margins())}[name]
