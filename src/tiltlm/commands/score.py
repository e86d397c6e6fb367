"""`tiltlm score REWARD y.jsonl --out s.jsonl`: a reward for every completion; the input is never written over."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import tyro

from tiltlm.jsonl import read_rows
from tiltlm.models.classifier import TextClassifier
from tiltlm.progress import note
from tiltlm.rewards.classifier import SENTIMENT, TOXICITY
from tiltlm.rewards.user_file import call, function_of
from tiltlm.train import checkpoints

RowReward = Callable[[Sequence[dict[str, Any]]], Sequence[float]]
"""Rows of the file -> one number each."""


@dataclass(frozen=True)
class Score:
    """Add a `reward` to every line of a .jsonl file of completions."""

    reward: Annotated[str, tyro.conf.Positional]
    """`exact-answer` (1 if completion equals the line's `answer`); FILE.py:FUNCTION, a function of your own that
    takes the lines (a list of dicts) and returns one number for each; `classifier:MODEL:LABEL`, log P(label | prompt
    and completion) by a sequence-classification model (folder, hub name, or a run of a stage `classifier`);
    `toxicity`, `nontoxicity` and `sentiment:STARS` (1 to 5) by the published hub models."""

    rows: Annotated[Path, tyro.conf.Positional]
    """The .jsonl file of completions."""

    out: Path
    """The .jsonl file to write."""


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


def classified(name: str, label: str) -> RowReward:
    """log P(label | text of prompt and completion) by the sequence classifier called `name`."""
    run = Path(name)
    if (run / "provenance.json").is_file():
        found = checkpoints(run)
        if not found:
            raise ValueError(f"{name} is a run without a trained model: name one of a stage `classifier`")
        name = str(found[-1])
    classifier = TextClassifier.load(name)
    column = classifier.index_of(label)

    def reward(rows: Sequence[dict[str, Any]]) -> list[float]:
        texts = [_text(row) for row in rows]
        return classifier.log_probs(texts)[:, column].tolist() if texts else []

    return reward


def _text(row: dict[str, Any]) -> str:
    """Prompt and completion of a line, as text."""
    for name in ("prompt", "completion"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"a classifier reads text; {name!r} of a line is {type(row.get(name)).__name__}")
    return row["prompt"] + row["completion"]


REWARDS: dict[str, tuple[RowReward, tuple[str, ...]]] = {"exact-answer": (exact_answer, ("answer",))}
"""Rewards by name, and the columns each needs."""

TEXT, STARS = ("prompt", "completion"), ("1", "2", "3", "4", "5")
NAMED = ("classifier:MODEL:LABEL", "toxicity", "nontoxicity", "sentiment:STARS")


def score(args: list[str]) -> int:
    """Run the command."""
    settings = tyro.cli(Score, prog="tiltlm score", args=args)
    reward, needs = find_reward(settings.reward)
    if settings.out.resolve() == settings.rows.resolve():
        raise ValueError(f"--out must be another file than {settings.rows}: results never replace their input")
    rows = list(read_rows(settings.rows, needs))
    values = call(settings.reward, reward, rows)
    if len(values) != len(rows):
        raise ValueError(f"{settings.reward} returned {len(values)} numbers for {len(rows)} lines")
    bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"{settings.reward} gave line {bad[0] + 1} of {settings.rows} the reward {values[bad[0]]}"
        )
    lines = [
        json.dumps({**row, "reward": v}, ensure_ascii=False) + "\n" for row, v in zip(rows, values, strict=True)
    ]
    aside = settings.out.with_name(f".{settings.out.name}.tmp")
    aside.write_text("".join(lines), encoding="utf-8")
    aside.rename(settings.out)
    mean = sum(values) / max(1, len(values))
    note(f"{settings.out}: {len(rows)} completions, mean reward {mean:.4f}")
    return 0


def find_reward(name: str) -> tuple[RowReward, tuple[str, ...]]:
    """A reward by its name, and the columns it needs."""
    path, colon, _ = name.rpartition(":")
    if colon and path.endswith(".py"):
        return function_of(name), ()
    if name in REWARDS:
        return REWARDS[name]
    kind, _, rest = name.partition(":")
    model, _, label = rest.rpartition(":")
    if kind == "classifier" and model and label:
        return classified(model, label), TEXT
    if name in ("toxicity", "nontoxicity"):
        return classified(TOXICITY, "0" if name == "toxicity" else "1"), TEXT
    if kind == "sentiment" and rest in STARS:
        return classified(SENTIMENT, str(int(rest) - 1)), TEXT
    near = get_close_matches(name, [*REWARDS, *NAMED], n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    known = ", ".join([*REWARDS, *NAMED])
    raise ValueError(f"there is no reward {name!r}.{hint} Known: {known}, or FILE.py:FUNCTION")
