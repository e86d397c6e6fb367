"""`tiltlm prepare SOURCE… --out pairs.jsonl`: preference data of any known format as plain rows, and a report.

The rows are of one shape (`tiltlm.data.preference_rows`). What was dropped is counted by reason, in a table on standard
output and in `pairs.jsonl.report.json` beside the rows; a row that does not fit stops the command with file:line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tiltlm.commands.arguments import settings_from
from tiltlm.data.formats import as_pairs, as_rewards, format_named
from tiltlm.data.mapping import mapping_of
from tiltlm.data.preference_rows import Reading, Tally, preference_rows
from tiltlm.data.relabel import check_relabelling, relabelled
from tiltlm.data.tables import file_of, weighed
from tiltlm.device import device_of
from tiltlm.jsonl import aside_of
from tiltlm.models.hub import pretrained
from tiltlm.rewards.by_name import TextFunction, text_function
from tiltlm.rewards.masking import mask
from tiltlm.seeds import stream

CONVERSIONS = {"pairs": as_pairs, "rewards": as_rewards}


@dataclass(frozen=True)
class Prepare:
    """Read preference data and write it as plain rows, with a report of what was dropped and why."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files (.jsonl, .json, .csv, .tsv, each also .gz; .parquet), folders that hold train.jsonl and the like, or data sets
    of the hub (owner/name, owner/name:data_dir). A number behind a colon is a weight: `a.jsonl:2` has every row twice,
    `b.parquet:0.5` a random half of them."""

    out: Path
    """The .jsonl file to write."""

    format: str = "auto"
    """`auto` (told by the columns), `hh` (two dialogues), `tldr` (posts and summaries), `imdb` (reviews). `auto` reads
    prompt/chosen/rejected, chosen/rejected, prompt/completions/rewards, prompt/completion (with label: verdicts),
    messages, and what others post: ShareGPT, Alpaca, HelpSteer2, PKU-SafeRLHF, UltraFeedback, preferred_output,
    question/response_j/response_k, posts with summaries (docs/data.md has the table)."""

    columns: tuple[str, ...] = ()
    """Where columns have other names: `prompt=question chosen=response_j`; dots reach inside, `chosen=messages.-1.content`,
    and `*` into every item of a list, `rewards=completions.*.score`."""

    encoding: str = ""
    """What text files are written in, such as utf-16, latin-1, cp1252 (default: their byte order mark, or UTF-8)."""

    split: str = "train"
    """Which split of a folder or a hub data set."""

    tokenizer: str | None = None
    """A folder, hub name or run: its chat template writes messages as text; its tokens cut the prompts of `imdb`."""

    as_: Annotated[Literal["found", "pairs", "rewards"], tyro.conf.arg(name="as")] = "found"
    """`rewards`: pairs become prompt, completions, rewards [1, 0]; `pairs`: the best and worst completion of a
    group become chosen and rejected; `found`: rows keep their shape."""

    relabel: str = ""
    """A reward by name (as `tiltlm score` takes it): of every pair the side with more of it becomes chosen, and the
    difference the margin. Ties are dropped and counted."""

    keep_ties: bool = False
    """Keep the ties of --relabel, as they stood, with the margin 0."""

    device: str = "cpu"
    """Where a model of --relabel runs: cpu, cuda, cuda:N, mps, or auto."""

    limit: int | None = None
    """Write this many rows at most."""

    seed: int = 0
    """Decides which rows a fraction of a weight takes."""


def prepare(args: list[str]) -> int:
    """Run the command."""
    from transformers import AutoTokenizer

    settings = settings_from(args, Prepare, "prepare")
    report = settings.out.with_name(f"{settings.out.name}.report.json")
    _check(settings, {settings.out.resolve(), report.resolve()})
    make = format_named(settings.format)
    reward = _reward(settings)
    tokenizer = pretrained(AutoTokenizer, settings.tokenizer) if settings.tokenizer else None
    tally = Tally()
    convert, named = CONVERSIONS.get(settings.as_), mapping_of(settings.columns)
    reading = Reading(make, settings.split, tokenizer, named, settings.encoding, convert)
    rows = preference_rows(settings.sources, reading, tally, settings.limit, stream(settings.seed, "prepare"))
    if reward is not None:
        rows = relabelled(rows, reward, tally, settings.keep_ties)
    first = next(rows, None)
    if first is None:
        reasons = ", ".join(f"{n} {reason}" for reason, n in tally.dropped.items()) or "there are no rows"
        raise ValueError(f"nothing is left of {', '.join(settings.sources)} to write: {reasons}")
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    kept = 0
    with aside_of(settings.out, WHOLE) as file:
        for kept, row in enumerate(chain([first], rows), 1):  # noqa: B007
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with aside_of(report, WHOLE) as file:
        file.write(json.dumps(_report(settings, tally, kept, list(first)), indent=2, ensure_ascii=False) + "\n")
    print(f"{settings.out}: {', '.join(first)}")
    Console(width=110, highlight=False).print(_table(tally, kept))
    return 0


WHOLE = "backslashreplace"
"""A file name that this machine's encoding cannot read holds halves of characters; escaped, they are JSON still."""


def _check(settings: Prepare, written: set[Path]) -> None:
    """Raises ValueError for settings that cannot be meant, before anything is read."""
    if not settings.sources:
        raise ValueError("name at least one file, folder or hub data set to read")
    if settings.out.suffix != ".jsonl":
        raise ValueError(f"--out is a .jsonl file; got {settings.out}")
    mapping_of(settings.columns)
    if settings.keep_ties and not settings.relabel:
        raise ValueError("--keep-ties is about the ties of --relabel: name a reward there")
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"--limit must be 1 or more; got {settings.limit}")
    for source in settings.sources:
        path = file_of(weighed(source)[0], settings.split)
        if path is not None and path.resolve() in written:
            raise ValueError(f"--out must be another file than {path}: results never replace their input")


def _reward(settings: Prepare) -> TextFunction | None:
    """The reward of --relabel, looked at before anything is read."""
    if not settings.relabel:
        return None
    reward = text_function(settings.relabel, str(device_of(settings.device)))
    check_relabelling(reward)
    return reward


def _report(settings: Prepare, tally: Tally, kept: int, columns: list[str]) -> dict[str, Any]:
    return {
        "sources": list(settings.sources),
        "format": settings.format,
        "split": settings.split,
        "tokenizer": settings.tokenizer,
        "as": settings.as_,
        "relabel": mask(settings.relabel),
        "keep_ties": settings.keep_ties,
        "limit": settings.limit,
        "columns_from": list(settings.columns),
        "encoding": settings.encoding,
        "seed": settings.seed,
        "read": tally.counted["read"],
        "kept": kept,
        "dropped": {why: {"rows": n, "first": tally.examples[why]} for why, n in tally.dropped.items()},
        "notes": dict(tally.notes),
        "columns": columns,
    }


def _table(tally: Tally, kept: int) -> Table:
    made = Table(box=box.SIMPLE_HEAD)
    made.add_column("rows")
    made.add_column("number", justify="right")
    made.add_column("first one", overflow="fold")
    lines: Sequence[tuple[str, int, str]] = [
        ("kept", kept, ""),
        *((f"  of these: {note}", n, "") for note, n in tally.notes.items()),
        *((f"dropped: {why}", n, tally.examples[why]) for why, n in tally.dropped.items()),
    ]
    for what, n, where in lines:
        made.add_row(escape(what), str(n), escape(where))
    return made
