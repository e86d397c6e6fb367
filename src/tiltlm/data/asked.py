"""Prompts of a file: rows with a `prompt` (text, messages or token ids) or `messages`, and their other columns.

Read are the files of `tables`, and .txt: a prompt a line, blank lines left out. `stories:200` are prompts of the project's
own making (`own_prompts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tiltlm.data.chat import asked_in, is_messages, opened, tools_in
from tiltlm.data.own_prompts import own_prompts
from tiltlm.data.tables import Placed, file_of, rows_of
from tiltlm.jsonl import open_text, reading

TALK = ("prompt", "messages", "tools")
"""Columns that a prompt is made of; the others are about it."""


@dataclass(frozen=True)
class Asked:
    """One prompt: where it stands, what is asked (text, messages or ids), the tools of its messages, its other columns."""

    where: str
    prompt: Any
    tools: Any
    about: Mapping[str, Any]


def read_prompts(source: str, split: str = "train") -> list[Asked]:
    """The prompts of a file, a folder or a hub data set. Raises FileNotFoundError and ValueError, naming the place, for
    what is not there, has no prompts, or cannot be one."""
    path = Path(source)
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    return list(_read(source, split, changed))


@cache
def _read(source: str, split: str, changed: int) -> tuple[Asked, ...]:
    """changed: when the file was written last; another one of its name is read again."""
    asked = tuple(_asked(where, row) for where, row in prompt_rows(source, split))
    if not asked:
        raise ValueError(f"{source} has no prompts: every row is one, with a column `prompt` or `messages`")
    return asked


def of_hub(source: str) -> bool:
    """Whether `source` can only be the name of a data set of the hub. Raises FileNotFoundError for a file that is gone."""
    return own_prompts(source) is None and Path(source).suffix != ".txt" and file_of(source) is None


def prompt_rows(source: str, split: str = "train") -> Iterable[Placed]:
    """(where, row) of every prompt of a source, as `read_prompts` takes it; rows are not looked into."""
    own, path = own_prompts(source), Path(source)
    if own is not None:
        return [(f"{source}[{k}]", {"prompt": text}) for k, text in enumerate(own)]
    return _lines(path) if path.suffix == ".txt" else rows_of(source, split)


def _lines(path: Path) -> Iterator[Placed]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with reading(path), open_text(path) as file:
        for k, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{k}", {"prompt": line.rstrip("\r\n")}


def _asked(where: str, row: dict[str, Any]) -> Asked:
    prompt = asked_in(row, where)
    ids = isinstance(prompt, list) and all(isinstance(i, int) for i in prompt)
    if not (isinstance(prompt, str) or is_messages(prompt) or ids):
        raise ValueError(
            f"{where}: a prompt is text, messages or a list of token ids; got {type(prompt).__name__}"
        )
    if not prompt:
        raise ValueError(f"{where}: the prompt is empty: a language model needs something to begin with")
    try:
        tools = tools_in(row) if is_messages(prompt) else None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return Asked(where, prompt, tools, {name: x for name, x in row.items() if name not in TALK})


def ids_of(asked: Sequence[Asked], tokenizer: Any, vocabulary: int, most: float) -> list[list[int]]:
    """Token ids of every prompt; messages as the chat template writes them, the assistant's turn opened.

    vocabulary: there are ids below it alone. most: tokens that a prompt may have. Raises ValueError naming the place.
    """
    found = []
    for each in asked:
        ids = _ids(each, tokenizer)
        bad = [i for i in ids if not 0 <= i < vocabulary]
        if bad:
            raise ValueError(f"{each.where}: token id {bad[0]} is outside the vocabulary (0 to {vocabulary - 1})")
        if not ids or len(ids) > most:
            held = f"the model holds {most:g} beside the completion" if ids else "it needs one to begin with"
            raise ValueError(f"{each.where}: the prompt has {len(ids)} tokens, and {held}")
        found.append(ids)
    return found


def _ids(each: Asked, tokenizer: Any) -> list[int]:
    text = each.prompt
    if is_messages(text):
        try:
            text = opened(tokenizer, text, each.tools)
        except ValueError as error:
            raise ValueError(f"{each.where}: {error}") from None
    if isinstance(text, list):
        return text
    if tokenizer is None:
        raise ValueError(f"{each.where} is text, but the model's folder has no tokenizer: give token ids instead")
    return list(tokenizer(text)["input_ids"])
