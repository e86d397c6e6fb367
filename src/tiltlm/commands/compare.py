"""`tiltlm compare A B`: two measurements, joined question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiltlm.commands.arguments import settings_from
from tiltlm.commands.compared import SHOWN, Comparison, footnote, incomparable
from tiltlm.commands.models import load_run
from tiltlm.commands.observed import Observed, of_file, of_runs, shared
from tiltlm.commands.process import prepare
from tiltlm.mistakes import nearest
from tiltlm.progress import note
from tiltlm.ruler.compare import Difference, holm, paired
from tiltlm.ruler.intervals import Interval, bootstrap_t, student
from tiltlm.ruler.mcnemar import McNemar
from tiltlm.ruler.measure import Measurement


@dataclass(frozen=True)
class Compare:
    """Compare two measurements on the questions that both have: exact McNemar where every answer is right or wrong, else
    paired differences with a bootstrap interval."""

    first: Annotated[Path, tyro.conf.Positional]
    """A finished run's folder; or a .jsonl or .csv file of rows with an `index` (or `indices`) and a `score` (or
    `scores`), several rows an index where there are several samples."""

    second: Annotated[Path, tyro.conf.Positional]
    """What it is compared with: a run where the first is a run, a file where it is a file."""

    metrics: tuple[str, ...] = ()
    """Compare these metrics alone (e.g. accuracy): fewer comparisons, sharper verdicts."""


def compare(args: list[str]) -> int:
    """Run the command."""
    settings = settings_from(args, Compare, "compare")
    prepare()
    found, other = _observed(settings.first, settings.second)
    one, two = shared(found)
    raw = [each for each in _differences(one, two) if each.metric not in other]
    kept = holm(_chosen(raw, settings.metrics))
    sizes = " and ".join(f"{len(each.questions):,}" for each in found)
    out = Console(width=165, highlight=False)
    print(f"first: {one.name}\nsecond: {two.name}\n{len(one.questions):,} {one.unit} shared (of {sizes})")
    out.print(_table(one.measurement, two.measurement, kept))
    for each in kept:
        if each.test == "exact McNemar":
            pair = [m.measurement.values[each.metric] for m in (one, two)]
            print(f"{_heading(each.metric)}: {McNemar.of(*pair)}")
    print(footnote([Comparison(one.name, two.name, each) for each in kept]))
    return 0


def _observed(first: Path, second: Path) -> tuple[list[Observed], set[str]]:
    """Both measurements, and the metrics that mean different things in them."""
    folders = [path.is_dir() for path in (first, second)]
    if all(folders):
        runs = [load_run(path) for path in (first, second)]
        found = of_runs(runs)
        other = incomparable(runs[0], runs[1])
        both = set(found[0].measurement.values) & set(found[1].measurement.values)
        if other & both:
            names = ", ".join(_heading(name) for name in sorted(other & both))
            note(f"their targets or references differ, so not compared: {names}")
        return found, other
    if any(folders):
        raise ValueError(f"{first} and {second}: a run is compared with a run, a file with a file")
    return [of_file(path) for path in (first, second)], set()


def _differences(one: Observed, two: Observed) -> list[Difference]:
    """first − second of every metric that both have on the same questions."""
    first, second = one.measurement.values, two.measurement.values
    alike = [name for name in first if name in second and len(first[name]) == len(second[name])]
    if not alike:
        raise ValueError(f"{one.name} and {two.name} share no metric: {', '.join(first)}; {', '.join(second)}")
    return paired(
        *(
            replace(each.measurement, values={name: each.measurement.values[name] for name in alike})
            for each in (one, two)
        )
    )


def _chosen(found: Sequence[Difference], metrics: Sequence[str]) -> list[Difference]:
    """The metrics that are asked for; else those of the standard table, or all where it has none."""
    known = [each.metric for each in found]
    if not known:
        raise ValueError("nothing can be compared: two shared questions or more are needed, and a metric of both")
    for name in metrics:
        if name not in known:
            raise ValueError(
                f"no metric {name!r} is in both.{nearest(name, known, 1)} There are {', '.join(known)}"
            )
    wanted = metrics or [name for name in known if name in SHOWN] or known
    return [each for each in found if each.metric in wanted]


def _table(first: Measurement, second: Measurement, found: Sequence[Difference]) -> Table:
    out = Table(title="first − second", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in (
        "metric", "n", "first", "second", "difference", "95% interval", "p (Holm)", "verdict", "would show"
    ):  # fmt: skip
        out.add_column(heading, justify="left" if heading in ("metric", "verdict") else "right", no_wrap=True)
    rows = [{row["metric"]: row for row in each.rows("", "", 0)} for each in (first, second)]
    for each in found:
        interval = _interval(each, first, second)
        out.add_row(
            escape(_heading(each.metric)),
            str(each.estimate.n),
            *(_value(own[each.metric]) for own in rows),
            f"{each.estimate.value:+.4f} ± {each.estimate.stderr:.4f}" + ("*" if each.doubt else ""),
            f"{interval.low:+.4f} to {interval.high:+.4f}",
            p_shown(each.p),
            each.verdict,
            f"{each.least:.4f}",
        )
    return out


def _interval(each: Difference, first: Measurement, second: Measurement) -> Interval:
    """Of a difference of averages: the paired bootstrap's, over questions. Of one of right and wrong answers, and of what
    has no spread: Student's t."""
    if each.test == "exact McNemar" or not each.estimate.stderr > 0:
        return student(each.estimate)
    apart = first.values[each.metric] - second.values[each.metric]
    return Interval(*bootstrap_t(apart.double()), "bootstrap-t")


def p_shown(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _value(row: Mapping[str, Any]) -> str:
    """A value with its 95% interval: of a rate Wilson's."""
    low, high = ("?" if row[end] is None else f"{row[end]:.4f}" for end in ("low", "high"))
    return f"{row['value']:.4f} [{low}, {high}]"


def _heading(metric: str) -> str:
    return SHOWN.get(metric, metric)
