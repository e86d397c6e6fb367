"""Worlds that are solved exactly: the tree of the Q# paper (arXiv:2502.20548, fig. 4), and two hills on a line.

Any method can be run on them; the stage `solve` of each needs no training.
"""

from __future__ import annotations

from tiltlm.recipes.preset import Preset
from tiltlm.stages.measure import RulerSettings
from tiltlm.tasks.modes import Modes
from tiltlm.tasks.tree import Tree

TASKS: dict[str, str] = {
    "tree": "the two-branch tree of the Q# paper, enumerated",
    "modes": "two hills and a policy class that can stand on one: EXO and DPO, enumerated",
}

DRAWS = RulerSettings(n=20_000, exact=20_000, batch_size=20_000)


def preset(name: str) -> Preset:
    """The task called `name` with its settings."""
    return {
        "tree": Preset(Tree(), ruler=DRAWS, methods=("reference", "q-sharp", "cd", "ctl", "rloo", "dpo")),
        "modes": Preset(Modes(), ruler=DRAWS, methods=("reference", "exo-rw", "dpo-rw", "q-sharp", "ctl", "rloo")),
    }[name]
