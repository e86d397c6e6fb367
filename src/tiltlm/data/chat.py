"""Conversations as text: a prompt and its completions through the tokenizer's own chat template.

With T the template, P0 = T(messages, opening the assistant's turn) and A_k = T(messages + answer k),

    prompt         the longest common beginning of P0 and of all A_k
    completion k   what A_k has behind it, up to the end of the assistant's turn

so prompt + completion is the template's own text, for all answers of a row alike: also where P0 opens a thought
(`<think>`) with which an answer does not begin. P0 bounds the prompt, so what the answers merely share stays theirs. A
prompt never ends inside a token of the tokenizer's own (`<think>`), nor before the end of the last message it holds:
a template that rewrites what stands there once an answer follows is refused.

The end of turn is not part of a completion: whoever encodes writes it, once (`models/ends.py`, `data/encoding.py`). A
begin-of-text token at the start is left out where the tokenizer adds its own: the text is made to be tokenized like any
other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tiltlm.data.hh import agreeing
from tiltlm.models.templates import Message, Talk, Template, Tools, parts_of

__all__ = ["Message", "asked_in", "is_messages", "opened", "rendered", "tools_in", "unwritten"]

MEDIA = ("images", "videos", "audios")
"""Columns in which what belongs to messages is not text."""


def is_messages(value: Any) -> bool:
    """Whether a value is a list of {role, content} rather than text."""
    found = isinstance(value, list) and bool(value)
    return found and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)


def rendered(
    tokenizer: Any, prompt: Talk, answers: Sequence[Talk], tools: Tools | None = None
) -> tuple[str, list[str]]:
    """(text of the prompt, text that each answer adds to it), by the rule above.

    tools: what the model may call, as the template takes it. Raises ValueError without a tokenizer or template, for
    messages that it refuses, for tool calls that it does not write, and where it rewrites the prompt.
    """
    template = Template(tokenizer, tools)
    if not prompt:
        raise ValueError("no message stands before the answer, so there is no prompt")
    talks = [[*prompt, *answer] for answer in answers]
    form = template.form([prompt, *talks])
    start = template.write(form(prompt), opening=True)
    texts = [_with_calls(template, form(talk)) for talk in talks]
    at = len(start)
    if not all(text.startswith(start) for text in texts):
        at = _agreement(template, [start, *texts])
        if at < _agreement(template, [start, template.write(form(prompt))]):
            raise ValueError(_rewritten(at, start, texts))
    return _without_bos(tokenizer, start[:at]), [template.without_end(text[at:]) for text in texts]


def opened(tokenizer: Any, prompt: Talk, tools: Tools | None = None) -> str:
    """The text that a model goes on from: the messages, and the opening of the assistant's turn. Raises as `rendered`."""
    template = Template(tokenizer, tools)
    return _without_bos(tokenizer, template.write(template.form([prompt])(prompt), opening=True))


def asked_in(row: dict[str, Any], where: str) -> Any:
    """What a row asks for an answer to: its `prompt`, its `messages` without the answer that they may end in, or its
    `question`.

    Raises ValueError naming the place `where`, where it has none of them.
    """
    if "prompt" in row:
        return row["prompt"]
    if "question" in row and "messages" not in row:
        return row["question"]
    messages = row.get("messages", [])
    if not is_messages(messages):
        raise ValueError(f"{where}: column 'prompt' is missing; this line has {', '.join(row) or 'nothing'}")
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def unwritten(tokenizer: Any, prompt: Talk, text: str, tools: Tools | None = None) -> tuple[str, ...]:
    """What the template left out of a prompt's `text`, in words: tools, or messages by a role that it does not know."""
    lost = [
        k for k, message in enumerate(prompt)
        if message["role"] != "assistant" and any(part.strip() not in text for part in parts_of(message))
    ]  # fmt: skip
    if not lost and not tools:
        return ()
    template, said = Template(tokenizer, tools), []
    talk = template.form([prompt])(prompt)
    written = template.write(talk)
    if tools and written == template.write(talk, tools=False):
        said.append("tools left out, which the chat template does not write")
    for k in lost:
        if written == template.tried(talk[:k] + talk[k + 1 :]):
            said.append(f"messages by {prompt[k]['role']!r} left out, which the chat template does not write")
    return tuple(dict.fromkeys(said))


def tools_in(row: dict[str, Any]) -> Tools | None:
    """A row's tools; None where it names none. Raises ValueError for what is no list of objects, and for images."""
    for name in MEDIA:
        if row.get(name):
            raise ValueError(f"the row has {name}, and only text is read")
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"column 'tools' is text that is not JSON ({error})") from None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"column 'tools' must be a list of objects; it is {type(tools).__name__}")
    return tools or None


def _with_calls(template: Template, talk: Talk) -> str:
    """The text of messages. Raises ValueError where the template leaves out the tools that they call."""
    text = template.write(talk)
    silent = [{name: value for name, value in message.items() if name != "tool_calls"} for message in talk]
    if any(message.get("tool_calls") for message in talk) and template.tried(silent) == text:
        raise ValueError(
            "the chat template does not write tool calls, and a message makes some: name another tokenizer"
        )
    return text


# ---- where prompt and answer meet ----


def _agreement(template: Template, texts: Sequence[str]) -> int:
    """How many characters all texts begin with alike, without those of a token that not all of them go on with."""
    at = agreeing(min(texts), max(texts))
    while begins := [
        k for text in texts for token in template.own_tokens if (k := _astride(text, token, at)) >= 0
    ]:
        at = min(begins)
    return at


def _astride(text: str, token: str, at: int) -> int:
    """Where the `token` begins that stands on both sides of place `at`; -1 if none does."""
    return text.find(token, max(0, at - len(token) + 1), at + len(token) - 1)


def _rewritten(at: int, start: str, texts: Sequence[str]) -> str:
    begin = max(0, at - 20)
    other = next(text for text in texts if not text.startswith(start))
    return (
        "the chat template rewrites the prompt once an answer follows: "
        f"{start[begin : begin + 60]!r} is not the beginning of what it makes of it then, {other[begin : begin + 60]!r}"
    )


def _without_bos(tokenizer: Any, text: str) -> str:
    bos = tokenizer.bos_token
    doubled = bool(bos) and text.startswith(bos) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if doubled else text
