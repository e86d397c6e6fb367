"""Learning in memory: the loop of `train.Training` without a folder, and what comes out of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tiltlm import ranks
from tiltlm.commands.options import from_json
from tiltlm.decoders.sampler import Sampler
from tiltlm.engine import Engine
from tiltlm.experience import Keeps
from tiltlm.feeds import AnyFeed, Feed, Stores, TwistFeed, course_of, source_of
from tiltlm.feeds import Course as Feeding
from tiltlm.feeds.served import of_reference
from tiltlm.fit import Fit
from tiltlm.groups import Groups
from tiltlm.jsonl import read_json, write_whole
from tiltlm.judges.judged import LEDGER
from tiltlm.method import Learner, Method
from tiltlm.methods import method as method_called
from tiltlm.methods import names
from tiltlm.models.base import LanguageModel, without_end
from tiltlm.nets import Net, judge_of, learner, loaded
from tiltlm.problem import Problem, Split, tokens_of
from tiltlm.progress import note
from tiltlm.progress import steps as progress_of
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samples import Samples
from tiltlm.seeds import stream
from tiltlm.stages.cells import default_cell
from tiltlm.stages.exact import ExactSettings
from tiltlm.train import Course

SETTINGS = "tiltlm.json"
"""The file beside a saved network that says what it is."""


@dataclass(frozen=True)
class Learnt:
    """A method that has learnt, in memory: measure it, draw from it, save it.

    problem, method, net: what it was made of. learner: what was trained. metrics: what every step reported.
    """

    problem: Problem
    method: Method
    net: Net
    learner: Learner
    metrics: Sequence[Mapping[str, float]] = ()

    @property
    def labels(self) -> dict[str, int]:
        """Gold verdicts that a judge bought: in all, learnt from, tied, pending; none of these without a judge."""
        last = self.metrics[-1] if self.metrics else {}
        return {name: int(last[f"labels_{name}"]) for name in LEDGER if f"labels_{name}" in last}

    @property
    def model(self) -> LanguageModel:
        """The language model that decodes. Raises ValueError where what decodes is none (SMC, say)."""
        return self.method.bound(self.problem.beta).decoder(self.problem, self.learner)

    def draw(self, prompts: Any = None, n: int = 1, seed: int = 0, batch_size: int = 256) -> Samples:
        """`n` completions of every prompt (texts, lists of ids or Tokens; default: the problem's test prompts), those of a
        prompt side by side."""
        problem, own = self.problem, stream(seed, "draw")
        asked = (
            problem.prompts["test"] if prompts is None else tokens_of(prompts, problem.tokenizer, problem.device)
        )
        method = self.method.bound(problem.beta)
        if isinstance(method, Sampler):
            return method.draw(problem, self.learner, asked, n, own, batch_size)
        return draw_in_batches(
            self.model, asked, n=n, max_new_tokens=problem.width, stream=own, batch_size=batch_size
        )

    def texts(self, prompts: Any = None, n: int = 1, seed: int = 0) -> list[list[str]]:
        """The same as texts: a list of `n` completions for every prompt. Raises ValueError without a tokenizer."""
        tokenizer, ends = self.problem.tokenizer, self.problem.reference.eos_ids
        if tokenizer is None:
            raise ValueError("the model has no tokenizer, so there are no texts: take draw()")
        drawn = self.draw(prompts, n, seed)
        rows = tokenizer.batch_decode([without_end(ids, ends) for ids in drawn.completions.lists()])
        return [rows[k : k + n] for k in range(0, len(rows), n)]

    def save(self, folder: str | Path) -> Path:
        """Write the network to a folder that `measure` takes (a policy's loads with `from_pretrained` too)."""
        if self.learner.module is None:
            raise ValueError(f"{type(self.method).__name__} has trained nothing, so there is nothing to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.learner.module.save(folder)
        about = {"method": name_of(self.method), "settings": asdict(self.method), "net": asdict(self.net)}  # type: ignore[call-overload]
        write_whole(folder / SETTINGS, json.dumps(about, indent=1) + "\n")
        return folder

    @staticmethod
    def load(problem: Problem, folder: str | Path) -> Learnt:
        """What `save` wrote, read for a problem with the same reference."""
        about = read_json(Path(folder) / SETTINGS)
        method = from_json(method_called(about["method"]), about["settings"])
        net = from_json(Net(), about["net"])
        own = problem.stream.child("loaded")
        return Learnt(problem, method, net, loaded(problem, method.trained(), net, Path(folder), own))


def name_of(method: Method) -> str:
    """The catalogue's first name for a method of this class."""
    for name in names():
        known = method_called(name)
        if type(known) is type(method) and known.trained().trains == method.trained().trains:
            return name
    raise ValueError(f"{type(method).__name__} is no method of the catalogue, so nothing could read it back")


def learn(
    problem: Problem,
    method: Method | str,
    *,
    steps: int | None = None,
    lr: float | None = None,
    feed: AnyFeed | None = None,
    net: Net | None = None,
    fit: Fit | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Learnt:
    """Train a method on a problem, in memory.

    method: a value (`tl.CTL()`, `tl.DPO()`) or a name of `tiltlm list`. feed, net, fit: what it learns from, what network
    is trained, and how; left out, the defaults for such a problem. steps, lr: the two settings of `fit` that one changes
    first. Raises ValueError, saying why, where the method is of no use for the problem.
    """
    method = method_called(method) if isinstance(method, str) else method
    cell = default_cell(method, problem.facts)
    cell = replace(cell, feed=feed or cell.feed, net=net or cell.net, fit=fit or cell.fit)
    said = {name: x for name, x in (("steps", steps), ("lr", lr)) if x is not None}
    cell = replace(cell, fit=replace(cell.fit, **said))  # type: ignore[arg-type]
    why = cell.why_not(problem.facts)
    if why is not None:
        raise ValueError(f"{type(method).__name__}: {why}")
    if cell.fit.evaluations:
        raise ValueError("in memory no checkpoint is kept to choose the best of: set fit.evaluations to 0")
    if isinstance(cell.feed, Feed) and cell.feed.source == "rounds":
        raise ValueError(
            "every round is a run on disk: `tiltlm run TASK/METHOD --feed.source rounds`, or a stage (star, irpo)"
        )
    if cell.fit.shard:
        raise ValueError("in memory every process keeps the whole model: set fit.shard to False")
    trained = method.trained()
    if trained.trains == "nothing":
        return Learnt(problem, method, cell.net, Learner(None, policy=problem.reference))
    called = f"{type(trained).__name__.lower()}-{trained.trains}"
    own = replace(problem, stream=problem.stream.child("learn", seed)) if seed else problem
    with torch.random.fork_rng(devices=[problem.device] if problem.device.type == "cuda" else []):
        found, metrics = _trained(own, trained, cell, called, progress)
    return Learnt(problem, method, cell.net, found, metrics)


def _trained(
    problem: Problem, method: Method, cell: Any, called: str, progress: bool
) -> tuple[Learner, list[dict[str, float]]]:
    """The loop of `train.Training`, without a folder."""
    problem, who = learner(problem, method, cell.net, problem.stream.child(called, "init"))
    with tempfile.TemporaryDirectory(prefix="tiltlm-judge-") as journal:
        stores = _stores(problem, method, cell.feed, called, Path(journal))
        course = course_of(problem, method, who, cell.feed, cell.fit, called, stores, _told(called, progress))
        return who, _steps(problem, method, who, course, called, progress)


def _told(called: str, progress: bool) -> Callable[[str], None]:
    return (lambda text: note(f"{called}: {text}")) if progress else (lambda text: None)


def _steps(
    problem: Problem, method: Method, who: Learner, course: Feeding, called: str, progress: bool
) -> list[dict[str, float]]:
    """Every step's metrics."""
    objective, pace, taken = method.objective(problem), course.fit.pace, Course()
    model, own = who.module.to(problem.device), problem.stream.child(called)
    engine, metrics, step = Engine(model, course.fit.optim), [], 0
    with progress_of(called) if progress else _silent() as on_step:
        while not pace.over(step, taken):
            model.eval()  # drawing and scoring happen without dropout
            batch = course.experience.batch(step)
            model.train()
            own.child("dropout", step, *ranks.others()).seed_everything()
            found = engine.update(objective, batch, pace.factor(step, taken), method.passes)
            if isinstance(course.experience, Keeps):
                found |= course.experience.numbers()
            pace.observe(step, found, taken)
            metrics.append(found)
            step += 1
            on_step(step, pace.steps, found)
    model.eval()
    model.requires_grad_(False)
    return metrics


class _silent:
    """No progress."""

    def __enter__(self) -> Any:
        return lambda step, limit, metrics: None

    def __exit__(self, *error: object) -> None:
        return None


def _stores(problem: Problem, method: Method, feed: Any, called: str, journal: Path) -> Stores:
    """Labelled draws of the reference, exact draws to train on: made when they are first asked for; a judge, what it buys
    and answers in the folder `journal`."""
    if isinstance(feed, TwistFeed):
        own = problem.stream.child("training")
        return Stores(exact=lambda: problem.exact_draws(problem.prompts["train"], ExactSettings().n, own))
    if feed.judge.kind != "none":
        return Stores(judge=judge_of(problem, feed.judge, problem.stream.child(called, "judge"), journal))
    if source_of(problem.facts, method, feed) != "stored":
        return Stores()
    made: dict[Split, Groups] = {}

    def groups(split: Split) -> Groups:
        if split not in made:
            n, prompts = feed.draws.n, problem.prompts[split]
            some = prompts.select(slice(0, feed.draws.prompts or None)) if split == "train" else prompts
            own = problem.stream.child("generate", split)
            drawn = of_reference(problem, feed.draw, some, n, own, feed.draws.batch_size)
            log_ref = drawn.log_q if feed.draw.exact else None
            made[split] = Groups(problem.target.scored(drawn.with_(log_ref=log_ref), 128), n)
        return made[split]

    return Stores(groups)
