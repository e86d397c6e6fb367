"""Measuring in memory: every method of a problem by one ruler, log Z found once; differences, and the page of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tiltlm.api.learning import SETTINGS, Learnt
from tiltlm.commands.models import load_decoder
from tiltlm.method import Learner, Method
from tiltlm.models.base import LanguageModel
from tiltlm.problem import Problem
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Measurement, Ruler
from tiltlm.ruler.notebook import Differences, Table
from tiltlm.samplers.smc import IMPORTANCE, smc_in_batches
from tiltlm.samples import Tokens
from tiltlm.stages.measure import RulerSettings, ruler_of

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
    if exact and (why := problem.facts.no_exact_draws()) is not None:
        raise ValueError(why)
    there = 100 if problem.facts.conditioned else len(problem.prompts["test"])
    count = min(prompts or there, there)
    n = n or max(1, 2000 // count)
    settings = RulerSettings(prompts=prompts, n=n, batch_size=batch_size, absolute=log_z != "none")
    ruler = ruler_of(problem, settings)
    ruler = _with_log_z(problem, ruler, log_z, log_z_draws or (10_000 if count == 1 else 1000))
    if exact and not problem.facts.conditioned:  # conditions bring exact draws of their own
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
    if isinstance(log_z, Tensor) and log_z.shape not in ((), (1,), (len(ruler.prompts),)):
        raise ValueError(f"log_z has the shape {list(log_z.shape)}, and {len(ruler.prompts)} prompts are measured")
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
