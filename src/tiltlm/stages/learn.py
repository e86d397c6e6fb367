"""Learning: any method on any task. What is trained ends in a run's checkpoints; measuring is a run of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from tiltlm.experience import Keeps
from tiltlm.feeds import Feed, Stores, TwistFeed, course_of, source_of
from tiltlm.fit import Fit
from tiltlm.judges.base import Judge
from tiltlm.judges.judged import LEDGER
from tiltlm.method import Learner
from tiltlm.models.base import LanguageModel
from tiltlm.nets import Net, judge_of, learner, loaded
from tiltlm.problem import Problem, Source
from tiltlm.progress import note
from tiltlm.ruler.measure import Measurement
from tiltlm.run import Recipe, Run
from tiltlm.samples import Samples
from tiltlm.stages.cells import Cell
from tiltlm.stages.draws import Labels
from tiltlm.stages.exact import Exact, ExactSettings
from tiltlm.stages.log_ref import referring
from tiltlm.stages.paid import by_training, say_once
from tiltlm.stages.task import OfTask, Task
from tiltlm.stages.training import train
from tiltlm.stages.watched import Watched
from tiltlm.train import best_checkpoint, checkpoints, step_of


@dataclass(frozen=True)
class Learn(OfTask):
    """Train a method."""

    task: Task
    method: Any
    feed: Any
    fit: Fit
    net: Net
    exact: ExactSettings = ExactSettings()
    called: str = ""
    seed: int = 0
    together: ClassVar[bool] = True

    @staticmethod
    def of(task: Task, cell: Cell, called: str, exact: ExactSettings, seed: int) -> Learn:
        """What trains for a cell: the value that several rules share, and no more of the target than training needs."""
        facts, trained = task.facts(), cell.method.trained()
        fed = cell.counted(facts).feed
        if not (isinstance(fed, TwistFeed) and fed.supply == "stored"):
            exact = ExactSettings()
        if not cell.depends_on_beta(facts):
            trained, task = trained.bound(task.beta), task.at(1.0)
        name = called if trained.trains != "value" else "value"
        return Learn(task, trained, fed, cell.fit, cell.net, replace(exact, stored=""), name, seed)

    def counted(self) -> Learn:
        return Learn.of(self.task, self.cell, self.called, self.exact, self.seed)

    @property
    def stage(self) -> str:  # type: ignore[override]
        """`dpo-policy`, `ctl-twist`, `value`."""
        trains = self.method.trains
        return self.called if trains == "value" else f"{self.called}-{trains}"

    @property
    def cell(self) -> Cell:
        return Cell(self.method, self.feed, self.fit, self.net)

    @property
    def source(self) -> Source:
        """Where its rows come from."""
        return source_of(self.task.facts(), self.method, self.feed)

    @property
    def asked(self) -> Task:
        """The task as training asks it: without its reward, where it learns from the data's own rows and no more."""
        told = self.source == "own" and not self.method.asks and not self.fit.evaluations
        return self.task.unrewarded() if told else self.task

    def needs(self) -> dict[str, Recipe]:
        return self.asked.needs(self.seed)

    def problem(self, run: Run[Any]) -> Problem:
        return self.asked.problem(run.inputs, self.seed)

    def inputs(self) -> dict[str, Recipe]:
        needed = self.needs()
        if self.source == "stored":
            needed["label"] = Labels.of(self.task, self.feed.draws, self.seed, self.feed.draw)
        if isinstance(self.feed, TwistFeed) and self.feed.supply == "stored":
            needed["training"] = Exact(self.task, self.exact, "training", self.seed)
        return needed

    def files(self) -> list[str]:
        return [*super().files(), *self.cell.files()]

    def check(self) -> None:
        super().check()
        facts = self.task.facts()
        why = self.cell.why_not(facts)
        if why:
            raise ValueError(f"{self.name}: {why}")
        if facts.paid and (asked := by_training(self.cell)):
            say_once(self.name, asked)

    def build(self, run: Run[Any]) -> None:
        problem = self.problem(run)
        why = self.cell.why_not(problem.facts)  # data that could not be looked at before may hold something else
        if why:
            raise ValueError(f"{self.name}: {why}")
        problem, who = learner(problem, self.method, self.net, problem.stream.child(self.stage, "init"))
        stores = self.stores(run, problem)

        def tell(text: str) -> None:
            note(f"{self.name}: {text}")

        course = course_of(problem, self.method, who, self.feed, self.fit, self.stage, stores, tell)
        if course.rows is not None:
            tell(f"{course.rows} rows, {course.fit.steps} steps of {course.fit.batch_size}")
        objective = self.method.objective(problem)
        watched = Watched(problem, self.method, objective, who, self.feed, stores, self.stage)
        train(
            run, who.module, objective, course.experience, course.fit, problem.device, problem.stream,
            passes=self.method.passes, watch=course.fit.watching(watched, "objective", higher=True),
        )  # fmt: skip
        if isinstance(course.experience, Keeps) and "labels_bought" in (said := course.experience.numbers()):
            tell(spent(said))
        if problem.value_report is not None and self.method.trains == "value" and who.values is not None:
            measured = Measurement(problem.value_report(who.values))
            run.write_json("report.json", measured.rows(self.name, self.stage, self.seed))

    def stores(self, run: Run[Any], problem: Problem) -> Stores:
        """What the inputs have stored for this run."""
        label, training = run.inputs.get("label"), run.inputs.get("training")
        return Stores(
            None if label is None else partial(label.recipe.groups, label, problem),
            None if training is None else lambda: Samples.load(training.folder / "exact.safetensors"),
            partial(referring, run.folder.parents[1] / "log_ref", problem, self.fit.precision)
            if isinstance(self.feed, Feed)
            else None,
            self.judge(run, problem) if isinstance(self.feed, Feed) and self.feed.judge.kind != "none" else None,
        )

    def judge(self, run: Run[Any], problem: Problem) -> Judge:
        """The judge of new rows; its journal outlives interruptions."""
        own = problem.stream.child(self.stage, "judge")
        return judge_of(problem, self.feed.judge, own, run.folder / "judge", self.fit.shard)

    def learnt(self, run: Run[Any], problem: Problem, folder: Path | None = None) -> Learner:
        """What the best checkpoint, or the one in `folder`, holds."""
        own = problem.stream.child(self.stage, "init")
        return loaded(problem, self.method, self.net, folder or best_checkpoint(run.folder), own)

    def learner_at(self, run: Run[Any], problem: Problem, name: str) -> Learner:
        """What a training held on the way: `name` is a step's number; empty: at its best. Raises ValueError for another."""
        kept = {str(step_of(path)): path for path in checkpoints(run.folder)}
        if name and name not in kept:
            raise ValueError(f"{run.folder} has no checkpoint {name!r}; there are {', '.join(kept) or 'none'}")
        return self.learnt(run, problem, kept.get(name))

    def stops(self, run: Run[Any], count: int) -> list[Stop]:
        """The checkpoints to measure: `count` of them spread over the training, if more than one, and the best last."""
        best = best_checkpoint(run.folder)
        others = [path for path in checkpoints(run.folder) if step_of(path) > 0]
        count = min(count, len(others)) if count > 1 else 0
        chosen = [others[round(k * (len(others) - 1) / max(1, count - 1))] for k in range(count)]
        return [Stop(step_of(path), partial(self.learnt, run, folder=path)) for path in (*chosen, best)]

    def decoder(self, run: Run[Any]) -> LanguageModel:
        problem = self.problem(run)
        return self.method.decoder(problem, self.learnt(run, problem))


@dataclass(frozen=True)
class Stop:
    """Where a training is looked at: after how many updates; what stood then (problem -> learner); what else is to be told
    of it (the round it ended)."""

    updates: int
    load: Callable[[Problem], Learner]
    about: Mapping[str, int] = field(default_factory=dict)


def spent(numbers: Mapping[str, float]) -> str:
    """What a judge has bought, for people."""
    n = {name: int(numbers[f"labels_{name}"]) for name in LEDGER}
    return (
        f"{n['bought']} gold verdicts bought: {n['trained']} learnt from, {n['tied']} tied, {n['pending']} pending"
    )
