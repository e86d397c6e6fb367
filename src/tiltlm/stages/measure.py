"""Measuring: any method on any task against its target, by one ruler. Trains nothing itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from rich.console import Console
from torch import Tensor

from tiltlm import ranks
from tiltlm.feeds import Feed
from tiltlm.fit import Fit
from tiltlm.jsonl import read_json, read_rows
from tiltlm.method import Learner
from tiltlm.models.base import LanguageModel
from tiltlm.nets import Net
from tiltlm.problem import Problem
from tiltlm.progress import note
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.ruler.table import curve_table, read_report
from tiltlm.run import Recipe, Run
from tiltlm.samples import Samples
from tiltlm.settings import SPEED, at_least_one
from tiltlm.stages.cells import Cell
from tiltlm.stages.exact import ExactSettings, exact_of
from tiltlm.stages.gap import gap_in_groups
from tiltlm.stages.learn import Learn, Stop
from tiltlm.stages.log_z import CommonLogZ, LogZSettings, first_prompts, known, log_z_found
from tiltlm.stages.paid import say_once
from tiltlm.stages.reporting import Row, estimate, row
from tiltlm.stages.rounds import Round
from tiltlm.stages.rounds_story import show_story, write_story
from tiltlm.stages.task import OfTask, Task

DISTANCES = ("kl_to_target", "kl_from_target")


@dataclass(frozen=True)
class RulerSettings:
    """How methods are measured."""

    prompts: int = 0
    """Test prompts (conditions) at most (0: all)."""

    n: int = 2000
    """Draws of each."""

    exact: int = 2000
    """Exact draws used, at most, of one prompt."""

    batch_size: int = field(default=500, metadata=SPEED)
    """Rows at once."""

    absolute: bool = True
    """Off: E[r], KL(q‖ref) and the objective alone, which need neither exact draws nor log Z."""

    checkpoints: int = 1
    """Checkpoints measured on the way, for curves (1: the best one alone)."""

    also: tuple[float, ...] = ()
    """Further temperatures of the target at which values are measured: one value serves them all."""

    @property
    def rows(self) -> str:
        """How many draws of a method are measured, for people."""
        prompts = f"{self.prompts} test prompts at most" if self.prompts else "every test prompt"
        before = f", and at {self.checkpoints} checkpoints before" if self.checkpoints > 1 else ""
        return f"{self.n} of {prompts} (--ruler.n, --ruler.prompts){before}"

    def __post_init__(self) -> None:
        at_least_one(self, "n", "exact", "batch_size")
        if min(self.prompts, self.checkpoints) < 0 or not all(beta > 0 for beta in self.also):
            raise ValueError(f"prompts and checkpoints are not negative, temperatures positive; got {self}")


@dataclass(frozen=True)
class Measure(OfTask):
    """A method against the target: E[r], J, KL to the reference and both KLs to pi*, whatever the task can tell."""

    task: Task
    method: Any
    feed: Any
    fit: Fit
    net: Net
    ruler: RulerSettings = RulerSettings()
    exact: ExactSettings = ExactSettings()
    log_z: LogZSettings = LogZSettings()
    twist: Cell | None = None
    """CTL's settings, for the twist of log Z's bounds; they matter where it is found by bounds."""

    called: str = ""
    seed: int = 0
    shared: ClassVar[bool] = True

    @property
    def stage(self) -> str:  # type: ignore[override]
        return self.called

    @property
    def cell(self) -> Cell:
        return Cell(self.method, self.feed, self.fit, self.net)

    @property
    def absolute(self) -> bool:
        """Whether there is a log Z that a stage finds."""
        return self.ruler.absolute and known(self.log_z.by, self.task.facts())

    def learn(self) -> Learn | Round | None:
        """What trains for this method; None where nothing is trained."""
        if self.method.trained().trains == "nothing":
            return None
        if isinstance(self.feed, Feed) and self.feed.source == "rounds":
            return Round.last_of(self.task, self.cell, self.called_training(), self.seed)
        return Learn.of(self.task, self.cell, self.called_training(), self.exact, self.seed)

    def called_training(self) -> str:
        """The name under which training runs are kept: that of the method that is trained."""
        return str(getattr(self.method, "trained_as", self.called))

    def common_log_z(self) -> CommonLogZ:
        """The one log Z of all methods of this task."""
        twist = self.twist if self.log_z.by == "bounds" else None
        return CommonLogZ(self.task, self.log_z, self.exact, twist, self.seed)

    def counted(self) -> Measure:
        feed = self.cell.counted(self.task.facts()).feed
        if self.absolute:
            return replace(self, feed=feed, twist=self.twist if self.log_z.by == "bounds" else None)
        learn = self.learn()  # exact draws that are stored to train on count, whatever is measured
        exact = learn.exact if isinstance(learn, Learn) else ExactSettings()
        return replace(self, feed=feed, twist=None, exact=exact, log_z=LogZSettings(by="none"))

    def inputs(self) -> dict[str, Recipe]:
        needed, learn = self.needs(), self.learn()
        if learn is not None:
            needed["learnt"] = learn
        if self.absolute:
            common = self.common_log_z()
            needed |= {"log_z": common} | ({"exact": common.inputs()["exact"]} if common.exact_wanted else {})
        return needed

    def files(self) -> list[str]:
        return [*super().files(), *self.cell.files(), *(self.exact.files() if self.absolute else ())]

    def check(self) -> None:
        super().check()
        facts = self.task.facts()
        why = self.cell.why_not(facts)
        if why:
            raise ValueError(f"{self.name}: {why}")
        if facts.paid:
            say_once(self.task.name, f"all draws that are measured: {self.ruler.rows}")
        one = self.ruler.prompts == 1 and self.task.facts().measured != "one"
        if one and self.absolute and self.log_z.by != "enumeration":
            raise ValueError(
                "over several prompts log Z errs with each, which the spread over prompts shows, and one has no spread: "
                "take --ruler.prompts 2 or more, or leave distances out (--ruler.no-absolute)"
            )
        if self.ruler.also and self.absolute and self.method.trained().trains == "value":
            raise ValueError(
                "further temperatures (--ruler.also) have another log Z each, and here it is found for one alone: run "
                "them by themselves (--task.beta), or leave distances out (--ruler.no-absolute)"
            )

    # ---- measuring ------------------------------------------------------------------------------------------------

    def build(self, run: Run[Any]) -> None:
        problem = self.problem(run)
        ruler, rows, curve = self.ruler_of(run, problem), [], []
        for stop, best, learner in self.learners(run, problem):
            method = self.method.bound(problem.beta)
            own = ruler if best or len(ruler.prompts) == 1 or stop.about else replace(ruler, n=1)
            measured, samples = method.measured(problem, learner, own)
            measured = self.more(problem, learner, measured, own) if best else measured
            measured = where_it_counts(measured, problem, len(own.prompts))
            rows = measured.rows(self.name, self.called, self.seed)
            curve += [each | {"updates": stop.updates, **stop.about} for each in rows]
        run.save("measurement.safetensors", measured)
        run.save("samples.safetensors", samples)
        run.write_jsonl("samples.jsonl", self.shown(problem, samples))
        if problem.questions:  # what is measured are the first of the test prompts
            asked = problem.questions["test"][: len(ruler.prompts)]
            run.write_json("questions.json", [(question.index, question.answer) for question in asked])
        rows += self.of_training(run, problem, learner, stop.updates) + self.at_other_betas(run, problem)
        rows += ranks.from_first(lambda: self.task.report_rows(run, problem))
        run.write_json("report.json", rows)
        if len({each["updates"] for each in curve}) > 1:
            run.write_json("curve.json", curve)
        if isinstance(self.learn(), Round) and ranks.is_first():
            write_story(run, curve, self.task.title())

    def learners(self, run: Run[Any], problem: Problem) -> Iterator[tuple[Stop, bool, Learner]]:
        """What to measure: (where, whether it is the best, learner), one in memory at a time, the best last."""
        kept = run.inputs.get("learnt")
        if kept is None:
            yield (
                Stop(0, lambda problem: Learner(None, policy=problem.reference)),
                True,
                Learner(None, policy=problem.reference),
            )
            return
        stops = kept.recipe.stops(kept, self.ruler.checkpoints)
        for k, stop in enumerate(stops):
            yield stop, k + 1 == len(stops), stop.load(problem)

    def more(self, problem: Problem, learner: Learner, measured: Measurement, ruler: Ruler) -> Measurement:
        """The task's further numbers of a policy."""
        further = problem.further
        if further is None or self.method.trained().trains != "policy":
            return measured
        decoder = self.method.decoder(problem, learner)
        found = ranks.from_first(lambda: dict(further(decoder, ruler.prompts)))
        return replace(measured, values=dict(measured.values) | found)

    def of_training(self, run: Run[Any], problem: Problem, learner: Learner, updates: int) -> list[Row]:
        """Report rows of what was trained: the updates of the best checkpoint, the gap within held-out groups."""
        if "learnt" not in run.inputs:
            return []
        rows = self.labels(run, updates)
        if self.fit.evaluations:
            rows.append(row(self, self.called, "updates", updates, unit="updates"))
        if self.fit.evaluations and updates == 0:
            note(
                f"[yellow]{self.name}: no update improved J on validation prompts, so what is measured here is what it "
                "began as[/]: lower --fit.lr, or look at evals.jsonl of the training"
            )
        if learner.policy is None:
            return rows
        beta_pi = getattr(self.method, "beta_pi", problem.beta_pi)
        gap = gap_in_groups(run.inputs["learnt"], problem, learner.policy, beta_pi)
        return rows + ([estimate(self, self.called, "gap", gap, "nats")] if len(gap) else [])

    def labels(self, run: Run[Any], updates: int) -> list[Row]:
        """What a judge had bought by then."""
        if not isinstance(self.feed, Feed) or self.feed.judge.kind == "none" or updates == 0:
            return []
        line = next(
            x for x in read_rows(run.inputs["learnt"].folder / "metrics.jsonl") if x["step"] == updates - 1
        )
        return [row(self, self.called, "labels", line["labels_bought"])]

    def at_other_betas(self, run: Run[Any], problem: Problem) -> list[Row]:
        """Rows of the further temperatures, where a value is decoded with one."""
        rows: list[Row] = []
        if self.method.trained().trains != "value" or not hasattr(self.method, "beta"):
            return rows
        kept = run.inputs["learnt"]
        for beta in self.ruler.also:
            if beta != self.task.beta:
                at = problem.at(beta)
                ruler = replace(self, task=self.task.at(beta)).ruler_of(run, at)
                method = replace(self.method, beta=None).bound(beta)
                found, _ = method.measured(at, kept.recipe.learnt(kept, at), ruler)
                rows += found.rows(self.name, f"{self.called} (beta {beta:g})", self.seed)
        return rows

    # ---- the ruler ------------------------------------------------------------------------------------------------

    def ruler_of(self, run: Run[Any], problem: Problem) -> Ruler:
        """The comparison's ruler: the same prompts, draws and log Z for all methods."""
        exact = exact_of(run).to(problem.device) if "exact" in run.inputs else None
        log_z = log_z_found(run, exact) if "log_z" in run.inputs else None
        return ruler_of(problem, self.ruler, exact, log_z)

    def shown(self, problem: Problem, samples: Samples) -> list[dict[str, Any]]:
        """Rows for samples.jsonl: of one prompt (or with conditions) those of most weight, of several one each."""
        if problem.facts.measured == "several":
            first = samples.select(slice(0, None, max(1, len(samples) // len(samples.prompts))))
            return (problem.beside or problem.rows)(first.select(slice(0, 200)))
        best = samples.select(samples.log_w.argsort(descending=True)) if samples.log_w is not None else samples
        return problem.rows(best.select(slice(0, 300)))

    def decoder(self, run: Run[Any]) -> LanguageModel:
        problem = self.problem(run)
        *_, (_, _, learner) = self.learners(run, problem)
        decoder: LanguageModel = self.method.bound(problem.beta).decoder(problem, learner)
        return decoder

    def show(self, run: Run[Any]) -> None:
        super().show(run)
        if isinstance(self.learn(), Round):
            show_story(run)
        elif (run.folder / "curve.json").is_file():
            curve = read_report(run.folder / "curve.json")
            Console(width=130, highlight=False).print(curve_table(curve, f"{self.name}: on the way"))
        say_doubts([run])
        if "log_z" in run.inputs:
            print(LogZ.from_json(read_json(run.inputs["log_z"].folder / "log_z.json")))


def where_it_counts(measured: Measurement, problem: Problem, prompts: int) -> Measurement:
    """`measured` on the first `prompts` test prompts, each check on those alone on which it means something; left out where
    there are none. (Of a single prompt, observations are its draws.)"""
    values = dict(measured.values)
    for name in problem.counts.keys() & values.keys():
        x = values.pop(name)
        means = problem.counts[name][:prompts].to(x.device)
        x = x[means.expand(len(x)) if prompts == 1 else means]
        values |= {name: x} if len(x) else {}
    return replace(measured, values=values)


def say_doubts(runs: Iterable[Run[Any]]) -> None:
    """Say, once each, what is to be doubted of what these measurements rest on."""
    for text in dict.fromkeys(text for run in runs for text in run.recipe.task.doubts(run.inputs)):
        note(f"[yellow]{text}[/]")


def ruler_of(
    problem: Problem, settings: RulerSettings, exact: Samples | None = None, log_z: LogZ | Tensor | None = None
) -> Ruler:
    """The ruler of a problem: its test prompts, its checks, its log Z where that is computed."""
    prompts = problem.prompts["test"]
    if problem.facts.conditioned:
        exact = _conditions(problem, settings, exact)
        prompts = exact.prompts
    elif settings.prompts and len(prompts) > settings.prompts:
        prompts = prompts.select(slice(0, settings.prompts))
        exact = None if exact is None else first_prompts(exact, settings.prompts)
    if settings.absolute and isinstance(log_z, LogZ) and log_z.each is not None and len(log_z.each) < len(prompts):
        note(
            f"measured on the {len(log_z.each)} prompts whose log Z is known, of {len(prompts)} (--log-z.prompts)"
        )
        prompts = prompts.select(slice(0, len(log_z.each)))
        exact = None if exact is None else first_prompts(exact, len(prompts))
    if exact is not None and len(prompts) == 1:
        exact = exact.select(slice(0, settings.exact))
    if not settings.absolute:
        exact = log_z = None
    elif problem.log_z is not None:
        log_z = problem.log_z(prompts, problem.beta)
    if isinstance(log_z, Tensor):
        log_z = log_z[: len(prompts)].to(problem.device)
    expected = problem.expected_reward
    return Ruler(
        problem.target, prompts, problem.width, problem.test_stream or problem.stream.child("measure"), n=settings.n,
        batch_size=settings.batch_size, log_z=log_z, exact=exact, checks=problem.checks,
        expected_reward=None if expected is None else lambda q: expected(q, prompts),
    )  # fmt: skip


def _conditions(problem: Problem, settings: RulerSettings, exact: Samples | None) -> Samples:
    """The test conditions, each with its exact draw: the stored ones, or fresh ones."""
    count = settings.prompts or 100
    if exact is not None:
        return first_prompts(exact, count)
    assert problem.fresh is not None
    return problem.fresh(count, problem.stream.child("conditions", "measure"))[1]
