"""What the tasks of questions of a data set share: how they are put, which are taken, who grades.

Such a task is a frozen dataclass with `language`, `asking`, `portion` and `grading` among its fields that says what its
questions are, by split (`parts`), and which files they are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import tyro

from tiltlm.objective import positive
from tiltlm.problem import SPLITS, Split
from tiltlm.questions.base import Grader, Question
from tiltlm.questions.graders import grader
from tiltlm.questions.repeats import say_leaks
from tiltlm.questions.splits import VERBS, Parts, Portion
from tiltlm.questions.wording import Asking
from tiltlm.tasks.language import AUTO, Language
from tiltlm.tasks.questions import OfQuestions

Put = Annotated[Asking, tyro.conf.arg(name="")]
"""The settings of a question's prompt beside the task's own on the command line: --task.template, --task.meta, …"""

Taken = Annotated[Portion, tyro.conf.arg(name="")]
"""Likewise: --task.train, --task.valid, …"""

MODEL = Language(new_tokens=1024, stop=AUTO)
"""The project's own small model, where none is named; completions end as the model's files say."""

BETA = 0.2


class OfDataSet(OfQuestions):
    """A task whose questions are a data set's."""

    asking: Put
    portion: Taken
    grading: str
    shows: ClassVar[tuple[str, ...]] = (
        "language.model", "file", "asking.template", "asking.meta", "asking.chat", "language.new_tokens", "portion.train",
        "grading", "beta",
    )  # fmt: skip

    def parts(self) -> Parts:
        """All its questions by split. Raises ValueError, naming the place, for what is no question."""
        raise NotImplementedError

    def sources(self) -> list[str]:
        """The files that settings name."""
        raise NotImplementedError

    def asked(self, split: Split, seed: int) -> Sequence[Question]:
        return self.portion.of(_parts(self._source(), _changed(self.sources()))[split], split)

    def _source(self) -> Self:
        """This task, with only those settings of its own that say which questions there are."""
        return replace(self.untilted(), language=MODEL, asking=Asking(), portion=Portion())  # type: ignore[type-var]

    @property
    def grader(self) -> Grader:
        return grader(self.grading)

    def put(self, question: Question, tokenizer: Any, hint: bool = False) -> list[int]:
        return self.asking.put(question, tokenizer, hint)

    def files(self) -> list[str]:
        return super().files() + [name for name in (*self.sources(), self.asking.file) if name]

    def untilted(self) -> Self:
        return replace(self, beta=1.0, grading=type(self).grading)  # type: ignore[type-var]

    def check(self) -> None:
        super().check()
        positive(beta=self.beta)
        _ = self.grader
        if (self.language.prompt, self.language.prompt_ids) != (MODEL.prompt, ()):
            raise ValueError(
                "the prompts are questions: --task.template and --task.meta word them, not --task.prompt"
            )
        for split in SPLITS:
            found = self.asked(split, 0)
            if not found:
                raise ValueError(
                    f"{self.name}: no question is left to {VERBS[split]}: there must be six or more, and --task.longest "
                    "may leave too many of them out"
                )
            self.asking.said(found[0])


@lru_cache(4)
def _parts(task: OfDataSet, changed: tuple[int, ...]) -> Parts:
    """changed: when its files were written last; others of their names are read again."""
    found = task.parts()
    say_leaks(found, task.name)
    return found


def _changed(files: Sequence[str]) -> tuple[int, ...]:
    return tuple(path.stat().st_mtime_ns for path in map(Path, files) if path.is_file())
