"""The library from Python: learn, measure, compare, report. The command line does the same on disk.

>>> import tiltlm as tl
>>> task = tl.Problem.of("gpt2", reward=lambda prompts, completions: [float("dog" in y) for y in completions],
...                      prompts=["I bought this"], beta=0.5, max_new_tokens=24)        # doctest: +SKIP
>>> guided = tl.learn(task, tl.CTL(), steps=200)                                       # doctest: +SKIP
>>> tl.measure(task, {"reference": task.reference, "guided": guided, "best of 8": tl.BestOf(8)})    # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tiltlm.commands.models import load_decoder
from tiltlm.commands.options import from_json
from tiltlm.decoders.sampler import Sampler
from tiltlm.engine import Engine
from tiltlm.feeds import AnyFeed, Stores, course_of, source_of
from tiltlm.fit import Fit
from tiltlm.groups import Groups
from tiltlm.jsonl import read_json, write_whole
from tiltlm.method import Learner, Method
from tiltlm.methods import method as method_called
from tiltlm.methods import names
from tiltlm.models.base import LanguageModel, without_end
from tiltlm.nets import Net, learner, loaded
from tiltlm.problem import Problem, Split, tokens_of
from tiltlm.progress import steps as progress_of
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.ruler.notebook import Differences, Table
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samplers.smc import IMPORTANCE, smc_in_batches
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages.cells import default_cell
from tiltlm.stages.measure import RulerSettings, ruler_of
from tiltlm.train import Course

__all__ = ["Differences", "Learnt", "Table", "compare", "learn", "measure", "report"]

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


# ---- learning -------------------------------------------------------------------------------------------------


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
    course = course_of(problem, method, who, cell.feed, cell.fit, called, _stores(problem, method, cell.feed))
    objective, pace, taken = method.objective(problem), course.fit.pace, Course()
    model, own = who.module.to(problem.device), problem.stream.child(called)
    engine, metrics, step = Engine(model, course.fit.optim), [], 0
    with progress_of(called) if progress else _silent() as on_step:
        while not pace.over(step, taken):
            model.eval()  # drawing and scoring happen without dropout
            batch = course.experience.batch(step)
            model.train()
            own.child("dropout", step).seed_everything()
            found = engine.update(objective, batch, pace.factor(step, taken), getattr(method, "passes", 1))
            pace.observe(step, found, taken)
            metrics.append(found)
            step += 1
            on_step(step, pace.steps, found)
    model.eval()
    model.requires_grad_(False)
    return who, metrics


class _silent:
    """No progress."""

    def __enter__(self) -> Any:
        return lambda step, limit, metrics: None

    def __exit__(self, *error: object) -> None:
        return None


def _stores(problem: Problem, method: Method, feed: Any) -> Stores:
    """Labelled draws of the reference, made when they are first asked for."""
    if source_of(problem.facts, method.fed, feed) != "stored":
        return Stores()
    made: dict[Split, Groups] = {}

    def groups(split: Split) -> Groups:
        if split not in made:
            n, prompts = feed.draws.n, problem.prompts[split]
            some = prompts.select(slice(0, feed.draws.prompts or None)) if split == "train" else prompts
            drawn = draw_in_batches(
                problem.reference, some, n=n, max_new_tokens=problem.width, stream=problem.stream.child("generate", split),
                batch_size=feed.draws.batch_size,
            )  # fmt: skip
            made[split] = Groups(problem.target.scored(drawn.with_(log_ref=drawn.log_q), 128), n)
        return made[split]

    return Stores(groups)


# ---- measuring ------------------------------------------------------------------------------------------------

Measurable = Learnt | LanguageModel | Method | str | Path
"""What `measure` measures; str and Path: a folder of a model, of `Learnt.save` or of a run, or a hub name."""


def measure(
    problem: Problem,
    methods: Mapping[str, Measurable] | Measurable,
    *,
    n: int | None = None,
    log_z: Literal["auto", "none"] | LogZ | Tensor = "auto",
    log_z_draws: int | None = None,
    exact: int = 0,
    prompts: int = 0,
    batch_size: int = 500,
) -> Table:
    """Every method against the problem's target by one ruler: the same test prompts, as many draws, one log Z.

    n: draws of each test prompt (default 2000 of a single one, else as many as make 2000 in all). log_z: "auto": computed
    where the problem can, else estimated once from `log_z_draws` draws of the reference (default 10,000 of a single
    prompt, 1,000 of each of several); "none": no absolute distances; or one that is known. exact: so many exact draws of
    pi* for each prompt, for KL(pi*‖q), where the reward has a bound. prompts: test prompts at most (0: all).
    """
    several = methods if isinstance(methods, Mapping) else {_plain_name(methods): methods}
    if not several:
        raise ValueError("name at least one method to measure, like {'reference': task.reference}")
    ready = {name: _ready(problem, each) for name, each in several.items()}  # refused before any work
    count = min(prompts or len(problem.prompts["test"]), len(problem.prompts["test"]))
    n = n or max(1, 2000 // count)
    settings = RulerSettings(prompts=prompts, n=n, batch_size=batch_size, absolute=log_z != "none")
    ruler = ruler_of(problem, settings)
    ruler = _with_log_z(problem, ruler, log_z, log_z_draws or (10_000 if count == 1 else 1000))
    if exact and problem.facts.no_exact_draws() is None:
        own = problem.stream.child("exact")
        ruler = replace(ruler, exact=problem.exact_draws(ruler.prompts, exact, own, pilot=len(ruler.prompts) == 1))
    found = {
        name: each.method.bound(problem.beta).measured(problem, each.learner, ruler)
        for name, each in ready.items()
    }
    measured = {name: each[0] for name, each in found.items()}
    return Table(measured, {name: each[1] for name, each in found.items()}, problem.beta, _said(ruler.log_z))


def _with_log_z(problem: Problem, ruler: Ruler, log_z: Any, draws: int) -> Ruler:
    """`ruler` with what is known of log Z."""
    if isinstance(log_z, (LogZ, Tensor)):
        return replace(ruler, log_z=log_z)
    if isinstance(log_z, str) and log_z not in ("auto", "none"):
        raise ValueError(f"log_z is 'auto', 'none', a LogZ or a tensor of one number a prompt; got {log_z!r}")
    if log_z == "none" or ruler.log_z is not None:
        return ruler
    if problem.solve is not None:
        return replace(ruler, log_z=problem.solve(ruler.prompts).log_z)
    return replace(ruler, log_z=estimated_log_z(problem, ruler.prompts, draws))


def estimated_log_z(problem: Problem, prompts: Tokens, draws: int) -> LogZ | None:
    """log Z of every prompt from `draws` draws of the reference each; None where every prompt has a condition that the
    reference does not see, for then its draws say next to nothing."""
    if problem.facts.conditioned:
        return None
    each = [
        _log_weights(problem, prompts.select(slice(k, k + 1)), draws, problem.stream.child("log-z", k))
        for k in range(len(prompts))
    ]
    if len(each) == 1:
        most = problem.facts.r_max
        return LogZ.of_importance(each[0], "draws of the reference", None if most is None else most / problem.beta)
    return LogZ.of_runs(torch.stack(each), f"{draws} draws of the reference a prompt")


def _log_weights(problem: Problem, prompt: Tokens, draws: int, own: Any) -> Tensor:
    """log w = r/beta of draws of the reference, [draws]."""
    parts = []
    for k in range(0, draws, 2000):
        settings = replace(IMPORTANCE, particles=min(2000, draws - k))
        found = smc_in_batches(
            problem.target,
            None,
            prompt,
            settings,
            max_new_tokens=problem.width,
            stream=own.child(k),
            batch_size=2000,
        )
        assert found.samples.log_w is not None
        parts.append(found.samples.log_w.cpu())
    return torch.cat(parts)


def _said(log_z: LogZ | Tensor | None) -> str:
    """What stands under a table about log Z."""
    if isinstance(log_z, Tensor):
        return f"log Z = {float(log_z.double().mean()):.4f} nats (computed)"
    return "" if log_z is None else str(log_z)


@dataclass(frozen=True)
class _Ready:
    method: Method
    learner: Learner


@dataclass(frozen=True)
class _Drawn(Method):
    """A ready language model."""


def _ready(problem: Problem, what: Measurable) -> _Ready:
    """What is to be measured as a method and what it has learnt. Raises ValueError for what cannot be measured."""
    if isinstance(what, Learnt):
        return _Ready(what.method, what.learner)
    if isinstance(what, LanguageModel):
        if what.vocab_size != problem.reference.vocab_size:
            both = f"{what.vocab_size} tokens, the reference {problem.reference.vocab_size}"
            raise ValueError(f"the model knows {both}: they are not of one family, and no distance joins them")
        return _Ready(_Drawn(), Learner(None, policy=what))
    if isinstance(what, Method):
        why = what.why_not(problem.facts)
        if why is None and what.trained().trains != "nothing":
            why = "it has to learn first: pass what tl.learn(problem, method) returns"
        if why is not None:
            raise ValueError(f"{type(what).__name__}: {why}")
        return _Ready(what, Learner(None, policy=problem.reference))
    if not isinstance(what, (str, Path)):
        raise ValueError(
            f"a Learnt, a language model, a method or a folder is measured; got {type(what).__name__}"
        )
    if (Path(what) / SETTINGS).is_file():
        return _ready(problem, Learnt.load(problem, what))
    if (Path(what) / "provenance.json").is_file():
        return _ready(problem, load_decoder(str(what), "cpu", "float32").model)
    return _ready(problem, problem.loaded(what))


def _plain_name(what: Measurable) -> str:
    if isinstance(what, (str, Path)):
        return str(what)
    return type(what.method if isinstance(what, Learnt) else what).__name__


# ---- comparing and reporting ----------------------------------------------------------------------------------


def compare(
    found: Table | Mapping[str, Measurement], *, control: str | None = None, metrics: Sequence[str] | None = None
) -> Differences:
    """Every pair's differences, prompt by prompt (of one prompt: draw by draw), p adjusted by Holm for all together.

    control: the one method that the others are compared with. metrics: those compared (default: what the table shows).
    """
    return Differences.of(found.measured if isinstance(found, Table) else found, control, metrics)


def report(*runs: str | Path, out: str | Path = "report.html", title: str = "tiltlm report") -> Path:
    """Write finished runs' tables, pictures and samples into one HTML page that works offline; returns its path."""
    from tiltlm.commands.report import report as command

    command([*map(str, runs), "--out", str(out), "--title", title])
    return Path(out)
