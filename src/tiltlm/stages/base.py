"""A base model for preference alignment, where none is named: a small Llama trained on the dialogues themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tiltlm.device import device_of
from tiltlm.models.folders import located
from tiltlm.run import Recipe, Run
from tiltlm.seeds import stream
from tiltlm.stages.data import Data, rows_of, texts_in
from tiltlm.stages.reading import Reading
from tiltlm.stages.reference import refuse_evaluations, train_own_model
from tiltlm.stages.task import OfTask
from tiltlm.train import checkpoints


@dataclass(frozen=True)
class Base(OfTask):
    """Train a small Llama on all texts of the training data (only where no base model is named)."""

    task: Any
    seed: int = 0
    stage: ClassVar[str] = "base"
    together: ClassVar[bool] = True

    def counted(self) -> Base:
        return Base(self.task.only("dataset", "reader", "base"), self.seed)

    def inputs(self) -> dict[str, Recipe]:
        return {"data": Data(self.task, self.seed).counted()}

    def check(self) -> None:
        super().check()
        refuse_evaluations(self.name, self.task.base)
        if self.task.reader.named:
            raise ValueError(f"the base model is {self.task.reader.named}: there is nothing to train")

    def build(self, run: Run[Any]) -> None:
        reader, own = self.task.reader, stream(self.seed, "preferences", "base")
        texts = [each["prompt"] + text for each in rows_of(run.inputs["data"], "train") for text in texts_in(each)]
        device = device_of(reader.device, "--task.device")
        train_own_model(run, texts, self.task.base, own, device, reader.most_tokens, stop=True)


def begun(task: Any, seed: int) -> dict[str, Recipe]:
    """The data, and the stage `base` where no model is named."""
    found: dict[str, Recipe] = {"data": Data(task, seed).counted()}
    return found if task.reader.named else found | {"base": Base(task, seed).counted()}


def reading(task: Any, runs: Mapping[str, Run[Any]]) -> Reading:
    """Everything that starts from the base model; runs: those of `begun`."""
    name = task.reader.named or str(checkpoints(runs["base"].folder)[-1])
    return Reading(task.reader, located(name))
