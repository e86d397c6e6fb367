"""`tiltlm report RUN…`: one self-contained HTML page of tables, pictures and samples; it needs no network.

The page is a template (`report.html`) and one JSON value, written piece by piece: no more than a sample at a time is in
memory. Texts go into the page as text, never as markup: what a model wrote cannot run.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import tyro

from tiltlm import __version__
from tiltlm.commands.arguments import settings_from
from tiltlm.commands.models import load_run
from tiltlm.commands.page_curves import curves
from tiltlm.commands.page_samples import SamplesTable
from tiltlm.commands.page_tables import Row, differences_table, result_tables, verdicts, warnings
from tiltlm.commands.process import prepare
from tiltlm.jsonl import read_json, write_whole
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
    """Samples of each run, at most: of more, half of these at random, half those of the highest and lowest reward."""

    title: str = "tiltlm report"


def report(args: list[str]) -> int:
    """Run the command."""
    settings = settings_from(args, Report, "report")
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
    labels = names_of(runs)
    samples = SamplesTable(runs, labels, settings.samples, settings.out)
    page = {
        "title": settings.title,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "warnings": warnings(runs),
        "verdicts": verdicts(runs),
        "tables": [table for table in (*result_tables(runs), differences_table(runs)) if table["rows"]],
        "pictures": [picture for run in runs for picture in pictures(run)],
        "curves": training(runs),
        "samples": samples.table(),
        "runs": [{**about(run), "name": labels[run.folder]} for run in runs],
    }
    write_whole(settings.out, pieces(page))
    size = settings.out.stat().st_size / 1e6
    note(f"{len(runs)} runs, {samples.count} samples, {size:.1f} MB, opens in any browser")
    print(settings.out)
    return 0


def pieces(page: Mapping[str, Any]) -> Iterator[str]:
    """The template with `page` in it, as JSON in which no character can end the script element it stands in."""
    template = files("tiltlm.commands").joinpath("report.html").read_text(encoding="utf-8")
    before, after = template.split("__PAGE__")
    yield before
    for text in encoded(page):
        for bad in "<>&\u2028\u2029":
            text = text.replace(bad, f"\\u{ord(bad):04x}")
        yield text
    yield after


def encoded(value: Any) -> Iterator[str]:
    """A value's JSON in pieces: entries in their order, and the items of an iterator one by one, as an array."""
    if isinstance(value, Mapping):
        yield "{"
        for k, (name, inner) in enumerate(value.items()):
            yield f"{',' if k else ''}{json.dumps(name)}:"
            yield from encoded(inner)
        yield "}"
    elif isinstance(value, Iterator):
        yield "["
        for k, item in enumerate(value):
            yield f"{',' if k else ''}{json.dumps(item, ensure_ascii=False, allow_nan=False)}"
        yield "]"
    else:
        yield json.dumps(value, ensure_ascii=False, allow_nan=False)


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


# ---- pictures, curves, runs --------------------------------------------------------------------------------


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


def names_of(runs: Sequence[Run[Any]]) -> dict[Path, str]:
    """What to call every run: recipe and seed, and its key where that is not enough."""
    plain = [f"{run.recipe.name} · seed {run.recipe.seed}" for run in runs]
    return {
        run.folder: name if plain.count(name) == 1 else f"{name} [{run.key}]"
        for run, name in zip(runs, plain, strict=True)
    }


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
