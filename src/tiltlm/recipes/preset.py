"""What a name of the catalogue stands for: a task, and the settings that methods, ruler and log Z have on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tiltlm.method import Method
from tiltlm.stages.cells import Cell, default_cell
from tiltlm.stages.exact import ExactSettings
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import RulerSettings
from tiltlm.stages.task import Task


@dataclass(frozen=True)
class Preset:
    """cells: settings of those methods that a paper, or experience, has settings for; the others have `default_cell`.
    variants: further settings of methods, under names of their own: stages like those of methods.
    figures: settings of figures, by their stage's name. methods: what a comparison takes where none are named. expected:
    (method, metric) -> what the paper got. seed: the paper's."""

    task: Task
    cells: Mapping[str, Cell] = field(default_factory=dict)
    ruler: RulerSettings = RulerSettings()
    exact: ExactSettings = ExactSettings()
    log_z: LogZSettings = LogZSettings()
    figures: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Cell] = field(default_factory=dict)
    methods: tuple[str, ...] = ("reference",)
    expected: Mapping[tuple[str, str], float] = field(default_factory=dict)
    seed: int = 0

    def cell(self, name: str, method: Method) -> Cell:
        """The settings of the method called `name`."""
        return self.cells.get(name) or default_cell(method, self.task.facts())
