"""Layouts that others post, told by their columns and put into the community's (`tiltlm.data.columns`).

| columns | becomes |
|---|---|
| conversations: [{from, value}, …] | messages; with chosen and rejected, the prompt of a pair |
| input: {messages, tools}, preferred_output, non_preferred_output | a pair of messages |
| question, response_j, response_k | a pair; magnitude is its margin, here as in every layout of a pair |
| prompt, response_0, response_1, better_response_id (or safer_response_id) | a pair |
| instruction, completions: [{response, overall_score}, …] | a group |
| instruction, input or question, with chosen and rejected | a pair |
| instruction, input, output; instruction, context, response; question, answer; prompt, response | an example |
| prompt, response, helpfulness; prompt, completion (or response), rating | a rated answer; those of a prompt are a group |

Columns like these name the *turns* of a conversation and hold bare texts. Where the tokenizer has a chat template, they are
messages (system, user, assistant); else system, question and answer stand on lines of their own. Texts in columns called
prompt, chosen, rejected and completion stay as they are, unless a column system stands beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tiltlm.data.chat import is_messages
from tiltlm.data.columns import number

Row = dict[str, Any]
Layout = Callable[[Row, Any], Row]
"""(row, tokenizer or None) -> the row in the community's columns."""

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "developer": "developer", "function": "function",
}  # fmt: skip
"""Who speaks in `from`, and the role that is."""

KEPT = ("margin", "label", "finished", "tools")
"""Columns that go along into whatever a row becomes."""


def in_known_columns(row: Row, tokenizer: Any) -> Row:
    """The row with the columns of the first layout whose columns it has; as it is, where none fits."""
    row = {name: _with_roles(value) for name, value in row.items()}
    for columns, layout in LAYOUTS.items():
        if all(name in row for name in columns):
            return layout(row, tokenizer)
    return row


def _with_roles(value: Any) -> Any:
    """A turn {from, value}, or a list of such, as messages {role, content}; anything else as it is."""
    if isinstance(value, dict) and {"from", "value"} <= value.keys():
        return [_message(value)]
    if (
        isinstance(value, list)
        and value
        and all(isinstance(x, dict) and {"from", "value"} <= x.keys() for x in value)
    ):
        return [_message(turn) for turn in value]
    return value


def _message(turn: Row) -> Row:
    speaker = str(turn["from"]).lower()
    if speaker not in SPEAKERS:
        raise ValueError(f"who speaks, where a turn is from {turn['from']!r}? Known: {', '.join(SPEAKERS)}")
    return {"role": SPEAKERS[speaker], "content": turn["value"]}


# ---- turns --------------------------------------------------------------------------------------------------


def turns(row: Row, tokenizer: Any, asked: Sequence[str], answers: dict[str, Any]) -> Row:
    """What the columns `asked` say, after a `system` column, and the answers: as messages where the tokenizer has a
    template or an answer is messages; else as lines, the last one ended by a line break."""
    said = [row[name] for name in asked if row.get(name) not in (None, "")]
    rest = {name: row[name] for name in KEPT if name in row} | answers
    system = row.get("system") or ""
    first = [{"role": "system", "content": system}] if system else []
    if len(said) == 1 and is_messages(said[0]):
        return {"prompt": [*first, *said[0]], **rest}
    if not all(isinstance(part, str) for part in (system, *said)):
        texts = ", ".join(("system", *asked))
        raise ValueError(
            f"the columns {texts} hold text; here they hold {[type(x).__name__ for x in (system, *said)]}"
        )
    templated = tokenizer is not None and bool(tokenizer.chat_template)
    if templated or any(is_messages(each) for each in _flat(answers)):
        return {"prompt": [*first, {"role": "user", "content": "\n".join(said)}], **rest}
    prompt = "\n".join([system, *said] if system else said)
    apart = prompt[-1:].isspace() or all(isinstance(x, str) and x[:1].isspace() for x in _flat(answers))
    return {"prompt": prompt if apart else prompt + "\n", **rest}


def _flat(answers: dict[str, Any]) -> list[Any]:
    """Every answer, those of a group one by one."""
    texts = [answers[name] for name in ("chosen", "rejected", "completion") if name in answers]
    group = answers.get("completions")
    return texts + (group if isinstance(group, list) else [])


def _answered(answer: str, *asked: str) -> Layout:
    """A layout of one answer, which stands in a column of its own."""
    return lambda row, tokenizer: turns(row, tokenizer, asked, {"completion": row[answer]})


def _chosen(*asked: str) -> Layout:
    """A layout with columns chosen and rejected."""

    def layout(row: Row, tokenizer: Any) -> Row:
        return _margined(row, turns(row, tokenizer, asked, {"chosen": row["chosen"], "rejected": row["rejected"]}))

    return layout


# ---- pairs --------------------------------------------------------------------------------------------------


def _as_it_is(row: Row, tokenizer: Any) -> Row:
    """prompt with chosen and rejected, or with a completion; texts only are put behind a system column."""
    answers: Row = {name: row[name] for name in ("chosen", "rejected", "completion") if name in row}
    if row.get("system") and all(isinstance(x, str) for x in (row["system"], row["prompt"], *answers.values())):
        return _margined(row, turns(row, tokenizer, ["prompt"], answers))
    return _margined(row, row)


def _margined(row: Row, made: Row) -> Row:
    """`made` with the row's magnitude, else the difference of score_chosen and score_rejected, as its margin; as it is
    where it has one, or there are no such numbers."""
    good, bad = row.get("score_chosen"), row.get("score_rejected")
    if "margin" not in made and "magnitude" in row:
        return made | {"margin": row["magnitude"]}
    if "margin" in made or not isinstance(good, (int, float)) or not isinstance(bad, (int, float)):
        return made
    return made | {"margin": good - bad}


def _conversation_pair(row: Row, tokenizer: Any) -> Row:
    return row | {"prompt": [*_system(row), *_messages(row, "conversations")]}


def _conversation(row: Row, tokenizer: Any) -> Row:
    return row | {"messages": [*_system(row), *_messages(row, "conversations")]}


def _system(row: Row) -> list[Row]:
    """A system column as the message that begins a conversation, unless that has one."""
    first = row["conversations"][0] if is_messages(row["conversations"]) else {}
    text = row.get("system") if first.get("role") != "system" else ""
    return [{"role": "system", "content": text}] if text else []


def _messages(row: Row, name: str) -> list[Row]:
    value: Any = row[name]
    if not is_messages(value):
        raise ValueError(
            f"{name} must be a list of {{from, value}} or of {{role, content}}; it is {type(value).__name__} "
            f"({str(value)[:40]!r})"
        )
    found: list[Row] = value
    return found


def _preferred_output(row: Row, tokenizer: Any) -> Row:
    asked = row["input"]
    if not isinstance(asked, dict) or "messages" not in asked:
        raise ValueError("input must be an object with the messages that are answered")
    tools = {"tools": asked["tools"]} if asked.get("tools") else {}
    sides = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return {"prompt": _messages(asked, "messages"), **sides, **tools}


def _better_and_worse(row: Row, tokenizer: Any) -> Row:
    sides = {"chosen": row["response_j"], "rejected": row["response_k"]}
    return _margined(row, turns(row, tokenizer, ["question"], sides))


def _numbered(which: str) -> Layout:
    """Two responses, and in the column `which` the number of the better one."""

    def layout(row: Row, tokenizer: Any) -> Row:
        better = number(row[which], which)
        if better not in (0, 1):
            raise ValueError(f"{which} is the number of a response, 0 or 1; got {row[which]!r}")
        sides = {"chosen": row[f"response_{int(better)}"], "rejected": row[f"response_{1 - int(better)}"]}
        return turns(row, tokenizer, ["prompt"], sides)

    return layout


# ---- groups, and answers of a group one by one --------------------------------------------------------------


def _scored_answers(row: Row, tokenizer: Any) -> Row:
    found = row["completions"]
    if "rewards" in row:  # mapped from elsewhere: completions are the answers themselves
        return turns(row, tokenizer, ["instruction"], {"completions": found, "rewards": row["rewards"]})
    needed = {"response", "overall_score"}
    if not isinstance(found, list) or not all(isinstance(each, dict) and needed <= each.keys() for each in found):
        raise ValueError(
            "completions must be a list of {response, overall_score}; for another score: "
            "--columns completions=completions.*.response rewards=completions.*.NAME"
        )
    answers = {"completions": [each["response"] for each in found]}
    return turns(row, tokenizer, ["instruction"], answers | {"rewards": [each["overall_score"] for each in found]})


def _rated(answer: str, rating: str) -> Layout:
    """A row a rated answer."""
    return lambda row, tokenizer: turns(
        row, tokenizer, ["prompt"], {"completion": row[answer], "rating": row[rating]}
    )


def _untouched(row: Row, tokenizer: Any) -> Row:
    return row


LAYOUTS: dict[tuple[str, ...], Layout] = {
    ("prompt", "chosen", "rejected"): _as_it_is,
    ("prompt", "completions", "rewards"): _untouched,
    ("prompt", "completions", "scores"): _untouched,
    ("prompt", "completion", "rating"): _untouched,
    ("prompt", "completion"): _as_it_is,
    ("conversations", "chosen", "rejected"): _conversation_pair,
    ("input", "preferred_output", "non_preferred_output"): _preferred_output,
    ("question", "response_j", "response_k"): _better_and_worse,
    ("prompt", "response_0", "response_1", "better_response_id"): _numbered("better_response_id"),
    ("prompt", "response_0", "response_1", "safer_response_id"): _numbered("safer_response_id"),
    ("instruction", "chosen", "rejected"): _chosen("instruction", "input"),
    ("question", "chosen", "rejected"): _chosen("question"),
    ("instruction", "completions"): _scored_answers,
    ("prompt", "response", "rating"): _rated("response", "rating"),
    ("prompt", "response", "helpfulness"): _rated("response", "helpfulness"),
    ("messages",): _untouched,
    ("conversations",): _conversation,
    ("instruction", "output"): _answered("output", "instruction", "input"),
    ("instruction", "response"): _answered("response", "instruction", "context", "input"),
    ("question", "response"): _answered("response", "question"),
    ("question", "answer"): _answered("answer", "question"),
    ("prompt", "response"): _answered("response", "prompt"),
}
"""Columns -> how a row that has them is put. The first that a row has decides."""
