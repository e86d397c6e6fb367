"""Examining: the questions of a split put to a method's model by a protocol. Trains nothing itself.

The stage `METHOD@PROTOCOL`, `star@avg@4` say. Its run holds the answers line by line (`answers.jsonl`, from which an
interrupted exam goes on), one observation a question (`measurement.safetensors`; the questions' numbers and right answers,
in that order, in `questions.json`), accuracies by subject and the answers given (`subjects.json`, `answers.json`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from rich.console import Console
from torch import Tensor

from tiltlm.fit import Fit
from tiltlm.jsonl import read_rows
from tiltlm.method import Learner
from tiltlm.models.base import LanguageModel
from tiltlm.nets import Net
from tiltlm.problem import Problem, Split
from tiltlm.progress import steps
from tiltlm.questions.exam import Exam, Protocol
from tiltlm.questions.outcomes import Outcome, by_subject, constant, fingerprint, histogram, observations
from tiltlm.questions.protocols import protocol
from tiltlm.ruler.accuracies import accuracies
from tiltlm.ruler.measure import Measurement
from tiltlm.ruler.table import read_report
from tiltlm.run import Recipe, Run
from tiltlm.settings import SPEED, at_least_one
from tiltlm.stages.draws import append
from tiltlm.stages.exact import ExactSettings
from tiltlm.stages.measure import Measure, RulerSettings
from tiltlm.stages.reporting import Row, estimate
from tiltlm.stages.task import OfTask, Task


@dataclass(frozen=True)
class ExamSettings:
    """Which questions are put to which state of a model."""

    split: Split = "test"
    """Whose questions: train, valid or test."""

    questions: int = 0
    """The first ones of the split (0: all)."""

    at: str = ""
    """A checkpoint of the training by its step, or what a round ended with, round2 say (default: the best, the last)."""

    batch_size: int = field(default=64, metadata=SPEED)
    """Completions drawn at once; those of one question always are."""

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size")
        if self.questions < 0:
            raise ValueError(f"questions are the first ones, 0 for all; got {self.questions}")


@dataclass(frozen=True)
class Examine(OfTask):
    """A method's model answers questions: accuracy, how many answers could be read, how many ended by themselves."""

    task: Task
    method: Any
    feed: Any
    fit: Fit
    net: Net
    exam: ExamSettings = ExamSettings()
    exact: ExactSettings = ExactSettings()
    called: str = ""
    seed: int = 0
    shared: ClassVar[bool] = True

    @staticmethod
    def of(measured: Measure, name: str, exam: ExamSettings = ExamSettings()) -> Examine:
        """What `measured` measures, examined by the protocol called `name`."""
        m = measured
        return Examine(m.task, m.method, m.feed, m.fit, m.net, exam, m.exact, f"{m.called}@{name}", m.seed)

    @property
    def stage(self) -> str:  # type: ignore[override]
        return self.called

    @property
    def measured(self) -> Measure:
        """The stage that measures the same against the target."""
        return Measure(
            self.task, self.method, self.feed, self.fit, self.net, RulerSettings(absolute=False), self.exact,
            called=self.called.partition("@")[0], seed=self.seed,
        ).counted()  # fmt: skip

    @property
    def protocol(self) -> str:
        """Its name."""
        return self.called.partition("@")[2]

    def counted(self) -> Examine:
        like = self.measured
        made = replace(self, feed=like.feed, exact=like.exact)
        if self.method.trains != "policy" or like.cell.depends_on_beta(self.task.facts()):
            return made
        return replace(made, task=self.task.at(1.0), method=self.method.bound(self.task.beta))

    def inputs(self) -> dict[str, Recipe]:
        return self.measured.inputs()

    def files(self) -> list[str]:
        return self.measured.files()

    def check(self) -> None:
        protocol(self.protocol)
        if not self.task.questions:
            raise ValueError(
                f"{self.name}: protocols put questions, and {self.task.name} has none: measure it instead"
            )
        if self.exam.at and self.measured.learn() is None:
            raise ValueError(f"{self.name}: nothing is trained, so there is no checkpoint {self.exam.at!r}")
        self.measured.check()

    # ---- examining ----------------------------------------------------------------------------------------------

    def build(self, run: Run[Any]) -> None:
        problem, how = self.problem(run), protocol(self.protocol)
        exam = self.put(problem, self.learner(run, problem))
        path, chunk = run.folder / "answers.jsonl", how.rows * max(1, self.exam.batch_size // how.rows)
        with steps(f"{self.name} {self.exam.split}") as on_step:
            append(path, partial(lines, exam, how), len(exam) * how.rows, chunk, on_step)
        rows = list(read_rows(path, ("index",)))
        self.write(run, how.outcomes(rows))
        run.write_jsonl("samples.jsonl", [{"completion": row["answer"], **row} for row in rows[:: how.rows][:200]])

    def learner(self, run: Run[Any], problem: Problem) -> Learner:
        """What is examined."""
        kept = run.inputs.get("learnt")
        if kept is None:
            return Learner(None, policy=problem.reference)
        learner: Learner = kept.recipe.learner_at(kept, problem, self.exam.at)
        return learner

    def put(self, problem: Problem, learner: Learner) -> Exam:
        """The questions, and the model that they are put to."""
        assert problem.grading is not None  # a task of questions has one
        some = slice(0, self.exam.questions or None)
        prompts, asked = problem.prompts[self.exam.split].select(some), problem.questions[self.exam.split][some]
        model = self.method.bound(problem.beta).decoder(problem, learner)
        own = problem.stream.child(
            "exam"
        )  # the same for all methods: their differences are paired by draw as well
        return Exam.of(
            model, prompts, asked, problem.grading, problem.width, own, protocol=self.protocol, seed=self.seed
        )

    def write(self, run: Run[Any], outcomes: Sequence[Outcome]) -> None:
        """Everything that is read off the outcomes."""
        found, (best, always) = observations(self.protocol, outcomes), constant(outcomes)
        run.save("measurement.safetensors", Measurement(found))
        run.write_json("questions.json", [(each.index, each.correct) for each in outcomes])
        run.write_json("answers.json", {"given": histogram(outcomes), "constant": best})
        metrics = found | {"accuracy[constant]": always}
        run.write_json("report.json", [self.row(outcomes, name, x) for name, x in metrics.items()])
        subjects = by_subject(outcomes).items()
        right = f"accuracy[{self.protocol}]"
        run.write_json("subjects.json", [self.row(outcomes, right, x) | {"subject": name} for name, x in subjects])

    def row(self, outcomes: Sequence[Outcome], metric: str, x: Tensor) -> Row:
        """A row of a report, which says what questions it is about."""
        which = fingerprint([each.index for each in outcomes])
        return estimate(self, self.examined, metric, x) | {"split": self.exam.split, "questions": which}

    @property
    def examined(self) -> str:
        """What its tables call the model."""
        name = self.called.partition("@")[0]
        return f"{name}@{self.exam.at}" if self.exam.at else name

    def decoder(self, run: Run[Any]) -> LanguageModel:
        problem = self.problem(run)
        found: LanguageModel = self.method.bound(problem.beta).decoder(problem, self.learner(run, problem))
        return found

    def show(self, run: Run[Any]) -> None:
        Console(width=130, highlight=False).print(accuracies(read_report(run.folder / "report.json"), self.name))


def lines(exam: Exam, how: Protocol, begin: int, end: int) -> Iterator[dict[str, Any]]:
    """Lines begin … end − 1 of an exam, those of whole questions."""
    return how.lines(exam, begin // how.rows, end // how.rows)
