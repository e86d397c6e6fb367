"""The community's columns: what a row is, told by what it has; text, or messages written as text by a chat template.

| columns | becomes |
|---|---|
| prompt, chosen, rejected | a pair |
| chosen, rejected | a pair; what both begin with is the prompt |
| prompt, completions, rewards (or scores) | a group |
| prompt, scores_texts: [[score, prompt + completion], …] | a group |
| prompt, completion, rating | a rated answer: those of one prompt make a group |
| prompt, completion | an example; a verdict, where a column label says true or false |
| messages | an example (or a verdict); the last answer of the assistant is the completion |
| prompt, chosen | an example |

The first line whose columns a row has decides; other columns are left out (a pair keeps a numeric `margin`). Wherever text
may stand, so may messages; `tools` beside them are handed to the template too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tiltlm.data.chat import Message, is_messages, rendered, tools_in, unwritten
from tiltlm.data.hh import Dropped, agreeing
from tiltlm.data.mapping import suggested

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
    hint = _fitting(row) or "; say which is which: --columns prompt=… completion=… (of a task: --task.columns)"
    raise ValueError(f"the columns {', '.join(row) or '(none)'} are none of those known: {known}{hint}")


def _fitting(row: Row) -> str:
    """Words that offer the mapping of columns which would fit; none where there is none."""
    fit = suggested(row)
    return f"; would this fit? {fit} (of a task: --task.columns …)" if fit else ""


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
        return Dropped(BLANK)
    margin = {"margin": _numbers([row["margin"]], "margin")[0]} if "margin" in row else {}
    return Kept({"prompt": prompt, "chosen": chosen, "rejected": rejected} | margin)


def example(prompt: str, completion: str, row: Row | None = None) -> Kept | Dropped:
    """A prompt with its completion, unless that is blank, and the verdict of a `label` in `row`."""
    label = TRUTH.get(str((row or {}).get("label")).lower())
    verdict = {} if label is None else {"label": label}
    return Kept({"prompt": prompt, "completion": completion} | verdict) if completion.strip() else Dropped(BLANK)


BLANK = "blank response"
TRUTH = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
"""What a label says of an answer: wanted or not. Any other label (a class, say) is no verdict and is left out."""


LATER = ("later turns left out",)


def _explicit_pair(row: Row, tokenizer: Any) -> Kept | Dropped:
    sides = [row["chosen"], row["rejected"]]
    if all(is_messages(s) and s[0]["role"] != "assistant" for s in sides):
        return _implicit_pair(row, tokenizer)  # whole conversations: they hold the prompt themselves
    prompt, (chosen, rejected), notes = _written(row, row["prompt"], sides, tokenizer)
    return _noted(pair(prompt, chosen, rejected, row), notes)


def _implicit_pair(row: Row, tokenizer: Any) -> Kept | Dropped:
    chosen, rejected = row["chosen"], row["rejected"]
    if not (is_messages(chosen) and is_messages(rejected)):
        return _shared_text(text(row, "chosen"), text(row, "rejected"), row)
    chosen, rejected = _messages(chosen, "assistant"), _messages(rejected, "assistant")
    at = agreeing(chosen, rejected)
    if at == len(chosen) == len(rejected):
        return Dropped("identical sides")
    if at in (len(chosen), len(rejected)):
        return Dropped("one side continues the other")
    if not chosen[at]["role"] == rejected[at]["role"] == "assistant":
        return Dropped("first difference is not two assistant turns")
    prompt, (good, bad), notes = _written(row, chosen[:at], [chosen[at:], rejected[at:]], tokenizer)
    return _noted(pair(prompt, good, bad, row), notes)


def _shared_text(chosen: str, rejected: str, row: Row) -> Kept | Dropped:
    """Two whole texts: the prompt ends before the last blank of what they share, so that no word is cut."""
    if chosen == rejected:
        return Dropped("identical sides")
    cut = re.search(r"\s\S*\Z", chosen[: agreeing(chosen, rejected)])
    if cut is None or not chosen[: cut.start()].strip():
        raise ValueError(
            "there is no column prompt, and chosen and rejected do not begin with the same words" + _fitting(row)
        )
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
    prompt, completions, notes = _written(row, row["prompt"], row["completions"], tokenizer)
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
    prompt, (completion,), notes = _written(
        row, row["prompt"], [row.get("completion", row.get("chosen"))], tokenizer
    )
    return _noted(example(prompt, completion, row), notes)


def _rated(row: Row, tokenizer: Any) -> Kept | Dropped:
    prompt, (completion,), notes = _written(row, row["prompt"], [row["completion"]], tokenizer)
    return Kept({"prompt": prompt, "completion": completion, "rating": number(row["rating"], "rating")}, notes)


def _conversation(row: Row, tokenizer: Any) -> Kept | Dropped:
    messages = row["messages"]
    if not is_messages(messages):
        raise ValueError(f"messages must be a list of {{role, content}}; it is {_kind(messages)}")
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise ValueError("messages must hold an answer by the role 'assistant', and something before it")
    prompt, (completion,), notes = _written(row, messages[: answers[-1]], [messages[answers[-1] :]], tokenizer)
    return _noted(example(prompt, completion, row), notes)


RULES: dict[tuple[str, ...], Callable[[Row, Any], Kept | Dropped]] = {
    ("prompt", "chosen", "rejected"): _explicit_pair,
    ("chosen", "rejected"): _implicit_pair,
    ("prompt", "completions", "rewards"): _group,
    ("prompt", "completions", "scores"): _group,
    ("prompt", "scores_texts"): _scored_texts,
    ("prompt", "completion", "rating"): _rated,
    ("prompt", "completion"): _example,
    ("messages",): _conversation,
    ("prompt", "chosen"): _example,
}
"""Columns -> what a row that has them is."""


def _written(
    row: Row, prompt: Any, answers: Sequence[Any], tokenizer: Any
) -> tuple[str, list[str], tuple[str, ...]]:
    """Prompt and answers of a row as text, and notes: an answer that went on after the assistant's first turn, and what the
    template left out."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return prompt, list(answers), ()
    asked = [] if prompt == [] else _messages(prompt, "user")
    sides = [_messages(answer, "assistant") for answer in answers]
    if any(side[0]["role"] != "assistant" for side in sides):
        raise ValueError(f"an answer must begin with the role 'assistant'; got {sides[0][0]['role']!r}")
    tools = tools_in(row)
    start, texts = rendered(tokenizer, asked, [side[:1] for side in sides], tools)
    later = LATER if any(len(side) > 1 for side in sides) else ()
    return start, texts, (*later, *unwritten(tokenizer, asked, start, tools))


def _messages(value: Any, role: str) -> list[Message]:
    """Messages, without what has no value in them; text as one message of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    found = [value] if isinstance(value, dict) else value
    if not is_messages(found):
        raise ValueError(f"prompts and answers are text or lists of {{role, content}}; got {_kind(value)}")
    return [{name: x for name, x in message.items() if x is not None} for message in found]


def _noted(made: Kept | Dropped, notes: tuple[str, ...]) -> Kept | Dropped:
    return made if isinstance(made, Dropped) else Kept(made.row, (*made.notes, *notes))


LARGEST = sys.float_info.max


def _numbers(values: Sequence[Any], name: str) -> list[float]:
    return [number(value, name) for value in values]


def number(value: Any, name: str) -> float:
    """A finite number, also one written as text (csv knows nothing else). Raises ValueError naming the column."""
    found = float(value) if isinstance(value, str) and NUMBER.fullmatch(value.strip()) else value
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not -LARGE < found < LARGE:
        raise ValueError(f"{name} must be finite numbers; got {value!r}")
    return found


LARGE = 1e38
"""Beyond this, a number has no place among those of float32."""

NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} ({str(value)[:40]!r})"
