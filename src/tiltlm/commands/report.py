"""`tiltlm report RUN…`: one self-contained HTML page of tables, pictures and samples; it needs no network.

The page is a template (`report.html`) and one JSON value. Texts go into the page as text, never as markup: what a
model wrote cannot run.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import tyro

from tiltlm import __version__
from tiltlm.commands.compared import SHOWN, comparisons, contestants, footnote, measured, what_differs
from tiltlm.commands.models import load_run
from tiltlm.commands.process import prepare
from tiltlm.jsonl import read_rows
from tiltlm.progress import note
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.table import cell, over_seeds
from tiltlm.run import Run

Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """Write finished runs' tables, pictures and samples into one HTML page that works offline."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders, as printed by `tiltlm run`. A run that compares methods brings theirs along."""

    out: Path = Path("report.html")
    """The page to write."""

    samples: int = 200
    """Samples of each run, at most."""

    title: str = "tiltlm report"


def report(args: list[str]) -> int:
    """Run the command."""
    settings = tyro.cli(Report, prog="tiltlm report", args=args)
    prepare()
    if not settings.runs:
        raise ValueError("name at least one run folder (`tiltlm run` prints it at its end)")
    if settings.samples < 0:
        raise ValueError(f"--samples must be 0 or more; got {settings.samples}")
    unfinished = [
        folder
        for folder in settings.runs
        if (folder / "config.json").is_file() and not (folder / "DONE").is_file()
    ]
    for folder in unfinished:
        note(f"{folder} is not finished, and left out")
    runs = with_inputs([load_run(folder) for folder in settings.runs if folder not in unfinished])
    if not runs:
        raise ValueError("none of these runs is finished: run their recipes again to complete them")
    samples = samples_table(runs, settings.samples)
    page = {
        "title": settings.title,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "tables": [table for table in (*result_tables(runs), differences_table(runs)) if table["rows"]],
        "pictures": [picture for run in runs for picture in pictures(run)],
        "samples": samples,
        "runs": [{**about(run), "name": name} for run, name in zip(runs, names_of(runs).values(), strict=True)],
    }
    settings.out.write_text(render(page), encoding="utf-8")
    size = settings.out.stat().st_size / 1e6
    note(f"{len(runs)} runs, {len(samples['rows'])} samples, {size:.1f} MB, opens in any browser")
    print(settings.out)
    return 0


def render(page: Mapping[str, Any]) -> str:
    """The template with `page` in it: JSON in which no character can end the script element it stands in."""
    text = json.dumps(page, ensure_ascii=False, allow_nan=False)
    for bad in "<>&\u2028\u2029":
        text = text.replace(bad, f"\\u{ord(bad):04x}")
    template = files("tiltlm.commands").joinpath("report.html").read_text(encoding="utf-8")
    return template.replace("__PAGE__", text)


def with_inputs(runs: Iterable[Run[Any]]) -> list[Run[Any]]:
    """The runs and what they were made of, each once, the named ones first."""
    found: dict[Path, Run[Any]] = {}
    queue = list(runs)
    while queue:
        run = queue.pop(0)
        if run.folder not in found and run.done:
            found[run.folder] = run
            queue += run.inputs.values()
    return list(found.values())


# ---- tables -------------------------------------------------------------------------------------------------


def result_tables(runs: Sequence[Run[Any]]) -> list[Row]:
    """A table per family: over seeds, if there are several, then every run's rows."""
    covered: set[Path] = {kept.folder for run in runs if run.recipe.gathers for kept in run.inputs.values()}
    reports: dict[str, list[Run[Any]]] = {}
    for run in runs:
        if (run.folder / "report.json").is_file() and run.folder not in covered:
            reports.setdefault(run.recipe.family, []).append(run)
    tables = []
    for family, members in reports.items():
        labels = what_differs([run.recipe for run in members])
        rows = [
            {**row, "run": run.key, "settings": label}
            for run, label in zip(members, labels, strict=True)
            for row in json.loads((run.folder / "report.json").read_text())
        ]
        seeds = {row["seed"] for row in rows}
        if len(seeds) > 1:
            named = [{**row, "method": f"{row['method']}  {row['settings']}".strip()} for row in rows]
            once = list({(row["method"], row["metric"], row["seed"]): row for row in named}.values())
            about = f"{len(seeds)} seeds: mean ± standard error over seeds; in brackets Student's 95% interval"
            tables.append(wide(over_seeds(once), f"{family}: over seeds", about, interval=True))
        about = "value ± one standard error; an interval where log Z is known less well than the distance"
        by = ("method", "seed", "run", *(("settings",) if any(labels) else ()))
        tables.append(wide(rows, f"{family}: every run", about, by=by))
    return tables


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
            "difference": _shown(each.difference.estimate.value, each.difference.estimate.stderr),
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
    }  # fmt: skip


def _shown(value: float, stderr: float) -> Row:
    return {"v": number(value), "t": f"{value:+.4f} ± {stderr:.4f}"}


def number(value: float) -> float | None:
    """A number that JSON has; None for those it has not."""
    return value if math.isfinite(value) else None


# ---- pictures, samples, runs --------------------------------------------------------------------------------


def pictures(run: Run[Any]) -> list[Row]:
    """A run's PNG files, inlined."""
    found = []
    for path in sorted(run.folder.glob("*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        found.append({"title": f"{run.recipe.name}: {path.stem}", "src": f"data:image/png;base64,{data}"})
    return found


def samples_table(runs: Sequence[Run[Any]], most: int) -> Row:
    """All runs' samples.jsonl in one table; numbers stay numbers, everything else becomes text."""
    rows: list[Row] = []
    names, numeric = dict.fromkeys(("run", "prompt", "completion")), set()
    labels = names_of(runs)
    for run in runs:
        path = run.folder / "samples.jsonl"
        if not path.is_file():
            continue
        for line in itertools.islice(read_rows(path, ()), most):
            row: Row = {"run": labels[run.folder]}
            for name, value in line.items():
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                numeric |= {name} if is_number else set()
                row[name] = number(value) if is_number else text_of(value)
            names |= dict.fromkeys(row)
            rows.append(row)
    columns = [{"key": name, "label": name, "numeric": name in numeric} for name in names]
    return {"title": "Samples", "columns": columns, "rows": rows}


def names_of(runs: Sequence[Run[Any]]) -> dict[Path, str]:
    """What to call every run: recipe and seed, and its key where that is not enough."""
    plain = [f"{run.recipe.name} · seed {run.recipe.seed}" for run in runs]
    return {
        run.folder: name if plain.count(name) == 1 else f"{name} [{run.key}]"
        for run, name in zip(runs, plain, strict=True)
    }


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def about(run: Run[Any]) -> Row:
    """Where a run's numbers come from."""
    provenance = json.loads((run.folder / "provenance.json").read_text())
    settings = json.loads((run.folder / "config.json").read_text())["settings"]
    facts = {
        "folder": str(run.folder),
        "command": provenance.get("command", ""),
        "commit": provenance.get("commit") or "",
        "seconds": str(provenance.get("seconds", "")),
        "written": provenance.get("written", ""),
        "versions": ", ".join(f"{name} {v}" for name, v in provenance.get("versions", {}).items()),
    }
    log_z = run.folder / "log_z.json"
    if log_z.is_file():
        facts["log Z"] = str(LogZ.from_json(json.loads(log_z.read_text())))
    return {
        "name": run.recipe.name,
        "seed": run.recipe.seed,
        "facts": facts,
        "settings": json.dumps(settings, indent=1),
    }
