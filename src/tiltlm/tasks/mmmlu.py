"""MMMLU: MMLU's test set in fourteen languages, translated by people (OpenAI 2024, openai/MMMLU).

A question has the same number, and so is in the same split, in every language.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import tyro

from tiltlm.questions.readers.columns import rows
from tiltlm.questions.readers.letters import lettered
from tiltlm.questions.repeats import consistent
from tiltlm.questions.splits import Parts, Portion, by_number
from tiltlm.questions.wording import Asking
from tiltlm.tasks.data_set import BETA, MODEL, OfDataSet, Put, Taken
from tiltlm.tasks.language import Flat
from tiltlm.tasks.mmlu import SIZE

Locale = Literal[
    "AR-XY",
    "BN-BD",
    "DE-DE",
    "ES-LA",
    "FR-FR",
    "HI-IN",
    "ID-ID",
    "IT-IT",
    "JA-JP",
    "KO-KR",
    "PT-BR",
    "SW-KE",
    "YO-NG",
    "ZH-CN",
]


@dataclass(frozen=True)
class MMMLU(OfDataSet):
    """MMLU in another language."""

    language: Flat = MODEL
    asking: Put = Asking()
    portion: Taken = Portion()
    locale: Locale = "YO-NG"
    """The language, and where it is spoken."""

    file: str = ""
    """Its file, mmlu_YO-NG.csv say (empty: that of the hub)."""

    grading: str = "pick"
    """Who reads the answers, by name (`tiltlm.questions.graders`)."""

    beta: float = BETA
    """Divides the reward, 1 for a right answer: smaller leans harder on it."""

    name: tyro.conf.Suppress[str] = "mmmlu"

    def parts(self) -> Parts:
        hub = f"openai/MMMLU#{self.locale.replace('-', '_')}[test]"
        found = lettered(rows(self.file or hub, "test", f"{self.name} {self.locale}"))
        return by_number(consistent(found, self.name), SIZE, f"MMMLU {self.locale}")

    def sources(self) -> list[str]:
        return [self.file] if self.file else []
