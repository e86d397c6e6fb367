"""A round: draw, grade, build, update, validate. A chain of rounds is how a method learns where its feed's source says so.

    answers_k = draws of the policy that round k − 1 ended with, graded        (k = 1: of the reference, or a file's)
    policy_k  = the method's update on what is built of them, from the reference or from policy_{k−1}

Each phase is a run of its own: an interrupted chain goes on where it stood, one more round is added to those there are,
and methods share the reference's answers. A round that finds a reason to end says so; those after it pass it on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import tyro

from tiltlm.experience import Experience, Offline, Subsets
from tiltlm.feeds import Rounds, mapped
from tiltlm.feeds.rounds import built
from tiltlm.fit import Fit
from tiltlm.groups import Groups
from tiltlm.jsonl import read_json
from tiltlm.method import Learner, Lesson
from tiltlm.models.base import LanguageModel
from tiltlm.nets import Net, begun, learner, loaded
from tiltlm.objective import Weighed
from tiltlm.problem import Problem
from tiltlm.progress import note
from tiltlm.run import Recipe, Run
from tiltlm.samplers.scenes import OnePrompt
from tiltlm.samplers.serving import HERE
from tiltlm.samples import Pairs, Samples
from tiltlm.settings import ADDED
from tiltlm.stages.answers import OVER, Answers, right_from
from tiltlm.stages.cells import Cell
from tiltlm.stages.learn import Stop
from tiltlm.stages.log_ref import referring, score
from tiltlm.stages.reporting import Row
from tiltlm.stages.task import OfTask, Task
from tiltlm.stages.training import train
from tiltlm.stages.validation import reason_to_end, shares, validated
from tiltlm.train import best_checkpoint, checkpoints, step_of


@dataclass(frozen=True)
class Round(OfTask):
    """One round of a method."""

    task: Task
    method: Any
    feed: Any
    fit: Fit
    net: Net
    index: int
    """0 for the first."""

    called: str = ""
    learns_of: tyro.conf.Suppress[Any] = field(default=None, metadata=ADDED)
    """A round of another chain, from whose answers this one learns (None: it has answers of its own)."""

    seed: int = 0
    shared: ClassVar[bool] = True

    @staticmethod
    def last_of(task: Task, cell: Cell, called: str, seed: int, learns_of: Round | None = None) -> Round:
        """The end of a cell's chain: no more of the target in it than training needs."""
        trained = cell.method.trained()
        if not cell.depends_on_beta(task.facts()):
            trained, task = trained.bound(task.beta), task.at(1.0)
        return Round(
            task, trained, cell.feed, cell.fit, cell.net, cell.feed.rounds.count - 1, called, learns_of, seed
        ).counted()

    def counted(self) -> Round:
        """How many rounds are to come does not matter; nor, to the first, what later ones begin with."""
        none, how = Rounds(), replace(self.how, count=Rounds().count)
        if not self.index:
            how = replace(how, start=none.start, reference=none.reference, growth=1.0)
            how = replace(how, accumulate=self.learns_of is not None and how.accumulate)
        return replace(self, feed=replace(self.feed, rounds=how, draw=self.feed.draw.still))

    @property
    def how(self) -> Rounds:
        found: Rounds = self.feed.rounds
        return found

    @property
    def stage(self) -> str:  # type: ignore[override]
        return f"{self.called}-round-{self.index + 1}"

    @property
    def before(self) -> Round | None:
        return replace(self, index=self.index - 1).counted() if self.index else None

    @property
    def answers(self) -> Answers:
        """What this round learns from."""
        if self.learns_of is not None:
            found: Answers = self.learns_of.answers
            return found
        how = self.how
        own = Answers(
            self.task, how.n, how.prompts, before=self.before, hinted=how.rationalize, right=how.right,
            rows=how.batch_size, draw=self.feed.draw, seed=self.seed,
        )  # fmt: skip
        if self.index:
            return own
        return replace(own, policy=self.net.weights, samples=how.samples, draw=HERE if how.samples else own.draw)

    @property
    def valid(self) -> Answers:
        """Answers to validation prompts by who answers first; the same for every round."""
        how = self.how
        return Answers(
            self.task, how.n, split="valid", right=how.right, policy=self.net.weights, samples=how.valid_samples,
            rows=how.batch_size, draw=HERE if how.valid_samples else self.feed.draw, seed=self.seed,
        )  # fmt: skip

    @property
    def validated(self) -> bool:
        return self.task.facts().held_out

    def inputs(self) -> dict[str, Recipe]:
        found: dict[str, Recipe] = {"answers": self.answers}
        if self.before is not None:
            found["before"] = self.before
        if self.validated:
            found["valid"] = self.valid
        return self.needs() | found

    def files(self) -> list[str]:
        return [*super().files(), *self.cell.files()]

    @property
    def cell(self) -> Cell:
        return Cell(self.method, self.feed, self.fit, self.net)

    def check(self) -> None:
        super().check()
        why = self.cell.why_not(self.task.facts())
        if why:
            raise ValueError(f"{self.name}: {why}")

    # ---- building -------------------------------------------------------------------------------------------------

    def build(self, run: Run[Any]) -> None:
        before = run.inputs.get("before")
        if before is not None and (before.folder / OVER).is_file():
            run.write_json(OVER, read_json(before.folder / OVER))
            return
        problem = self.problem(run)
        right = right_from(problem.facts, self.how.right)
        rows = self.rows(run, problem, right)
        if not len(rows):
            self.end(run, f"round {self.index + 1} has nothing to learn from: no prompt has {self.wanted()}")
            run.write_json("report.json", shares(self, run, right, 0))
            return
        plain = problem  # with adapters, the learner's reference is the learner's own network without them
        problem, who = learner(plain, self.method, self.net, plain.stream.child(self.stage, "init"))
        if before is not None and self.how.start == "previous":
            who.module.restore(best_checkpoint(before.folder))
        fit = self.fit.of(len(rows))
        fit = replace(fit, steps=max(1, round(fit.steps * self.how.growth**self.index)))
        note(f"{self.name}: {len(rows)} rows, {fit.steps} steps of {fit.batch_size}")
        found = self.referred(run, problem, plain, rows)
        train(
            run, who.module, self.objective(problem), self.experience(problem, who, found, fit), fit, problem.device,
            problem.stream.child(self.called, self.index), passes=self.method.passes,
        )  # fmt: skip
        report = shares(self, run, right, len(rows)) + validated(self, run, problem, who, right)
        run.write_json("report.json", report)
        why = reason_to_end(self, run)
        if why:
            self.end(run, why)

    def objective(self, problem: Problem) -> Any:
        """What is minimised."""
        found = self.method.objective(problem)
        return Weighed(found) if self.how.weigh == "prompts" else found

    def wanted(self) -> str:
        return "a right answer" if self.method.fed == "answers" else "right and wrong answers"

    def rows(self, run: Run[Any], problem: Problem, right: float) -> Samples | Pairs | Groups:
        """What is built of this round's answers, and of those before where they accumulate."""
        drawn = list(reversed(self.drawn(run))) if self.how.accumulate else self.drawn(run)[:1]
        graded = [each.recipe.graded(each) for each in drawn]
        told = [
            each.recipe.rationalized(each, problem, self.how.show_hint) for each in drawn if self.how.rationalize
        ]
        own = problem.stream.child(self.called, "build", self.index)
        return built(graded, self.method.fed, self.how, right, own, told)

    def drawn(self, run: Run[Any]) -> list[Run[Any]]:
        """The runs of all answers so far, the latest first (of a chain that was over early, those that there are)."""
        found = [run.inputs["answers"]]
        while "before" in found[-1].inputs:
            found.append(found[-1].inputs["before"].inputs["answers"])
        return [each for each in found if (each.folder / "answers.jsonl").is_file()]

    def referred(self, run: Run[Any], problem: Problem, plain: Problem, rows: Any) -> Any:
        """`rows` with log-probabilities of the reference, or of the round before, which `plain` reads."""
        if self.method.fed == "answers":
            return rows.to(problem.device)
        before = run.inputs.get("before")
        if before is None or self.how.reference == "base":
            fill = partial(
                referring, run.folder.parents[1] / "log_ref", problem, self.fit.precision, split="train"
            )
        else:
            model = before.recipe.learnt(before, plain).policy
            fill = partial(scored, model=model, precision=self.fit.precision)
        return mapped(rows, fill).to(problem.device)

    def experience(self, problem: Problem, who: Learner, rows: Any, fit: Fit) -> Experience:
        """Batches of the rows, as the method wants them."""
        order = problem.stream.child(self.called, "data", self.index)
        found: Experience = Offline(rows, fit.batch_size, order)
        if isinstance(rows, Groups) and self.feed.size < rows.size:
            found = Subsets(found, self.feed.size, order.child("subsets"))
        lesson = Lesson(problem, who, OnePrompt(problem.prompts["train"]), 1, order)
        wanted: Experience = self.method.experience(found, lesson)
        return wanted

    def learnt(self, run: Run[Any], problem: Problem, folder: Path | None = None) -> Learner:
        """What this round ended with; where the chain had ended before, what that one ended with."""
        if not has_weights(run):
            if "before" not in run.inputs:
                return self.beginning(problem)
            before = run.inputs["before"]
            found: Learner = before.recipe.learnt(before, problem)
            return found
        own = problem.stream.child(self.stage, "init")
        return loaded(problem, self.method, self.net, folder or best_checkpoint(run.folder), own)

    def learner_at(self, run: Run[Any], problem: Problem, name: str) -> Learner:
        """What `round2` ended with, say (round0: the reference), or a checkpoint of the last round by its step; empty: the
        last round's end. Raises ValueError for another name."""
        known = {f"round{stop.about['round']}": stop for stop in self.stops(run, 0)}
        kept = {str(step_of(path)): path for path in checkpoints(run.folder)}
        if name and name not in known and name not in kept:
            raise ValueError(f"{run.folder} has no {name!r}; there are {', '.join([*known, *kept])}")
        return known[name].load(problem) if name in known else self.learnt(run, problem, kept.get(name))

    def beginning(self, problem: Problem) -> Learner:
        """Nothing learnt yet: the reference, or the weights that are named in its place."""
        return Learner(None, policy=begun(problem, self.net.weights) if self.net.weights else problem.reference)

    def stops(self, run: Run[Any], count: int) -> list[Stop]:
        """Where there is something to measure: what the chain began with, and what every round ended with."""
        found, updates, drawn = [Stop(0, self.beginning, {"round": 0, "drawn": 0})], 0, 0
        for each in chain(run):
            updates += step_of(checkpoints(each.folder)[-1])
            drawn += each.inputs["answers"].recipe.drawn(each.inputs["answers"])
            about = {"round": each.recipe.index + 1, "drawn": drawn}
            found.append(Stop(updates, partial(each.recipe.learnt, each), about))
        return found

    def decoder(self, run: Run[Any]) -> LanguageModel:
        problem = self.problem(run)
        made: LanguageModel = self.method.decoder(problem, self.learnt(run, problem))
        return made

    def end(self, run: Run[Any], why: str) -> None:
        """Write down that no round follows."""
        note(f"[yellow]{self.name}: {why}; no round follows[/]")
        run.write_json(OVER, {"round": self.index + 1, "why": why})


def scored(samples: Samples, model: LanguageModel, precision: str) -> Samples:
    """`samples` with another model's log-probabilities in the reference's place."""
    return samples.with_(log_ref=score(samples, model, precision))


def has_weights(run: Run[Any]) -> bool:
    """Whether a round trained anything: not where it found nothing to learn from, nor where the chain was over before."""
    return any(run.folder.glob("checkpoint-*"))


def told(last: Run[Any]) -> list[Row]:
    """The reports of all rounds up to this one, each row with its round."""
    found, each = [], last
    while True:
        rows = read_json(each.folder / "report.json") if (each.folder / "report.json").is_file() else []
        found.append([one | {"round": each.recipe.index + 1} for one in rows])
        if "before" not in each.inputs:
            return [one for rows in reversed(found) for one in rows]
        each = each.inputs["before"]


def chain(last: Run[Any]) -> list[Run[Any]]:
    """The rounds up to this one that trained something, the first one first."""
    found = [last]
    while "before" in found[-1].inputs:
        found.append(found[-1].inputs["before"])
    return [each for each in reversed(found) if has_weights(each)]
