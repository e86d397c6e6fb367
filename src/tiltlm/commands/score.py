"""`tiltlm score REWARD y.jsonl --out s.jsonl`: a reward for every completion; the input is never written over."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import tyro

from tiltlm.jsonl import read_rows
from tiltlm.progress import note
from tiltlm.rewards.by_name import NAMED, text_function
from tiltlm.rewards.classifier import SENTIMENT, TOXICITY
from tiltlm.rewards.user_file import call, function_of
from tiltlm.run import located

RowReward = Callable[[Sequence[dict[str, Any]]], Sequence[float]]
"""Rows of the file -> one number each."""


@dataclass(frozen=True)
class Score:
    """Add a `reward` to every line of a .jsonl file of completions."""

    reward: Annotated[str, tyro.conf.Positional]
    """`exact-answer` (1 if completion equals the line's `answer`); FILE.py:FUNCTION, a function of your own that
    takes the lines (a list of dicts) and returns one number for each; `reward-model:MODEL`, a sequence classifier with
    one output; `classifier:MODEL:LABEL`, log P(label | prompt and completion), and `log-odds:MODEL:LABEL`; MODEL is a
    folder, a hub name, or a run; an `https://` endpoint; `toxicity`, `nontoxicity` and `sentiment:STARS` (1 to 5) by
    the published hub models."""

    rows: Annotated[Path, tyro.conf.Positional]
    """The .jsonl file of completions: a `completion` a line, or a list of `completions`, which get `rewards`."""

    out: Path
    """The .jsonl file to write."""

    device: str = "cpu"
    """Where a model runs."""


def exact_answer(rows: Sequence[dict[str, Any]]) -> list[float]:
    """1 where `completion` (surrounding blanks aside) or `completion_ids` equals `answer`."""
    return [float(_given(row) == _trimmed(row["answer"])) for row in rows]


def _given(row: dict[str, Any]) -> Any:
    name = "completion_ids" if isinstance(row["answer"], list) else "completion"
    if name not in row:
        raise ValueError(f"a line with answer {row['answer']!r} has no {name!r}")
    return _trimmed(row[name])


def _trimmed(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def of_texts(name: str, device: str) -> RowReward:
    """The reward of texts called `name` (see `rewards/by_name.py`), of lines with `prompt` and `completion`."""
    function = text_function(located(name), device)

    def reward(rows: Sequence[dict[str, Any]]) -> Sequence[float]:
        return function([_text(row, "prompt") for row in rows], [_text(row, "completion") for row in rows])

    return reward


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"this reward reads text; {name!r} of a line is {type(row.get(name)).__name__}")
    return str(row[name])


def one_by_one(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """Lines with one completion each, and how many of them every line became: a line of `completions` one for each."""
    flat: list[dict[str, Any]] = []
    counts = []
    for row in rows:
        texts = row.get("completions")
        if texts is not None and not isinstance(texts, list):
            raise ValueError(f"'completions' must be a list of texts; it is {type(texts).__name__}")
        rest = {name: value for name, value in row.items() if name != "completions"}
        found = [row] if texts is None else [{**rest, "completion": text} for text in texts]
        flat += found
        counts.append(len(found))
    return flat, counts


def with_rewards(
    rows: Sequence[dict[str, Any]], values: Sequence[float], counts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Every line with its `reward`; one of `completions` with its `rewards`."""
    rest = iter(values)
    for row, count in zip(rows, counts, strict=True):
        found = [next(rest) for _ in range(count)]
        yield row | ({"rewards": found} if "completions" in row else {"reward": found[0]})


REWARDS: dict[str, tuple[RowReward, tuple[str, ...]]] = {"exact-answer": (exact_answer, ("answer",))}
"""Rewards by name, and the columns each needs."""

PUBLISHED = {"toxicity": f"classifier:{TOXICITY}:0", "nontoxicity": f"classifier:{TOXICITY}:1"}
PUBLISHED |= {f"sentiment:{stars}": f"classifier:{SENTIMENT}:{stars - 1}" for stars in range(1, 6)}
"""Rewards by published hub models, and what they stand for."""


def score(args: list[str]) -> int:
    """Run the command."""
    settings = tyro.cli(Score, prog="tiltlm score", args=args)
    reward, needs = find_reward(settings.reward, settings.device)
    if settings.out.resolve() == settings.rows.resolve():
        raise ValueError(f"--out must be another file than {settings.rows}: results never replace their input")
    rows = list(read_rows(settings.rows, needs))
    flat, counts = one_by_one(rows)
    values = call(settings.reward, reward, flat)
    if len(values) != len(flat):
        raise ValueError(f"{settings.reward} returned {len(values)} numbers for {len(flat)} lines")
    bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"{settings.reward} gave line {_line_of(bad[0], counts)} of {settings.rows} the reward {values[bad[0]]}"
        )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in with_rewards(rows, values, counts)]
    aside = settings.out.with_name(f".{settings.out.name}.tmp")
    aside.write_text("".join(lines), encoding="utf-8")
    aside.rename(settings.out)
    mean = sum(values) / max(1, len(values))
    note(f"{settings.out}: {len(flat)} completions, mean reward {mean:.4f}")
    return 0


def _line_of(completion: int, counts: Sequence[int]) -> int:
    """The number of the line (from 1) that holds the file's n-th completion."""
    line = 0
    while completion >= counts[line]:
        completion -= counts[line]
        line += 1
    return line + 1


def find_reward(name: str, device: str = "cpu") -> tuple[RowReward, tuple[str, ...]]:
    """A reward by its name, and the columns it needs."""
    path, colon, _ = name.rpartition(":")
    if colon and path.endswith(".py"):
        return function_of(name), ()
    if name in REWARDS:
        return REWARDS[name]
    known = [*REWARDS, *PUBLISHED, *NAMED[1:]]
    if name in PUBLISHED or name.partition(":")[0] in {each.partition(":")[0] for each in NAMED[1:]} | {"http"}:
        return of_texts(PUBLISHED.get(name, name), device), ("prompt",)
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"there is no reward {name!r}.{hint} Known: {', '.join(known)}, or FILE.py:FUNCTION")
