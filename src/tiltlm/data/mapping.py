"""Columns by other names: `prompt=question chosen=messages.-1.content` says where a row keeps what it is known to have.

A path is a column, or steps into one joined by dots: a name inside an object, a number inside a list (from its end, if
negative), `*` for every item of a list. What a mapping names takes its new place; the column it came from is no longer
there; all others stay. Where nothing fits, `suggested` looks for the mapping that would, by synonyms and likeness.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

Row = dict[str, Any]

NAMES = (
    "prompt", "chosen", "rejected", "margin", "completion", "label", "rating", "completions", "rewards", "scores",
    "finished", "scores_texts", "messages", "tools", "system", "conversations", "instruction", "input", "output",
    "question", "response", "response_0", "response_1", "better_response_id", "response_j", "response_k", "magnitude",
    "preferred_output", "non_preferred_output", "info", "summaries", "choice", "subreddit", "title", "post", "summary",
    "text",
)  # fmt: skip
"""Columns that some format reads: what may stand in front of the equals sign."""


def mapping_of(columns: Sequence[str]) -> dict[str, str]:
    """["prompt=question", …] as {name: path}. Raises ValueError for what is no such thing, and for unknown names."""
    found: dict[str, str] = {}
    for each in columns:
        name, equals, path = each.partition("=")
        if not (equals and name and path):
            raise ValueError(f"--columns wants NAME=COLUMN, like prompt=question; got {each!r}")
        if name not in NAMES:
            near = get_close_matches(name, NAMES, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(NAMES)}"
            raise ValueError(f"--columns {each}: nothing reads a column {name!r}.{hint}")
        if name in found:
            raise ValueError(f"--columns names {name} twice: {name}={found[name]} and {each}")
        found[name] = path
    return found


def mapped(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with every mapped column in its place. Raises ValueError, naming the step that leads nowhere."""
    if not columns:
        return row
    moved = {name: reached(row, path) for name, path in columns.items()}
    gone = {path if path in row else path.split(".")[0] for path in columns.values()}
    return {name: value for name, value in row.items() if name not in gone} | moved


def reached(row: Row, path: str) -> Any:
    """What stands at `path` in a row."""
    return row[path] if path in row else _inside(row, path.split("."), path)


def _inside(value: Any, steps: Sequence[str], path: str) -> Any:
    for k, step in enumerate(steps):
        if step == "*" and isinstance(value, list):
            return [_inside(each, steps[k + 1 :], path) for each in value]
        value = _one_step(value, step, path)
    return value


def _one_step(value: Any, step: str, path: str) -> Any:
    if isinstance(value, dict):
        if step in value:
            return value[step]
        near = get_close_matches(step, [str(name) for name in value], n=1)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(map(str, value)) or 'nothing'}"
        raise ValueError(f"column {path!r} is not there: no {step!r} ({hint})")
    if isinstance(value, list):
        if re.fullmatch(r"-?\d{1,9}", step) and -len(value) <= int(step) < len(value):
            return value[int(step)]
        raise ValueError(f"column {path!r} is not there: a list of {len(value)} has no {step!r}")
    kind = "null" if value is None else type(value).__name__
    raise ValueError(f"column {path!r} is not there: {step!r} is asked of a value that has no parts ({kind})")


# ---- what would fit -----------------------------------------------------------------------------------------

SYNONYMS: dict[str, tuple[str, ...]] = {
    "prompt": (
        "prompt", "question", "instruction", "query", "input", "context", "request", "user", "human", "problem", "ask",
        "source", "post", "x", "prefix", "q",
    ),
    "chosen": (
        "chosen", "preferred", "winner", "win", "better", "best", "accepted", "good", "positive", "pos", "response_j",
        "preferred_output", "preferred_response", "chosen_response", "response_chosen", "answer_chosen", "y_w", "w",
    ),
    "rejected": (
        "rejected", "dispreferred", "loser", "lose", "worse", "worst", "bad", "negative", "neg", "response_k",
        "non_preferred_output", "rejected_response", "response_rejected", "answer_rejected", "y_l", "l", "unpreferred",
    ),
    "completions": ("completions", "responses", "answers", "outputs", "candidates", "generations", "samples"),
    "rewards": ("rewards", "scores", "ratings", "labels", "ranks", "values"),
    "completion": (
        "completion", "response", "answer", "output", "reply", "target", "assistant", "generation", "solution", "bot",
        "text", "y", "a",
    ),
    "label": ("label", "verdict", "thumbs_up", "thumbs", "is_good", "good", "liked", "kto_tag", "desirable", "accepted"),
    "rating": ("rating", "score", "reward", "overall_score", "overall", "quality", "helpfulness", "stars"),
    "messages": ("messages", "conversation", "conversations", "dialogue", "dialog", "chat", "turns"),
}  # fmt: skip
"""What the columns are called elsewhere, the most usual names first."""

SHAPES = (
    ("prompt", "chosen", "rejected"),
    ("prompt", "completions", "rewards"),
    ("prompt", "completion", "label"),
    ("prompt", "completion", "rating"),
    ("prompt", "completion"),
    ("messages",),
    ("chosen", "rejected"),
)
"""What to look for, in this order."""


def suggested(row: Row) -> str:
    """The first mapping that makes one of `SHAPES` of the row, as an option to paste; empty where none is found."""
    paths = dict(_paths(row))
    for shape in SHAPES:
        found: dict[str, str] = {}
        for name in shape:
            free = {path: value for path, value in paths.items() if path not in found.values()}
            likely = _likely(name, free)
            if likely is None:
                break
            found[name] = likely
        else:
            new = [shlex.quote(f"{name}={path}") for name, path in found.items() if path != name]
            return "--columns " + " ".join(new) if new else ""
    return ""


def _paths(row: Row, before: str = "", depth: int = 3) -> Iterator[tuple[str, Any]]:
    """Every column and, inside objects, every value by its path."""
    for name, value in row.items():
        yield f"{before}{name}", value
        if isinstance(value, dict) and depth > 1:
            yield from _paths(value, f"{before}{name}.", depth - 1)


def _likely(name: str, paths: Row) -> str | None:
    """The path whose last name means `name`, has a word that does, or is like one, and whose value can be that."""
    leaves = {path: re.sub(r"[\s-]+", "_", path.rpartition(".")[2].strip().lower()) for path in paths}
    fit = {path: leaf for path, leaf in leaves.items() if FITS[name](paths[path])}
    for synonym in SYNONYMS[name]:
        for path, leaf in fit.items():
            if leaf == synonym:
                return path
    for synonym in SYNONYMS[name]:
        for path, leaf in fit.items():
            if synonym in leaf.split("_"):
                return path
    for synonym in SYNONYMS[name][:6]:
        near = get_close_matches(synonym, list(fit.values()), n=1, cutoff=0.75)
        if near:
            return next(path for path, leaf in fit.items() if leaf == near[0])
    return None


def _text(value: Any) -> bool:
    return isinstance(value, str) or (bool(value) and isinstance(value, list) and isinstance(value[0], dict))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


FITS = dict.fromkeys(("prompt", "chosen", "rejected", "completion"), _text) | {
    "completions": lambda value: isinstance(value, list) and all(_text(each) for each in value),
    "rewards": lambda value: isinstance(value, list) and all(_number(each) for each in value),
    "label": lambda value: isinstance(value, bool) or str(value).lower() in ("true", "false", "0", "1"),
    "rating": _number,
    "messages": lambda value: _text(value) and not isinstance(value, str),
}
"""Whether a value can be what a column holds."""
