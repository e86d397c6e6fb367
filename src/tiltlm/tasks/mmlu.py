"""MMLU (Hendrycks et al. 2021, arXiv:2009.03300): questions of 57 subjects with four options each."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from tiltlm.questions.readers.columns import rows
from tiltlm.questions.readers.letters import lettered
from tiltlm.questions.repeats import consistent
from tiltlm.questions.splits import Parts, Portion, by_number
from tiltlm.questions.wording import Asking
from tiltlm.tasks.data_set import BETA, MODEL, OfDataSet, Put, Taken
from tiltlm.tasks.language import Flat

HUB = "cais/mmlu#all[test]"

SIZE = 14_042
"""Questions of its test set, of which the original STaR takes all three splits."""


@dataclass(frozen=True)
class MMLU(OfDataSet):
    """MMLU: questions of 57 subjects, four options each."""

    language: Flat = MODEL
    asking: Put = Asking()
    portion: Taken = Portion()
    file: str = ""
    """Its test set as a csv or jsonl file (empty: that of the hub); its column index, or the one without a name, numbers
    the questions."""

    grading: str = "pick"
    """Who reads the answers, by name (`tiltlm.questions.graders`)."""

    beta: float = BETA
    """Divides the reward, 1 for a right answer: smaller leans harder on it."""

    name: tyro.conf.Suppress[str] = "mmlu"

    def parts(self) -> Parts:
        found = lettered(rows(self.file or HUB, "test", self.name))
        return by_number(consistent(found, self.name), SIZE, "MMLU")

    def sources(self) -> list[str]:
        return [self.file] if self.file else []
