"""Conversations as text: a prompt and a completion through the tokenizer's own chat template.

With T the template, the prompt is T(messages, opening the assistant's turn) and the completion what
T(messages + answer) adds to it, without the end-of-text token at its end (whoever tokenizes adds that to finished
completions). A begin-of-text token at the start is left out where the tokenizer adds its own: the text is made to be
tokenized like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, str]


def is_messages(value: Any) -> bool:
    """Whether a value is a list of {role, content} rather than text."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def rendered(
    tokenizer: Any, prompt: Sequence[Message], answers: Sequence[Sequence[Message]]
) -> tuple[str, list[str]]:
    """(text of the prompt, text that each answer adds to it).

    Raises ValueError without a tokenizer or template, for messages it refuses, and where it rewrites the prompt.
    """
    if tokenizer is None:
        raise ValueError("the row holds messages: name the tokenizer whose chat template writes them as text")
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template to write messages as text"
        )
    if not prompt:
        raise ValueError("no message stands before the answer, so there is no prompt")
    start = _applied(tokenizer, prompt, opening=True)
    texts = [_applied(tokenizer, [*prompt, *answer], opening=False) for answer in answers]
    for text in texts:
        if not text.startswith(start):
            raise ValueError(
                "the chat template rewrites the prompt once an answer follows: "
                f"{start[-60:]!r} is not the beginning of what follows it"
            )
    return _without_bos(tokenizer, start), [_without_eos(tokenizer, text[len(start) :]) for text in texts]


def _applied(tokenizer: Any, messages: Sequence[Message], opening: bool) -> str:
    from jinja2 import TemplateError

    for message in messages:
        if not isinstance(message.get("content"), str):
            kind = type(message.get("content")).__name__
            raise ValueError(f"the content of a message by {message['role']!r} must be text; it is {kind}")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opening))
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from None


def _without_eos(tokenizer: Any, text: str) -> str:
    """The text up to the end-of-text token at its end, if one stands there (a line break may follow it)."""
    eos, end = tokenizer.eos_token, text.rstrip()
    return end.removesuffix(eos) if eos and end.endswith(eos) else text


def _without_bos(tokenizer: Any, text: str) -> str:
    bos = tokenizer.bos_token
    doubled = bool(bos) and text.startswith(bos) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if doubled else text
