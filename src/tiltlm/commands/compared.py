"""Finished runs as contestants: who can be compared with whom, in which metrics, and all their differences together.

Runs of one recipe that differ in nothing but the seed (files that settings name held the same for all of them) are one
contestant, trained several times. Two contestants are compared on the seeds they share: prompt by prompt where that is one
seed, seed by seed where it is several.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiltlm.jsonl import read_json
from tiltlm.ruler.compare import Difference, holm, over_seeds, paired
from tiltlm.ruler.measure import Measurement
from tiltlm.ruler.table import HEADINGS, read_report
from tiltlm.run import Recipe, Run
from tiltlm.settings import hashed

SHOWN = HEADINGS | {"objective": "J", "win_rate": "wins"}
"""Metrics that are compared, and what stands over them."""

ABSOLUTE = {"kl_to_target", "kl_to_target_at_least", "kl_to_target_at_most", "kl_from_target", "objective_gap"}


@dataclass(frozen=True)
class Contestant:
    """A method with its settings: its finished runs by seed, and what to call it."""

    name: str
    runs: dict[int, Run[Any]]


@dataclass(frozen=True)
class Comparison:
    """first − second of one metric."""

    first: str
    second: str
    difference: Difference


def measured(runs: Iterable[Run[Any]]) -> list[Run[Any]]:
    """Those of the runs, and of the methods that a comparison among them gathers, that hold a measurement; each once."""
    found: dict[Any, Run[Any]] = {}
    for run in runs:
        own = run.inputs.values() if run.recipe.gathers else [run]
        found |= {each.folder: each for each in own if (each.folder / "measurement.safetensors").is_file()}
    return list(found.values())


def contestants(runs: Sequence[Run[Any]], called: Mapping[Path, str] | None = None) -> list[Contestant]:
    """Measured runs by method and settings, in the order of their first appearance. called: names given by the user."""
    groups: dict[str, dict[int, Run[Any]]] = {}
    for run in runs:
        alike = json.dumps([run.recipe.name, _unseeded(run.recipe), files_of(run)], default=str)
        groups.setdefault(alike, {})[run.recipe.seed] = run
    firsts = [next(iter(members.values())) for members in groups.values()]
    several = len({task_name(run.recipe) for run in firsts}) > 1
    plain = [f"{task_name(run.recipe)}/{name_of(run)}" if several else name_of(run) for run in firsts]
    labels = what_differs([run.recipe for run in firsts])
    named = [
        (called or {}).get(run.folder) or f"{name} {label}".strip()
        for run, name, label in zip(firsts, plain, labels, strict=True)
    ]
    names = [
        f"{name} [{run.key}]" if named.count(name) > 1 else name for name, run in zip(named, firsts, strict=True)
    ]
    return [Contestant(name, members) for name, members in zip(names, groups.values(), strict=True)]


def _unseeded(recipe: Recipe) -> Any:
    """What the result depends on beside the seed."""
    return {name: value for name, value in hashed(recipe.counted()).items() if name != "seed"}


def task_name(recipe: Recipe) -> str:
    """The task's name, `animals`."""
    return recipe.name.partition("/")[0]


def name_of(run: Run[Any]) -> str:
    """What a run's report calls what it measured first, with the seed left to the caller."""
    report = run.folder / "report.json"
    rows = read_report(report) if report.is_file() else []
    return str(rows[0]["method"]) if rows else run.recipe.stage


def what_differs(recipes: Sequence[Recipe]) -> list[str]:
    """Of runs of one task: the settings that count, beside the seed, in which those of one stage differ."""
    flat = [(recipe.name, dict(leaves(asdict(recipe.counted())))) for recipe in recipes]  # type: ignore[call-overload]
    counts = {name for recipe in recipes for name, _ in leaves(hashed(recipe.counted()))} - {"seed"}
    labels = []
    for stage, own in flat:
        alike = [other for name, other in flat if name == stage]
        names = [name for name in own if name in counts and len({repr(other.get(name)) for other in alike}) > 1]
        labels.append(", ".join(f"{name}={own[name]!r}" for name in names))
    return labels


def leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested settings as pairs (task.beta, 0.1)."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def comparisons(
    found: Sequence[Contestant], metrics: Collection[str] = tuple(SHOWN), control: str | None = None
) -> list[Comparison]:
    """Every pair's differences in `metrics` (or those from `control` alone), p adjusted for all of them together.

    Raises ValueError where no contestant has that name.
    """
    if control is not None and control not in [each.name for each in found]:
        raise ValueError(f"no run here is called {control!r}; there are {', '.join(each.name for each in found)}")
    pairs = [(a, b) for a, b in itertools.combinations(found, 2) if control in (None, a.name, b.name)]
    if control is not None:  # the control is what is subtracted
        pairs = [(b, a) if a.name == control else (a, b) for a, b in pairs]
    raw = [Comparison(a.name, b.name, each) for a, b in pairs for each in between(a, b) if each.metric in metrics]
    adjusted = holm([each.difference for each in raw])
    return [Comparison(each.first, each.second, d) for each, d in zip(raw, adjusted, strict=True)]


def between(first: Contestant, second: Contestant) -> list[Difference]:
    """first − second in every metric that means the same in both; empty where they share no seed, or no prompts."""
    by_seed = [comparable(first.runs[seed], second.runs[seed]) for seed in first.runs if seed in second.runs]
    kept = [each for each in by_seed if each is not None]
    if len(kept) < 2:
        return kept[0] if kept else []
    named: dict[str, list[Difference]] = {}
    for each in itertools.chain.from_iterable(kept):
        named.setdefault(each.metric, []).append(each)
    return [over_seeds(each) for each in named.values() if len(each) == len(kept)]


def comparable(first: Run[Any], second: Run[Any]) -> list[Difference] | None:
    """first − second for the standard metrics that mean the same in both; None if their prompts differ."""
    if not same_prompts(first, second):
        return None
    a, b = (Measurement.load(run.folder / "measurement.safetensors") for run in (first, second))
    other = incomparable(first, second)
    return [row for row in paired(a, b) if row.metric in SHOWN and row.metric not in other]


def incomparable(first: Run[Any], second: Run[Any]) -> set[str]:
    """Metrics that mean different things in the two runs: their targets or references differ, or their log Z was found in
    another way."""
    found = set() if _log_z(first) == _log_z(second) else set(ABSOLUTE)
    if task_of(first.recipe) != task_of(second.recipe):  # J has another beta in it, or another reward
        found |= {"objective", *ABSOLUTE}
    judges = [_key(run, "reward-model") or _key(run, "classifier") for run in (first, second)]
    rewards = [task_of(run.recipe, lambda task: task.at(1.0)) for run in (first, second)]
    if rewards[0] != rewards[1] or judges[0] != judges[1]:  # another zero and another scale
        found |= {"reward", "objective", "win_rate", *ABSOLUTE}
    references = [task_of(run.recipe, lambda task: task.untilted()) for run in (first, second)]
    if references[0] != references[1] or _key(first, "base") != _key(second, "base"):
        found |= {"kl_to_reference", *ABSOLUTE}
    return found


def task_of(recipe: Recipe, as_it: Callable[[Any], Any] = lambda task: task) -> Any:
    """What a result depends on of a recipe's task, whatever it is called; as_it: at another temperature, say."""
    task = getattr(recipe, "task", None)
    found = hashed(None if task is None else as_it(task))
    return {name: value for name, value in found.items() if name != "name"} if isinstance(found, dict) else found


def _log_z(run: Run[Any]) -> Any:
    return hashed(getattr(run.recipe.counted(), "log_z", None))


def _key(run: Run[Any], name: str) -> str:
    """The key of what was trained for a run; empty where it was not."""
    return run.inputs[name].key if name in run.inputs else ""


def same_prompts(first: Run[Any], second: Run[Any]) -> bool:
    """Whether two runs drew their test prompts alike: the same task but for its target, the same seed and numbers of draws,
    and no file (data, a reward, a model) that both name held something else for one of them."""

    def prompts(run: Run[Any]) -> tuple[Any, ...]:
        ruler = getattr(run.recipe, "ruler", None)
        drawn = None if ruler is None else (most_prompts(run.recipe), ruler.n, ruler.exact)
        return task_of(run.recipe, lambda task: task.untilted()), run.recipe.seed, drawn, _exact(run)

    one, other = files_of(first), files_of(second)
    changed = any(one[name] != other[name] for name in one.keys() & other.keys())
    return prompts(first) == prompts(second) and not changed


def most_prompts(recipe: Any) -> float:
    """How many test prompts are measured at most: those of the ruler, or of them those whose log Z is known."""
    most = recipe.ruler.prompts or math.inf
    by_prompt = getattr(recipe, "absolute", False) and recipe.log_z.by != "enumeration"
    return min(most, recipe.log_z.prompts) if by_prompt and recipe.task.facts().measured != "one" else most


def _exact(run: Run[Any]) -> Any:
    return hashed(getattr(run.recipe.counted(), "exact", None))


def files_of(run: Run[Any]) -> dict[str, str]:
    """What the files that a run's settings name held when it was made, as digests; empty where nothing says so."""
    config = run.folder / "config.json"
    found: dict[str, str] = read_json(config).get("files", {}) if config.is_file() else {}
    return found


def footnote(found: Sequence[Comparison]) -> str:
    """What the verdicts rest on, in words."""
    if not found:
        return ""
    seeds = {each.difference.seeds for each in found}
    tested = sum(not each.difference.identical for each in found)
    tests = dict.fromkeys(each.difference.test for each in found)
    text = (
        f"{' and '.join(tests)}; p adjusted by Holm for the {tested} differences shown: any false verdict among them has "
        "chance 5% at most. 'would show': the true difference that would be shown four times in five."
    )
    if 1 in seeds:
        text += (
            " Trained once: the seeds of training are not in these errors, which are those of the prompts (or draws); they "
            "compare the models at hand, not the methods."
        )
    doubts = dict.fromkeys(each.difference.doubt for each in found if each.difference.doubt)
    text += f" * Student's t may not hold here: {'; '.join(doubts)}." if doubts else ""
    return text + (f" Over {max(seeds)} seeds of training, paired seed by seed." if max(seeds) > 1 else "")
