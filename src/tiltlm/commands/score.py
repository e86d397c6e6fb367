"""`tiltlm score REWARD y.jsonl --out s.jsonl`: a reward for every completion; the input is never written over.

A line of one `completion` gets its `reward`, one of several `completions` a list of `rewards`; of a sum of rewards every
term is written beside it, unweighted, as `reward_terms`. A function of one's own may take the lines' other columns.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from tiltlm.commands.arguments import settings_from
from tiltlm.commands.grading import GRADER, grade
from tiltlm.device import device_of
from tiltlm.jsonl import aside_of, in_parts, placed_rows
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

    reward: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REWARD")]
    """`exact-answer` (1 if completion equals the line's `answer`); FILE.py:FUNCTION, a function of your own,
    f(prompts, completions, **columns), that returns one number for each completion; `reward-model:MODEL`, a sequence
    classifier with one output; `classifier:MODEL:LABEL`, log P(label | prompt and completion), and
    `log-odds:MODEL:LABEL`; MODEL is a folder, a hub name, or a run; an `https://` endpoint; `toxicity`, `nontoxicity` and
    `sentiment:STARS` (1 to 5) by the published hub models; a gold reward (bagofwords, nouns, math, judge:MODEL@URL, …:
    `tiltlm list gold` has a line on each); or a sum of these: 'a.py:f + 0.5*classifier:MODEL:LABEL'. `grader:NAME` grades
    answers to questions: lines of an exam, or STaR's generated.csv (`commands/grading.py`)."""

    rows: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS")]
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

    @property
    def nothing(self) -> list[None]:
        """A column that no line has."""
        return [None] * len(self.places)


def score(args: list[str]) -> int:
    """Run the command."""
    settings = settings_from(args, Score, "score")
    if settings.out.resolve() == settings.rows.resolve():
        raise ValueError(f"--out must be another file than {settings.rows}: results never replace their input")
    if settings.reward.startswith(GRADER):
        return grade(settings.reward.removeprefix(GRADER), settings.rows, settings.out)
    reward = text_function(settings.reward, str(device_of(settings.device)))
    names, totals = looked_over(settings.rows, reward), Totals()
    with aside_of(settings.out) as file:
        for lines in in_parts(placed_rows(settings.rows), AT_ONCE):
            rows = one_by_one(lines, names)
            found = reward.judged(rows.prompts, rows.completions, rows.columns, rows.places)
            file.writelines(
                json.dumps(row, ensure_ascii=False) + "\n" for row in with_rewards(lines, found, reward.labels)
            )
            totals.add(found)
    note(f"{settings.out}: {totals.rows} completions, {totals.means(settings.reward, reward.labels)}")
    return 0


AT_ONCE = 1024
"""Lines that are scored together."""


def looked_over(path: Path, reward: TextFunction) -> tuple[str, ...]:
    """The names of the lines' other columns. Every line is looked at before the first one is scored: raises ValueError,
    naming file:line, for one that holds no completion, or not what the reward takes."""
    names: dict[str, None] = {}
    missing: dict[str, str] = {}
    seen = 0
    for lines in in_parts(placed_rows(path), AT_ONCE):
        rows, seen = one_by_one(lines), seen + len(lines)
        names |= dict.fromkeys(rows.columns)
        if any(each.reads_text for each in reward.rewards):
            refuse_what_is_no_text(rows)
        for name in required(reward):
            lacking = [
                where
                for where, x in zip(rows.places, rows.columns.get(name, rows.nothing), strict=True)
                if x is None
            ]
            if lacking:
                missing.setdefault(name, lacking[0])
    if not seen:
        raise ValueError(f"{path} has no lines: there is nothing to score")
    reward.check_columns(tuple(names), f"the lines have {', '.join(names) or 'no other columns'}")
    if missing:
        name, where = next(iter(missing.items()))
        raise ValueError(f"{where}: column {name!r}, which this reward takes, is missing")
    return tuple(names)


def required(reward: TextFunction) -> list[str]:
    """The columns that a reward cannot do without."""
    return [name for each in reward.rewards for name in each.columns.required]


def one_by_one(lines: Sequence[tuple[str, Line]], names: Sequence[str] | None = None) -> Rows:
    """Every completion of (place, line) pairs; names: of the other columns, where they are those of more lines.

    Raises ValueError naming file:line for a line that holds no completion.
    """
    flat = [(where, one) for where, line in lines for one in _completions(line, where)]
    if names is None:
        names = list(dict.fromkeys(name for _, one in flat for name in one if name not in TAKEN))
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


@dataclass
class Totals:
    """The sums of the rewards, and of every term, over the lines so far."""

    rows: int = 0
    total: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)

    def add(self, found: Judged) -> None:
        self.rows += len(found.total)
        self.total += sum(found.total)
        for label, values in found.terms.items():
            self.terms[label] = self.terms.get(label, 0.0) + sum(values)

    def means(self, name: str, labels: Sequence[str]) -> str:
        """The mean reward, and every term's, for a sentence."""
        n = max(1, self.rows)
        terms = ", ".join(f"{label} {self.terms[label] / n:.4f}" for label in labels)
        return f"mean reward {self.total / n:.4f}" + (f" = {mask(name)}: {terms}" if terms else "")
