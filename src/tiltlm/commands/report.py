"""`tiltlm report RUN…`: one self-contained HTML page of tables, pictures and samples; it needs no network.

The page is a template (`report.html`) and one JSON value. Texts go into the page as text, never as markup: what a
model wrote cannot run.
"""

from __future__ import annotations

import base64
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import tyro

from tiltlm import __version__
from tiltlm.commands.models import load_run
from tiltlm.commands.page_curves import curves
from tiltlm.commands.page_tables import Row, differences_table, number, result_tables, verdicts, warnings
from tiltlm.commands.process import prepare
from tiltlm.jsonl import read_json, read_rows
from tiltlm.progress import note
from tiltlm.ruler.log_z import LogZ
from tiltlm.run import Run


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
        "warnings": warnings(runs),
        "verdicts": verdicts(runs),
        "tables": [table for table in (*result_tables(runs), differences_table(runs)) if table["rows"]],
        "pictures": [picture for run in runs for picture in pictures(run)],
        "curves": training(runs),
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


# ---- pictures, samples, runs --------------------------------------------------------------------------------


def pictures(run: Run[Any]) -> list[Row]:
    """A run's PNG files, inlined."""
    found = []
    for path in sorted(run.folder.glob("*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        found.append({"title": f"{run.recipe.name}: {path.stem}", "src": f"data:image/png;base64,{data}"})
    return found


def training(runs: Sequence[Run[Any]]) -> list[Row]:
    """The training curves of every run that has some."""
    named = zip(runs, names_of(runs).values(), strict=True)
    return [{"name": name, "metrics": found} for run, name in named if (found := curves(run.folder))]


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
    provenance = read_json(run.folder / "provenance.json")
    if not isinstance(provenance, dict) or not isinstance(provenance.get("versions", {}), dict):
        raise ValueError(
            f"{run.folder / 'provenance.json'} does not say where numbers come from; build the run again"
        )
    settings = asdict(run.recipe)
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
        facts["log Z"] = str(LogZ.from_json(read_json(log_z)))
    return {
        "name": run.recipe.name,
        "seed": run.recipe.seed,
        "facts": facts,
        "settings": json.dumps(settings, indent=1, default=str),
    }
