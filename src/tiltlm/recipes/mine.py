"""Your own target: `tiltlm run mine/evaluate --task.model gpt2 --task.prompts p.jsonl --task.reward mine.py:f`.

A copy of this file, with another name and your settings in it, is a task of your own in the catalogue.
"""

from __future__ import annotations

from dataclasses import replace

from tiltlm.recipes.preset import Preset
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import RulerSettings
from tiltlm.tasks.mine import Mine

TASKS: dict[str, str] = {"mine": "your own model, prompts and reward"}

METHODS = ("reference", "best-of-n", "ctl", "rloo")
"""What a comparison takes where none are named."""


def preset(name: str) -> Preset:
    """With moderate numbers of draws of each prompt: 500 to measure and 3000 for log Z, for 100 prompts at most."""
    return Preset(
        replace(Mine(), name=name),
        ruler=RulerSettings(prompts=100, n=500),
        log_z=LogZSettings(by="reference", draws=3000, prompts=100),
        methods=METHODS,
    )
