"""MGSM (Shi et al. 2022, arXiv:2210.03057): 250 questions of GSM8K's test set in eleven languages.

A question has the same number, and so is in the same split, in every language.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from tiltlm.questions.readers.columns import rows
from tiltlm.questions.readers.numbers import solved
from tiltlm.questions.repeats import consistent
from tiltlm.questions.splits import Parts, Portion, by_number
from tiltlm.questions.wording import Asking
from tiltlm.tasks.data_set import BETA, MODEL, OfDataSet, Put, Taken
from tiltlm.tasks.language import Flat

SIZE = 250


@dataclass(frozen=True)
class MGSM(OfDataSet):
    """GSM8K in eleven languages."""

    language: Flat = MODEL
    asking: Put = Asking()
    portion: Taken = Portion()
    lang: Literal["bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh"] = "en"
    """The language."""

    file: str = ""
    """A csv file with a column lang (empty: the data set of the hub)."""

    grading: str = "number"
    """Who reads the answers, by name (`tiltlm.questions.graders`)."""

    beta: float = BETA
    """Divides the reward, 1 for a right answer: smaller leans harder on it."""

    name: tyro.conf.Suppress[str] = "mgsm"

    def parts(self) -> Parts:
        found = rows(self.file or f"juletxara/mgsm#{self.lang}[test]", "test", f"{self.name} {self.lang}")
        own = [(where, row) for where, row in found if row.get("lang", self.lang) == self.lang]
        return by_number(consistent(solved(own), self.name), SIZE, f"MGSM {self.lang}")

    def sources(self) -> list[str]:
        return [self.file] if self.file else []
