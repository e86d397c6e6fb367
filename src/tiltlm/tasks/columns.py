"""The community's columns: what a row is, told by what it has; text, or messages written as text by a chat template.

| columns | becomes |
|---|---|
| prompt, chosen, rejected | a pair |
| chosen, rejected | a pair; what both begin with is the prompt |
| prompt, completions, rewards (or scores) | a group |
| prompt, scores_texts: [[score, prompt + completion], …] | a group |
| prompt, completion | an example, unless a column label says false |
| messages | an example; the last answer of the assistant is the completion |
| prompt, chosen | an example |

The first line whose columns a row has decides; other columns are left out (a pair keeps a numeric `margin`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tiltlm.tasks.chat import Message, is_messages, rendered
from tiltlm.tasks.hh import Dropped, agreeing

Row = dict[str, Any]


class Kept(NamedTuple):
    """A row in one of the three shapes, and what was done to it that is worth counting."""

    row: Row
    notes: tuple[str, ...] = ()


def recognised(row: Row, tokenizer: Any) -> Kept | Dropped:
    """The row in one of the three shapes, by its columns. Raises ValueError where none fits."""
    for columns, make in RULES.items():
        if all(name in row for name in columns):
            return make(row, tokenizer)
    known = "; ".join(", ".join(columns) for columns in RULES)
    raise ValueError(f"the columns {', '.join(row) or '(none)'} are none of those known: {known}")


def text(row: Row, name: str) -> str:
    """The text in a column. Raises ValueError where the column is missing or holds something else."""
    if name not in row:
        raise ValueError(f"column {name!r} is missing; this row has {', '.join(row) or 'nothing'}")
    if not isinstance(row[name], str):
        raise ValueError(f"column {name!r} must be text; it is {_kind(row[name])}")
    return row[name]


def pair(prompt: str, chosen: str, rejected: str, row: Row) -> Kept | Dropped:
    """A pair with the margin of `row`, if it has one; dropped where it states no preference between responses."""
    if chosen == rejected:
        return Dropped("identical sides")
    if not (chosen.strip() and rejected.strip()):
        return Dropped("blank response")
    margin = {"margin": _numbers([row["margin"]], "margin")[0]} if "margin" in row else {}
    return Kept({"prompt": prompt, "chosen": chosen, "rejected": rejected} | margin)


def example(prompt: str, completion: str) -> Kept | Dropped:
    """A prompt with its completion, unless that is blank."""
    return Kept({"prompt": prompt, "completion": completion}) if completion.strip() else Dropped("blank response")


LATER = ("later turns left out",)


def _explicit_pair(row: Row, tokenizer: Any) -> Kept | Dropped:
    sides = [row["chosen"], row["rejected"]]
    if isinstance(row["prompt"], str) and all(is_messages(s) and s[0]["role"] != "assistant" for s in sides):
        return _implicit_pair(row, tokenizer)  # whole conversations: they hold the prompt themselves
    prompt, (chosen, rejected), notes = _written(row["prompt"], sides, tokenizer)
    return _noted(pair(prompt, chosen, rejected, row), notes)


def _implicit_pair(row: Row, tokenizer: Any) -> Kept | Dropped:
    chosen, rejected = row["chosen"], row["rejected"]
    if not (is_messages(chosen) and is_messages(rejected)):
        return _shared_text(text(row, "chosen"), text(row, "rejected"), row)
    at = agreeing(chosen, rejected)
    if at == len(chosen) == len(rejected):
        return Dropped("identical sides")
    if at in (len(chosen), len(rejected)):
        return Dropped("one side continues the other")
    if not chosen[at]["role"] == rejected[at]["role"] == "assistant":
        return Dropped("first difference is not two assistant turns")
    prompt, (good, bad), notes = _written(chosen[:at], [chosen[at:], rejected[at:]], tokenizer)
    return _noted(pair(prompt, good, bad, row), notes)


def _shared_text(chosen: str, rejected: str, row: Row) -> Kept | Dropped:
    """Two whole texts: the prompt ends before the last blank of what they share, so that no word is cut."""
    if chosen == rejected:
        return Dropped("identical sides")
    cut = re.search(r"\s\S*\Z", chosen[: agreeing(chosen, rejected)])
    if cut is None or not chosen[: cut.start()].strip():
        raise ValueError("there is no column prompt, and chosen and rejected do not begin with the same words")
    at = cut.start()
    return _noted(pair(chosen[:at], chosen[at:], rejected[at:], row), ("prompt is what both texts begin with",))


def _group(row: Row, tokenizer: Any) -> Kept | Dropped:
    name = "rewards" if "rewards" in row else "scores"
    if not isinstance(row["completions"], list) or not isinstance(row[name], list):
        raise ValueError(
            f"completions and {name} must be lists; they are {_kind(row['completions'])}, {_kind(row[name])}"
        )
    rewards = _numbers(row[name], name)
    if len(rewards) != len(row["completions"]):
        raise ValueError(f"{len(row['completions'])} completions have {len(rewards)} {name}: one each is needed")
    if len(rewards) < 2:
        return Dropped("fewer than two completions")
    prompt, completions, notes = _written(row["prompt"], row["completions"], tokenizer)
    return Kept({"prompt": prompt, "completions": completions, "rewards": rewards, **_ends(row)}, notes)


def _ends(row: Row) -> Row:
    """`finished` of a group: which completions ended by themselves; what was cut off must not be taught to end."""
    if "finished" not in row:
        return {}
    found, n = row["finished"], len(row["completions"])
    if not isinstance(found, list) or len(found) != n or not all(x in (True, False) for x in found):
        raise ValueError(f"finished must say true or false of each of the {n} completions; got {found}")
    return {"finished": [bool(x) for x in found]}


def _scored_texts(row: Row, tokenizer: Any) -> Kept | Dropped:
    prompt, found = text(row, "prompt"), row["scores_texts"]
    if not isinstance(found, list) or not all(isinstance(x, list) and len(x) == 2 for x in found):
        raise ValueError("scores_texts must be a list like [[score, prompt and completion], …]")
    if not all(isinstance(whole, str) and whole.startswith(prompt) for _, whole in found):
        raise ValueError("every text of scores_texts must begin with the row's prompt")
    completions = [whole.removeprefix(prompt) for _, whole in found]
    return _group({"prompt": prompt, "completions": completions, "rewards": [x for x, _ in found]}, tokenizer)


def _example(row: Row, tokenizer: Any) -> Kept | Dropped:
    if str(row.get("label")).lower() == "false":  # an unwanted answer must not become one to imitate
        return Dropped("label is false")
    prompt, (completion,), notes = _written(row["prompt"], [row.get("completion", row.get("chosen"))], tokenizer)
    return _noted(example(prompt, completion), notes)


def _conversation(row: Row, tokenizer: Any) -> Kept | Dropped:
    messages = row["messages"]
    if not is_messages(messages):
        raise ValueError(f"messages must be a list of {{role, content}}; it is {_kind(messages)}")
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise ValueError("messages must hold an answer by the role 'assistant', and something before it")
    prompt, (completion,), notes = _written(messages[: answers[-1]], [messages[answers[-1] :]], tokenizer)
    return _noted(example(prompt, completion), notes)


RULES: dict[tuple[str, ...], Callable[[Row, Any], Kept | Dropped]] = {
    ("prompt", "chosen", "rejected"): _explicit_pair,
    ("chosen", "rejected"): _implicit_pair,
    ("prompt", "completions", "rewards"): _group,
    ("prompt", "completions", "scores"): _group,
    ("prompt", "scores_texts"): _scored_texts,
    ("prompt", "completion"): _example,
    ("messages",): _conversation,
    ("prompt", "chosen"): _example,
}
"""Columns -> what a row that has them is."""


def _written(prompt: Any, answers: Sequence[Any], tokenizer: Any) -> tuple[str, list[str], tuple[str, ...]]:
    """Prompt and answers as text, and a note if an answer went on after the assistant's first turn."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return prompt, list(answers), ()
    sides = [_messages(answer, "assistant") for answer in answers]
    if any(side[0]["role"] != "assistant" for side in sides):
        raise ValueError(f"an answer must begin with the role 'assistant'; got {sides[0][0]['role']!r}")
    start, texts = rendered(tokenizer, _messages(prompt, "user"), [side[:1] for side in sides])
    return start, texts, LATER if any(len(side) > 1 for side in sides) else ()


def _messages(value: Any, role: str) -> list[Message]:
    """A list of messages as it is; text as one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not is_messages(value):
        raise ValueError(f"prompts and answers are text or lists of {{role, content}}; got {_kind(value)}")
    return value


def _noted(made: Kept | Dropped, notes: tuple[str, ...]) -> Kept | Dropped:
    return made if isinstance(made, Dropped) else Kept(made.row, (*made.notes, *notes))


LARGEST = sys.float_info.max


def _numbers(values: Sequence[Any], name: str) -> list[float]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
            raise ValueError(f"{name} must be finite numbers; got {value!r}")
    return list(values)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({str(value)[:40]!r})"
