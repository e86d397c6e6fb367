"""Multiple choice questions of your own: `tiltlm run mcq/reference --task.file my.csv --task.model FOLDER`."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from tiltlm.questions.readers.columns import rows
from tiltlm.questions.readers.letters import lettered
from tiltlm.questions.repeats import consistent
from tiltlm.questions.splits import Parts, Portion, by_place
from tiltlm.questions.wording import Asking
from tiltlm.tasks.data_set import BETA, MODEL, OfDataSet, Put, Taken
from tiltlm.tasks.language import Flat


@dataclass(frozen=True)
class MCQ(OfDataSet):
    """Multiple choice questions of your own."""

    language: Flat = MODEL
    asking: Put = Asking()
    portion: Taken = Portion()
    file: str = ""
    """Your questions, a csv, jsonl or parquet file, or a data set of the hub. Columns by their usual names: question; A, B,
    … or choices; answer (a letter, an option's text, or its place from 0); subject, index and split (train, valid, test),
    where there are any."""

    grading: str = "pick"
    """Who reads the answers, by name (`tiltlm.questions.graders`)."""

    beta: float = BETA
    """Divides the reward, 1 for a right answer: smaller leans harder on it."""

    name: tyro.conf.Suppress[str] = "mcq"

    def parts(self) -> Parts:
        if not self.file:
            raise ValueError(
                "say which questions: --task.file my.csv, with columns question, A, B, C, D and answer"
            )
        return by_place(consistent(lettered(rows(self.file, "train", self.name)), self.file))

    def sources(self) -> list[str]:
        return [self.file] if self.file else []
