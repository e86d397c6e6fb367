"""AfriMMLU (Adelani et al. 2024, arXiv:2406.03368): questions of MMLU in African languages.

Its own splits are kept: the larger one for development (validation) is trained on, the smaller one (dev) validated on. A
file of several languages, as of MMLU's medical subjects in eleven of them, has columns lang and split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from tiltlm.data.tables import Placed
from tiltlm.questions.base import Question
from tiltlm.questions.readers.columns import rows, subject
from tiltlm.questions.readers.letters import lettered
from tiltlm.questions.repeats import consistent
from tiltlm.questions.splits import FURTHER, Parts, Portion, Split, by_name
from tiltlm.questions.wording import Asking
from tiltlm.tasks.data_set import BETA, MODEL, OfDataSet, Put, Taken
from tiltlm.tasks.language import Flat

CALLED: dict[str, Split] = {"validation": "train", "val": "train", "dev": "valid", "test": "test"}
"""What each of its splits is for."""

OF_SUBJECT = 10_000
"""Numbers that a subject may have."""


@dataclass(frozen=True)
class AfriMMLU(OfDataSet):
    """Questions of MMLU in African languages."""

    language: Flat = MODEL
    asking: Put = Asking()
    portion: Taken = Portion()
    lang: str = "yor"
    """The language: a configuration of the hub's data set, or what a file has in its column lang."""

    file: str = ""
    """A file with columns lang and split (empty: the data set of the hub)."""

    grading: str = "pick"
    """Who reads the answers, by name (`tiltlm.questions.graders`)."""

    beta: float = BETA
    """Divides the reward, 1 for a right answer: smaller leans harder on it."""

    name: tyro.conf.Suppress[str] = "afrimmlu"

    def parts(self) -> Parts:
        return by_name(consistent(self.of_file() if self.file else self.of_hub(), self.name), CALLED)

    def of_hub(self) -> list[Question]:
        """The questions of the hub's three splits."""
        found = []
        for k, split in enumerate(("dev", "validation", "test")):
            own = rows(f"masakhane/afrimmlu#{self.lang}[{split}]", split, f"{self.name} {self.lang}")
            found += lettered([(where, row | {"split": split}) for where, row in own], k * FURTHER)
        return found

    def of_file(self) -> list[Question]:
        """The questions of a file in the language."""
        found = rows(self.file, "test", self.name)
        known = dict.fromkeys(str(row.get("lang", "")) for _, row in found)
        if self.lang not in known:
            raise ValueError(
                f"{self.file} has no questions in {self.lang!r}; its column lang has {', '.join(known) or 'nothing'}"
            )
        return lettered(alike([(where, row) for where, row in found if row["lang"] == self.lang]))

    def sources(self) -> list[str]:
        return [self.file] if self.file else []


def alike(rows: Sequence[Placed]) -> list[Placed]:
    """Rows of one language, numbered by split, subject and place in the subject: the same question has the same number in
    every language, whatever rows a file lacks. Without a column subject_index they keep their places."""
    if not all("subject_index" in row for _, row in rows):
        return list(rows)
    subjects = sorted({subject(row) for _, row in rows})
    splits = sorted({str(row.get("split")) for _, row in rows})

    def number(row: dict[str, Any]) -> int:
        first = splits.index(str(row.get("split"))) * FURTHER + subjects.index(subject(row)) * OF_SUBJECT
        return first + int(row["subject_index"])

    return [(where, row | {"index": number(row)}) for where, row in rows]
