"""`tiltlm score REWARD y.jsonl --out s.jsonl`: a reward for every completion; the input is never written over.

A line of one `completion` gets its `reward`, one of several `completions` a list of `rewards`; of a sum of rewards every
term is written beside it, unweighted, as `reward_terms`. A function of one's own may take the lines' other columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from tiltlm.commands.grading import GRADER, grade
from tiltlm.device import device_of
from tiltlm.jsonl import placed_rows
from tiltlm.progress import note
from tiltlm.rewards.by_name import Judged, TextFunction, text_function
from tiltlm.rewards.masking import mask

Line = dict[str, Any]

TAKEN = ("prompt", "completion", "completions")
"""Columns that become prompts and completions; all others keep their names."""

AS_WELL = {"prompt": "question", "completion": "response"}
"""Columns that are read where one of the usual name is missing."""

ONE_EACH = ("completion_ids", "log_q", "finished")
"""Columns that, in a line of several completions, hold a list with one for each."""


@dataclass(frozen=True)
class Score:
    """Add a `reward` to every line of a .jsonl file of completions."""

    reward: Annotated[str, tyro.conf.Positional]
    """`exact-answer` (1 if completion equals the line's `answer`); FILE.py:FUNCTION, a function of your own,
    f(prompts, completions, **columns), that returns one number for each completion; `reward-model:MODEL`, a sequence
    classifier with one output; `classifier:MODEL:LABEL`, log P(label | prompt and completion), and
    `log-odds:MODEL:LABEL`; MODEL is a folder, a hub name, or a run; an `https://` endpoint; `toxicity`, `nontoxicity` and
    `sentiment:STARS` (1 to 5) by the published hub models; a gold reward (bagofwords, nouns, math, judge:MODEL@URL, …:
    `tiltlm list gold` has a line on each); or a sum of these: 'a.py:f + 0.5*classifier:MODEL:LABEL'. `grader:NAME` grades
    answers to questions: lines of an exam, or STaR's generated.csv (`commands/grading.py`)."""

    rows: Annotated[Path, tyro.conf.Positional]
    """The .jsonl file of completions: a `completion` (or `response`) a line, or a list of `completions`, which get
    `rewards`."""

    out: Path
    """The .jsonl file to write."""

    device: str = "cpu"
    """Where a model runs: cpu, cuda, cuda:N, mps, or auto: the first of cuda, mps and cpu that is there."""


class Rows(NamedTuple):
    """Completions one by one: what each answers, where it stands, and the other columns."""

    prompts: list[Any]
    completions: list[Any]
    places: list[str]
    columns: dict[str, list[Any]]


def score(args: list[str]) -> int:
    """Run the command."""
    settings = tyro.cli(Score, prog="tiltlm score", args=args)
    if settings.out.resolve() == settings.rows.resolve():
        raise ValueError(f"--out must be another file than {settings.rows}: results never replace their input")
    if settings.reward.startswith(GRADER):
        return grade(settings.reward.removeprefix(GRADER), settings.rows, settings.out)
    reward = text_function(settings.reward, str(device_of(settings.device)))
    lines = list(placed_rows(settings.rows))
    if not lines:
        raise ValueError(f"{settings.rows} has no lines: there is nothing to score")
    rows = one_by_one(lines)
    for each in reward.rewards:
        if each.reads_text:
            refuse_what_is_no_text(rows)
    refuse_missing(reward, rows)
    found = reward.judged(rows.prompts, rows.completions, rows.columns, rows.places)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in with_rewards(lines, found, reward.labels))
    aside = settings.out.with_name(f".{settings.out.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.rename(settings.out)
    note(f"{settings.out}: {len(found.total)} completions, {means(settings.reward, found, reward.labels)}")
    return 0


def one_by_one(lines: Sequence[tuple[str, Line]]) -> Rows:
    """Every completion of (place, line) pairs. Raises ValueError naming file:line for one that holds none."""
    flat = [(where, one) for where, line in lines for one in _completions(line, where)]
    names = dict.fromkeys(name for _, one in flat for name in one if name not in TAKEN)
    return Rows(
        [one.get("prompt") for _, one in flat],
        [one["completion"] for _, one in flat],
        [where for where, _ in flat],
        {name: [one.get(name) for _, one in flat] for name in names},
    )


def _completions(line: Line, where: str) -> list[Line]:
    """A line as lines of one completion each; one of token ids alone is judged by these. D2PO's files say question and
    response."""
    line = {name: line[other] for name, other in AS_WELL.items() if name not in line and other in line} | line
    if "completions" not in line:
        if "completion" not in line and "completion_ids" not in line:
            raise ValueError(
                f"{where}: column 'completion' is missing; this line has {', '.join(line) or 'nothing'}"
            )
        return [line if "completion" in line else line | {"completion": line["completion_ids"]}]
    texts, rest = line["completions"], {name: value for name, value in line.items() if name != "completions"}
    if not isinstance(texts, list):
        raise ValueError(f"{where}: 'completions' must be a list of texts; it is {type(texts).__name__}")
    lists = {name: rest[name] for name in ONE_EACH if isinstance(rest.get(name), list)}
    own = {name: values for name, values in lists.items() if len(values) == len(texts)}
    return [
        {**rest, "completion": text, **{name: values[k] for name, values in own.items()}}
        for k, text in enumerate(texts)
    ]


def refuse_what_is_no_text(rows: Rows) -> None:
    """Raise ValueError naming the first line whose prompt or completion is no text."""
    for name, values in (("prompt", rows.prompts), ("completion", rows.completions)):
        for where, value in zip(rows.places, values, strict=True):
            if not isinstance(value, str):
                raise ValueError(f"{where}: this reward reads text; {name!r} is {_kind(value)}")


def refuse_missing(reward: TextFunction, rows: Rows) -> None:
    """Raise ValueError where a column that the reward takes is in no line, or is missing from one."""
    if not rows.places:
        return
    reward.check_columns(tuple(rows.columns), f"the lines have {', '.join(rows.columns) or 'no other columns'}")
    for each in reward.rewards:
        for name in each.columns.required:
            if None in rows.columns[name]:
                where = rows.places[rows.columns[name].index(None)]
                raise ValueError(f"{where}: column {name!r}, which this reward takes, is missing")


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def with_rewards(lines: Sequence[tuple[str, Line]], found: Judged, labels: Sequence[str]) -> list[Line]:
    """Every line with its `reward`, one of `completions` with its `rewards`; of a sum with its `reward_terms`."""
    done, at = [], 0
    for _, line in lines:
        many = "completions" in line
        own = slice(at, at := at + (len(line["completions"]) if many else 1))
        more: Line = {"rewards": found.total[own]} if many else {"reward": found.total[own][0]}
        if labels:
            terms = {label: found.terms[label][own] for label in labels}
            more["reward_terms"] = terms if many else {label: values[0] for label, values in terms.items()}
        done.append(line | more)
    return done


def means(name: str, found: Judged, labels: Sequence[str]) -> str:
    """The mean reward, and every term's, for a sentence."""

    def mean(values: Sequence[float]) -> str:
        return f"{sum(values) / max(1, len(values)):.4f}"

    terms: Mapping[str, str] = {label: mean(found.terms[label]) for label in labels}
    apart = f" = {mask(name)}: " + ", ".join(f"{label} {value}" for label, value in terms.items()) if terms else ""
    return f"mean reward {mean(found.total)}{apart}"
