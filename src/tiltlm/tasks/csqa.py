"""CommonsenseQA (Talmor et al. 2019, arXiv:1811.00937): questions of common sense, five options each.

The answers to its test set are not public: what it has for development is tested on, and a tenth of what it has to train on
is held out to validate on.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from tiltlm.questions.readers.columns import rows
from tiltlm.questions.readers.letters import lettered
from tiltlm.questions.repeats import consistent
from tiltlm.questions.splits import FURTHER, Parts, Portion, held_out
from tiltlm.questions.wording import Asking
from tiltlm.tasks.data_set import BETA, MODEL, OfDataSet, Put, Taken
from tiltlm.tasks.language import Flat

HUB = "tau/commonsense_qa[{split}]"


@dataclass(frozen=True)
class CSQA(OfDataSet):
    """Questions of common sense, five options each."""

    language: Flat = MODEL
    asking: Put = Asking()
    portion: Taken = Portion()
    file: str = ""
    """Its questions to train on, a jsonl file (empty: those of the hub)."""

    test_file: str = ""
    """Those for development, which are tested on, likewise."""

    grading: str = "pick"
    """Who reads the answers, by name (`tiltlm.questions.graders`)."""

    beta: float = BETA
    """Divides the reward, 1 for a right answer: smaller leans harder on it."""

    name: tyro.conf.Suppress[str] = "csqa"

    def parts(self) -> Parts:
        train, test = (
            consistent(lettered(rows(file or HUB.format(split=split), split, self.name), first), self.name)
            for file, split, first in ((self.file, "train", 0), (self.test_file, "validation", FURTHER))
        )
        return held_out(train, len(train), test)

    def sources(self) -> list[str]:
        return [name for name in (self.file, self.test_file) if name]
