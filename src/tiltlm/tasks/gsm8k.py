"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade school mathematics in words, the answer a number.

It has questions to train and to test on; a tenth of the former is held out to validate on.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from tiltlm.questions.readers.columns import rows
from tiltlm.questions.readers.numbers import solved
from tiltlm.questions.repeats import consistent
from tiltlm.questions.splits import FURTHER, Parts, Portion, held_out
from tiltlm.questions.wording import Asking
from tiltlm.tasks.data_set import BETA, MODEL, OfDataSet, Put, Taken
from tiltlm.tasks.language import Flat

HUB = "openai/gsm8k#main[{split}]"

SIZE = 7_473
"""Questions to train on."""


@dataclass(frozen=True)
class GSM8K(OfDataSet):
    """Grade school mathematics in words, the answer a number."""

    language: Flat = MODEL
    asking: Put = Asking()
    portion: Taken = Portion()
    file: str = ""
    """Its questions to train on, a jsonl or csv file (empty: those of the hub)."""

    test_file: str = ""
    """Those to test on, likewise."""

    grading: str = "number"
    """Who reads the answers, by name (`tiltlm.questions.graders`)."""

    beta: float = BETA
    """Divides the reward, 1 for a right answer: smaller leans harder on it."""

    name: tyro.conf.Suppress[str] = "gsm8k"

    def parts(self) -> Parts:
        train, test = (
            solved(rows(file or HUB.format(split=split), split, self.name), first)
            for file, split, first in ((self.file, "train", 0), (self.test_file, "test", FURTHER))
        )
        return held_out(consistent(train, self.name), SIZE, consistent(test, self.name))

    def sources(self) -> list[str]:
        return [name for name in (self.file, self.test_file) if name]
