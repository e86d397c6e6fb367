"""Answers that were drawn and graded, one a row: our lines, and the tables that STaR's code keeps them in.

| | a line of ours (.jsonl) | a column of STaR's table (.csv), K rows a question |
|---|---|---|
| question | index, subject, correct_answer, prompt | indices, subjects, correct_answers (or truth), prompted_questions |
| answer | completion, finish_reason, completion_ids | raw_responses: the text with the end token that it may have |
| verdict | answer, score, parse_rule | model_answers (older: answers), scores |
| drawing | sample, settings | none |

A line of a round (`answers.jsonl`) holds all answers to its question, in lists, and `answer` is the right one there. Lines
of `tiltlm sample` are read as well, if they have the question's `index`.

Which sample of its question a row is decides what is a repetition: a line of ours names it. A table does not, and two
samples may well be alike. There a row is a repetition where an earlier stretch of rows of its question, with others in
between, holds the same text as often: that is what appending a table to itself, or to a part of itself, leaves behind.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tiltlm.jsonl import open_text, placed_rows, reading, write_whole

Finish = Literal["stop", "length", ""]
"""How an answer ended: by itself, cut off, or nobody knows."""

ENDS = ("<|eot_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<end_of_turn>", "</s>")
"""Texts of the tokens in which an answer ends, in tables that keep them."""

COLUMNS = {
    "index": ("indices",),
    "prompt": ("prompted_questions",),
    "answer": ("model_answers", "answers"),
    "subject": ("subjects",),
    "correct": ("correct_answers", "truth"),
    "response": ("raw_responses",),
    "score": ("scores",),
}
"""What a table calls each part of a row, the usual name first."""

WANTED = ("index", "response")
"""What no table may lack."""


@dataclass(frozen=True)
class Generated:
    """An answer to a question, and the verdict on it.

    index           the question's number in its data set
    sample          which of the question's answers it is, from 0
    prompt          what was put to the model, template included
    response        the answer's text, without the token that ended it
    answer          what was read off it (empty: nothing), by the rule parse_rule
    correct         what is right
    score           1 where it is right, 0 where not; None: not graded
    finish_reason   stop: it ended by itself; length: it was cut off; empty: unknown
    completion_ids  its tokens, the end token included; None: unknown
    settings        what it was drawn with
    """

    index: int
    sample: int
    prompt: str
    response: str
    answer: str = ""
    correct: str = ""
    subject: str = ""
    score: float | None = None
    finish_reason: Finish = ""
    parse_rule: str = ""
    completion_ids: tuple[int, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        """A line of ours."""
        return {
            "index": self.index, "sample": self.sample, "subject": self.subject, "prompt": self.prompt,
            "completion": self.response, "answer": self.answer, "correct_answer": self.correct, "score": self.score,
            "parse_rule": self.parse_rule, "finish_reason": self.finish_reason,
            "completion_ids": None if self.completion_ids is None else list(self.completion_ids),
            "settings": dict(self.settings),
        }  # fmt: skip

    @staticmethod
    def of_line(row: Mapping[str, Any], where: str) -> Generated:
        """From a line of ours, or one of `tiltlm sample` (`finished`; `answer` is the right one where no `correct_answer`
        is). Raises ValueError that names `where` for one that is neither."""
        ids, score = row.get("completion_ids"), row.get("score")
        reason = row.get("finish_reason", {True: "stop", False: "length"}.get(row.get("finished", ""), ""))
        answer = row.get("answer", "") if "correct_answer" in row else ""
        if reason not in ("stop", "length", ""):
            raise ValueError(f"{where}: finish_reason is stop, length or empty; got {reason!r:.40}")
        return Generated(
            _number(row["index"], "index", where), _number(row.get("sample", 0), "sample", where),
            str(row.get("prompt", "")), str(row["completion"]), str(answer),
            str(row.get("correct_answer", row.get("answer", ""))), str(row.get("subject", "")),
            None if score is None else _score(score, where), reason, str(row.get("parse_rule", "")),
            None if ids is None else tuple(int(i) for i in ids), row.get("settings") or {},
        )  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """The answers that a file holds; said: what was left out of it, and what is not known, for people."""

    rows: tuple[Generated, ...]
    said: tuple[str, ...] = ()


def read_generated(path: str | Path) -> Stored:
    """The answers in a file of our lines (.jsonl) or a table of STaR's (.csv), either also as .gz, without repetitions.

    Raises FileNotFoundError, and ValueError that names file and line for what cannot be read.
    """
    path = Path(path)
    if ".jsonl" in path.suffixes:
        return _lines(path)
    if ".csv" not in path.suffixes:
        raise ValueError(f"{path}: answers are read from .jsonl (lines of ours) or .csv (STaR's generated.csv)")
    return _table(path)


def _counted(number: int, what: str) -> tuple[str, ...]:
    return (f"{number} {what} left out",) if number else ()


def _lines(path: Path) -> Stored:
    """The lines of a file, of each sample the first; where a line names none, it is the next one of its question."""
    rows: dict[tuple[int, int], Generated] = {}
    numbers: Counter[int] = Counter()
    for where, found in _one_by_one(path):
        index = _number(found["index"], "index", where)
        row = Generated.of_line({"sample": numbers[index]} | found, where)
        numbers[index] += 1
        rows.setdefault((index, row.sample), row)
    return Stored(
        tuple(rows.values()), _counted(numbers.total() - len(rows), "lines of a sample that is there already")
    )


EACH = {
    "completions": "completion", "completion_ids": "completion_ids", "rewards": "score", "answers": "answer",
    "rules": "parse_rule", "finished": "finished",
}  # fmt: skip
"""The lists of a round's line, and what each answer's own line calls its entry."""


def _one_by_one(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, a line of one answer): those of a round's lines one after the other."""
    for where, row in placed_rows(path, ("index",)):
        if "completions" not in row:
            if "completion" not in row:
                raise ValueError(f"{where}: column 'completion' is missing; this line has {', '.join(row)}")
            yield where, row
            continue
        lists = {name: row[name] for name in EACH if name in row}
        sizes = {len(values) if isinstance(values, list) else -1 for values in lists.values()}
        if len(sizes) > 1 or -1 in sizes:
            raise ValueError(
                f"{where}: {', '.join(lists)} hold one entry for each completion, and here they do not"
            )
        own = {"correct_answer": row.get("answer", "")} | {name: x for name, x in row.items() if name not in EACH}
        for k in range(len(row["completions"])):
            yield where, own | {"sample": k, "answer": ""} | {EACH[name]: lists[name][k] for name in lists}


# ---- tables -----------------------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """A table's columns: their names, where each part of a row stands, and how many are not read."""

    header: list[str]
    at: dict[str, int]
    said: tuple[str, ...]

    @staticmethod
    def of(header: list[str], where: str) -> Columns:
        at = {
            part: header.index(name)
            for part, names in COLUMNS.items()
            for name in reversed(names)
            if name in header
        }
        missing = [COLUMNS[part][0] for part in WANTED if part not in at]
        if missing:
            raise ValueError(f"{where}: column {missing[0]!r} is missing; there are {', '.join(header)}")
        named = [name for name in header if name and not name.startswith("Unnamed:")]
        said = [
            *_counted(len(header) - len(named), "columns without a name"),
            *_counted(len(named) - len(set(named)), "columns of a name that is there already"),
        ]
        return Columns(header, at, tuple(said))

    def row(self, values: list[str], where: str) -> Generated:
        if len(values) != len(self.header):
            raise ValueError(f"{where}: {len(values)} fields, but the first line names {len(self.header)}")
        parts = {part: values[k] for part, k in self.at.items()}
        text, score = parts["response"], parts.get("score", "")
        end = next((end for end in ENDS if text.endswith(end)), "")
        return Generated(
            _number(parts["index"], "indices", where), 0, parts.get("prompt", ""), text.removesuffix(end),
            parts.get("answer", ""), parts.get("correct", ""), parts.get("subject", ""),
            None if score == "" else _score(score, where), "stop" if end else "",
        )  # fmt: skip


def _table(path: Path) -> Stored:
    fields = _fields(path)
    first = next(fields, None)
    if first is None:
        raise ValueError(f"{path} is empty: a table of answers was expected")
    columns, headers, rows = Columns.of(first[1], first[0]), 0, []
    for where, values in fields:
        if values == columns.header:
            headers += 1
        else:
            rows.append(columns.row(values, where))
    kept = _without_repetitions(rows)
    said = [*columns.said, *_counted(headers, "repeated headers")]
    said += _counted(len(rows) - len(kept), "rows that were there already")
    if kept and not any(row.finish_reason for row in kept):
        said.append(f"no answer shows an end token ({', '.join(ENDS)}): how they ended is not known")
        return Stored(tuple(kept), tuple(said))
    return Stored(tuple(replace(row, finish_reason=row.finish_reason or "length") for row in kept), tuple(said))


def _fields(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(file:line, fields) of every row, the header included; text as it is ("NA" too)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the module's limit of 131072 characters
    with reading(path), open_text(path, newline="") as file:
        reader, line = csv.reader(file, strict=True), 1
        try:
            for values in reader:
                if values:
                    yield f"{path}:{line}", values
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{path}:{line}: the row that begins here is not csv ({error})") from None


def _without_repetitions(rows: Sequence[Generated]) -> list[Generated]:
    """Rows with their samples numbered, without those that an earlier stretch of the same question holds as often."""
    kept: list[Generated] = []
    seen: dict[int, Counter[tuple[str, str]]] = {}
    numbers: Counter[int] = Counter()
    for index, stretch in groupby(rows, lambda row: row.index):
        before, here = seen.setdefault(index, Counter()), Counter[tuple[str, str]]()
        for row in stretch:
            text = row.prompt, row.response
            here[text] += 1
            if here[text] > before[text]:
                kept.append(replace(row, sample=numbers[index]))
                numbers[index] += 1
        seen[index] = before | here  # the larger count of each
    return kept


def _number(value: Any, name: str, where: str) -> int:
    """A whole number, also as tables with gaps write it (7.0)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.5
    if number != int(number) or number < 0:
        raise ValueError(f"{where}: {name} are whole numbers, 0 or more; got {value!r:.40}")
    return int(number)


def _score(value: Any, where: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = -1.0
    if not 0 <= score <= 1:
        raise ValueError(f"{where}: scores are from 0 to 1; got {value!r:.40}")
    return score


# ---- writing ----------------------------------------------------------------------------------------------------


def write_generated(path: str | Path, rows: Iterable[Generated]) -> None:
    """Write answers as our lines (.jsonl) or, for other programs, as STaR's table (.csv), which leaves out what that has no
    column for."""
    path = Path(path)
    if path.suffix == ".csv":
        _write_table(path, rows)
    elif path.suffix == ".jsonl":
        write_whole(path, "".join(json.dumps(row.line(), ensure_ascii=False) + "\n" for row in rows))
    else:
        raise ValueError(f"{path}: answers are written as .jsonl or .csv")


def _write_table(path: Path, rows: Iterable[Generated]) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([names[0] for names in COLUMNS.values()])
        for row in rows:
            end = ENDS[0] if row.finish_reason == "stop" else ""
            parts = row.index, row.prompt, row.answer, row.subject, row.correct, row.response + end
            writer.writerow([*parts, "" if row.score is None else row.score])
    aside.rename(path)
