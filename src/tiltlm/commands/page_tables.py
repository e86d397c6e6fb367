"""The report page's tables: the verdict, methods, what came on the way to them, and every difference in pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltlm.commands.compared import (
    SHOWN,
    Comparison,
    Contestant,
    comparisons,
    contestants,
    footnote,
    measured,
    task_name,
    what_differs,
)
from tiltlm.ruler.compare import Difference
from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.ruler.judge import doubt
from tiltlm.ruler.measure import Measurement
from tiltlm.ruler.table import cell, over_seeds, read_report
from tiltlm.run import Run

Row = dict[str, Any]


# ---- the verdict --------------------------------------------------------------------------------------------


def verdicts(runs: Sequence[Run[Any]]) -> list[Row]:
    """Who is ahead in J = E[r] − beta·KL(q‖ref), one table for each set of methods whose J means the same."""
    found = contestants(measured(runs))
    return [table for group in alike(found) if (table := verdict(group, found)) is not None]


def alike(found: Sequence[Contestant]) -> list[list[Contestant]]:
    """Contestants in groups whose J can be compared with that of the group's first."""
    groups: list[list[Contestant]] = []
    for each in found:
        for group in groups:
            if comparisons([group[0], each], ("objective",)):
                group.append(each)
                break
        else:
            groups.append([each])
    return groups


def verdict(group: Sequence[Contestant], found: Sequence[Contestant] = ()) -> Row | None:
    """Methods from the highest J down, each with its distance from the first; None for fewer than two. found: all that
    there are: those of the task that stand in no common comparison with the group are named."""
    if len(group) < 2:
        return None
    pairs = comparisons(group, ("objective",))
    ranked = sorted(group, key=lambda each: -objective(each).value)
    first = ranked[0]
    rows = []
    for each in ranked:
        behind = None if each is first else between(pairs, first.name, each.name)
        rows.append(
            {
                "method": each.name,
                "J": _shown(objective(each)),
                "behind by": _behind(behind),
                "verdict": "the highest" if each is first else said(behind),
            }
        )
    columns = [{"key": name, "label": name, "numeric": name in ("J", "behind by")} for name in rows[0]]
    about = "J = E[r] − beta·KL(q‖ref), which pi* alone maximises; every pair was compared, not only those with the first. "
    tasks = {_task(each) for each in group}
    apart = [each.name for each in found if each not in group and _task(each) in tasks]
    if apart:
        about += f"Not compared with these (other prompts, seeds, reference or target): {'; '.join(apart)}. "
    return {
        "title": headline(first.name, rows[1:], among=" of this table" if apart else ""),
        "about": about + footnote(pairs),
        "columns": columns,
        "rows": rows,
    }


def _task(each: Contestant) -> str:
    return task_name(next(iter(each.runs.values())).recipe)


def headline(first: str, others: Sequence[Row], among: str = "") -> str:
    """The verdict in one sentence."""
    behind = [row["method"] for row in others if row["verdict"].startswith("shown")]
    if len(behind) == len(others):
        return f"{first} is ahead in J, shown against every other method{among}"
    if not behind:
        return f"No method{among} is shown to be ahead in J; the highest is {first}"
    rest = ", ".join(row["method"] for row in others if row["method"] not in behind)
    return f"{first} has the highest J, shown against {', '.join(behind)}; not told apart from {rest}"


def objective(each: Contestant) -> Estimate:
    """A contestant's J: over prompts, or over seeds where there are several."""
    found = [
        mean(Measurement.load(run.folder / "measurement.safetensors").values["objective"])
        for run in each.runs.values()
    ]
    return found[0] if len(found) == 1 else mean_of(found)


def mean_of(found: Sequence[Estimate]) -> Estimate:
    """The mean of several seeds' estimates, its error from their spread."""
    import torch

    return mean(torch.tensor([each.value for each in found], dtype=torch.float64))


def between(pairs: Iterable[Comparison], first: str, second: str) -> Difference | None:
    """first − second among `pairs`, in whichever order it stands there; p is the same."""
    for each in pairs:
        if {each.first, each.second} == {first, second}:
            return each.difference
    return None


def _behind(found: Difference | None) -> Row | str:
    """The size of a difference from the first."""
    return (
        "–"
        if found is None
        else _shown(Estimate(abs(found.estimate.value), found.estimate.stderr, found.estimate.n))
    )


def said(found: Difference | None) -> str:
    """What a line of the verdict says, of a method that is not the highest; None: the two were never compared."""
    if found is None:
        return "not compared with the highest: no seed in common"
    if found.identical:
        return "the same as the highest"
    if found.verdict == "no difference shown":
        return f"not shown to be behind (would show {found.least:.3f})"
    return f"shown to be behind (p {found.p:.3f})" if found.p >= 0.001 else "shown to be behind (p < 0.001)"


def warnings(runs: Sequence[Run[Any]]) -> list[str]:
    """What stands against believing the results: reward models that know no more than length or a coin."""
    found = []
    for run in runs:
        report = run.folder / "report.json"
        text = doubt(read_report(report)) if report.is_file() else None
        if text is not None:
            found.append(f"{run.recipe.name}, seed {run.recipe.seed}: {text}.")
    return found


# ---- results ------------------------------------------------------------------------------------------------


def result_tables(runs: Sequence[Run[Any]]) -> list[Row]:
    """Per task the methods (over seeds, if there are several; then every run's), and apart from them what came before."""
    covered: set[Path] = {kept.folder for run in runs if run.recipe.gathers for kept in run.inputs.values()}
    methods: dict[str, list[Run[Any]]] = {}
    stages: dict[str, list[Run[Any]]] = {}
    for run in runs:
        if (run.folder / "report.json").is_file() and run.folder not in covered:
            is_method = run.recipe.gathers or (run.folder / "measurement.safetensors").is_file()
            (methods if is_method else stages).setdefault(task_name(run.recipe), []).append(run)
    tables = [table for task, members in methods.items() for table in method_tables(task, members)]
    return tables + [stages_table(task, members) for task, members in stages.items()]


def method_tables(task: str, members: Sequence[Run[Any]]) -> list[Row]:
    """Methods over seeds, if there are several, then every run's rows."""
    labels = what_differs([run.recipe for run in members])
    rows = [
        {**row, "run": run.key, "settings": label}
        for run, label in zip(members, labels, strict=True)
        for row in rows_of(run)
    ]
    tables, seeds = [], {row["seed"] for row in rows}
    named = [{**row, "method": f"{row['method']}  {row['settings']}".strip()} for row in rows]
    if len({(row["method"], row["seed"]) for row in named}) > len({row["method"] for row in named}):
        once = list({(row["method"], row["metric"], row["seed"]): row for row in named}.values())
        about = f"{len(seeds)} seeds: mean ± standard error over seeds; in brackets Student's 95% interval"
        tables.append(wide(over_seeds(once), f"{task}: over seeds", about, interval=True))
    about = "value ± one standard error; an interval where log Z is known less well than the distance"
    by = ("method", "seed", "run", *(("settings",) if any(labels) else ()))
    return [*tables, wide(rows, f"{task}: every run", about, by=by)]


def stages_table(task: str, members: Sequence[Run[Any]]) -> Row:
    """What is no method (data, reward models, labels, log Z, bounds): a line for each number."""
    rows = [_line(run, row) for run in members for row in rows_of(run)]
    names = ("stage", "what", "metric", "value", "unit", "seed", "run")
    columns = [{"key": name, "label": name, "numeric": name == "value"} for name in names]
    head = {"title": f"{task}: on the way", "about": "Stages that are no methods, a line for each number"}
    return {**head, "columns": columns, "rows": rows, "folded": True, "counts": "number"}


def _line(run: Run[Any], row: Row) -> Row:
    value = {"v": number(row["value"]), "t": cell(row)}
    line = {"stage": run.recipe.stage, "what": row["method"], "metric": SHOWN.get(row["metric"], row["metric"])}
    return {**line, "value": value, "unit": row.get("unit", ""), "seed": row["seed"], "run": run.key}


def rows_of(run: Run[Any]) -> list[Row]:
    """A run's report."""
    found: list[Row] = read_report(run.folder / "report.json")
    return found


def wide(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    about: str,
    by: tuple[str, ...] = ("method",),
    interval: bool = False,
) -> Row:
    """Report rows (one a metric) as a table with a column per metric: the standard ones first, in their order."""
    present = dict.fromkeys(row["metric"] for row in rows)
    metrics = [name for name in SHOWN if name in present] + [name for name in present if name not in SHOWN]
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        line = lines.setdefault(tuple(row[name] for name in by), {name: row[name] for name in by})
        text = cell(row)
        if interval and "gap" not in row and row["n"] > 1 and row["stderr"]:
            text += f"  [{row['low']:.3f}, {row['high']:.3f}]"
        line[row["metric"]] = {"v": number(row["value"]), "t": text}
    columns: list[Row] = [{"key": name, "label": name} for name in by]
    columns += [{"key": name, "label": SHOWN.get(name, name), "numeric": True} for name in metrics]
    return {"title": title, "about": about, "columns": columns, "rows": list(lines.values())}


def differences_table(runs: Sequence[Run[Any]]) -> Row:
    """Every pair of methods on the same prompts, metric by metric, with verdicts adjusted for all of them together."""
    found = comparisons(contestants(measured(runs)))
    rows = [
        {
            "first": each.first,
            "second": each.second,
            "metric": SHOWN[each.difference.metric],
            "difference": _shown(each.difference.estimate, "+", "*" if each.difference.doubt else ""),
            "p": {"v": number(each.difference.p), "t": f"{each.difference.p:.3f}"},
            "verdict": each.difference.verdict,
            "would show": {"v": number(each.difference.least), "t": f"{each.difference.least:.4f}"},
        }
        for each in found
    ]
    names = ("first", "second", "metric", "difference", "p", "verdict", "would show")
    columns = [
        {"key": name, "label": name, "numeric": name in ("difference", "p", "would show")} for name in names
    ]
    about = "first − second, paired prompt by prompt (of one prompt: draw by draw); the common log Z cancels. "
    return {
        "title": "Differences in pairs", "about": about + footnote(found), "columns": columns, "rows": rows, "folded": True,
        "counts": "difference",
    }  # fmt: skip


def _shown(e: Estimate, sign: str = "", star: str = "") -> Row:
    return {"v": number(e.value), "t": f"{e.value:{sign}.4f} ± {e.stderr:.4f}{star}"}


def number(value: float) -> float | None:
    """A number that JSON has; None for those it has not."""
    return value if math.isfinite(value) else None
