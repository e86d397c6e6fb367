"""Measurements with the questions they were taken on, so that two are joined by question and never by position alone.

A question is told by its id: of a run its index in `questions.json` (one a test prompt, in their order), where all runs at
hand have that file, else its prompt; of a file of rows its `index` (or `indices`, or `prompt`). What comes several times in
one run, a prompt that stands twice in the data or the draws of a single prompt, is numbered; rows of a file that share an
id are samples of one question, and averaged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tiltlm.commands.compared import name_of, same_prompts, task_name
from tiltlm.data.tables import rows_of
from tiltlm.jsonl import read_json
from tiltlm.ruler.measure import Measurement
from tiltlm.ruler.table import ANEW
from tiltlm.run import Run
from tiltlm.samples import Conditioned, Samples

IDS = ("index", "indices", "prompt")
"""Columns that tell a question, the first that a row has."""

SCORES = ("score", "scores", "reward", "rewards")
"""Columns that hold a number, or a list of them, for each answer."""

QUESTIONS = "questions.json"
"""[index, right answer] of the question of every test prompt, where a task has such."""

SWITCHES = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True)
class Observed:
    """A measurement, and the ids of its questions: those of its observations, in their order.

    unit   what the observations are: questions, or the draws of a single prompt
    """

    name: str
    questions: Sequence[str]
    measurement: Measurement
    unit: str = "questions"


def shared(found: Sequence[Observed]) -> list[Observed]:
    """All of them on the questions that every one has, in one order.

    Where questions differ, metrics that were not observed on every question are left out. Raises ValueError where no
    question is shared.
    """
    if all(each.questions == found[0].questions for each in found):
        return list(found)
    everywhere = set.intersection(*(set(each.questions) for each in found))
    kept = [question for question in found[0].questions if question in everywhere]
    if not kept:
        raise ValueError(
            "; ".join(
                f"{each.name} has {len(each.questions)} questions, like {each.questions[0]!r:.60}"
                for each in found
            )
            + ": none is in all of them, so nothing can be compared question by question"
        )
    return [_on(each, kept) for each in found]


def _on(each: Observed, kept: Sequence[str]) -> Observed:
    place = {question: k for k, question in enumerate(each.questions)}
    rows = torch.tensor([place[question] for question in kept])
    values = {name: x.cpu()[rows] for name, x in each.measurement.values.items() if len(x) == len(each.questions)}
    return replace(each, questions=kept, measurement=replace(each.measurement, values=values))


# ---- of runs --------------------------------------------------------------------------------------------------------


def of_runs(runs: Sequence[Run[Any]]) -> list[Observed]:
    """The measurements of finished runs. Raises ValueError for one that has none."""
    for run in runs:
        if not (run.folder / "measurement.safetensors").is_file():
            own = [str(each.folder) for each in run.inputs.values() if (each.folder / "report.json").is_file()]
            inside = f"; it is made of {', '.join(own)}" if own else ""
            raise ValueError(f"{run.folder} ({run.recipe.name}) holds no measurement of its own{inside}")
    by_id = all((run.folder / QUESTIONS).is_file() for run in runs)
    if by_id:
        _refuse_other_questions(runs)
    in_words = not by_id and not all(same_prompts(runs[0], run) for run in runs)
    return [
        _of_run(run, [index for index, _ in _known(run)] if by_id else _prompts(run, in_words)) for run in runs
    ]


def _of_run(run: Run[Any], asked: Sequence[str]) -> Observed:
    """asked: the ids of its prompts. Of a single one the observations are its draws."""
    measured = Measurement.load(run.folder / "measurement.safetensors")
    name = f"{task_name(run.recipe)}/{name_of(run)} [{run.key}]"
    if len(asked) > 1:
        return Observed(name, _numbered(asked), measured)
    draws = max(len(x) for x in measured.values.values())
    return Observed(name, _numbered([*asked] * draws), measured, "draws of one prompt")


def _known(run: Run[Any]) -> list[tuple[str, str]]:
    """(index, right answer) of the question of every test prompt."""
    path = run.folder / QUESTIONS
    found = read_json(path)
    if (
        not isinstance(found, list)
        or not all(isinstance(each, list) and len(each) == 2 for each in found)
        or not found
    ):
        raise ValueError(f"{path} is no list of questions, [index, answer]; {ANEW}")
    return [(str(index), str(answer)) for index, answer in found]


def _refuse_other_questions(runs: Sequence[Run[Any]]) -> None:
    """Raise ValueError where one index has two right answers: then the runs' questions are of two data sets."""
    answers: dict[str, str] = {}
    for run in runs:
        for index, answer in _known(run):
            if answers.setdefault(index, answer) != answer:
                raise ValueError(
                    f"{run.folder}: question {index} has the right answer {answer!r}, in another of these runs "
                    f"{answers[index]!r}: they do not number the same questions"
                )


def _prompts(run: Run[Any], in_words: bool) -> list[str]:
    """The prompts as texts, where other runs may have split them into other tokens; else as token ids."""
    prompts = Samples.load(run.folder / "samples.safetensors").prompts
    tokenizer = run.recipe.speech(run)[0] if in_words else None

    def told(rows: list[list[int]]) -> list[str]:
        return [str(row) for row in rows] if tokenizer is None else tokenizer.batch_decode(rows)

    asked = told(prompts.lists())
    if isinstance(prompts, Conditioned):
        asked = [f"{ask} … {end}" for ask, end in zip(asked, told(prompts.conditions.lists()), strict=True)]
    return asked


def _numbered(questions: Sequence[str]) -> list[str]:
    """A question that comes again has its number behind it."""
    seen: Counter[str] = Counter()
    found = []
    for question in questions:
        seen[question] += 1
        found.append(question if seen[question] == 1 else f"{question} ({seen[question]})")
    return found


# ---- of files ---------------------------------------------------------------------------------------------------------


def of_file(path: Path) -> Observed:
    """The scores of a table's rows, averaged by question. Raises ValueError, naming the place, for a row without."""
    scores: dict[str, list[float]] = {}
    for where, row in rows_of(path):
        _, question = _column(row, IDS, where)
        name, value = _column(row, SCORES, where)
        given = value if isinstance(value, list) else [value]
        scores.setdefault(str(question), []).extend(_number(each, f"{where}: {name!r}") for each in given)
    if not scores or not all(scores.values()):
        raise ValueError(
            f"{path} has {'a question without scores' if scores else 'no rows'}: nothing can be compared"
        )
    x = torch.tensor([sum(each) / len(each) for each in scores.values()], dtype=torch.float64)
    metric = "accuracy" if bool(((x >= 0) & (x <= 1)).all()) else "score"
    return Observed(str(path), list(scores), Measurement({metric: x}))


def _column(row: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[str, Any]:
    name = next((name for name in names if name in row), None)
    if name is None:
        raise ValueError(
            f"{where}: a row needs one of the columns {', '.join(names)}; this one has {', '.join(row)}"
        )
    return name, row[name]


def _number(value: Any, where: str) -> float:
    text = str(value).strip().lower()
    try:
        found = SWITCHES[text] if text in SWITCHES else float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{where} is a number for each answer, 1 right and 0 wrong, say; got {value!r:.40}")
    return found
