"""A tokenizer's chat template: what it writes for messages, what it can read, and how it ends the assistant's turn.

Messages reach it as they are: any role, tool calls, a row's tools. Two exceptions. Content that is null is not there at
all (transformers leaves it out). Content that is a list of text parts is handed over as such if the template reads parts
as it reads texts, and joined to one text otherwise; and text becomes a part for a template that reads nothing else.
Which it is is found out by writing one and the same conversation in both forms, and by looking for what was said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Message = dict[str, Any]
Talk = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]
Form = Callable[[Talk], list[Message]]

PROBE = "Quite so"
"""What the assistant says in the conversation on which a template is tried."""

TEXTS = ("text", "input_text", "output_text")
"""Types of parts that hold text."""


@dataclass(frozen=True)
class Template:
    """The chat template of `tokenizer`, given `tools`. Raises ValueError where there is none."""

    tokenizer: Any
    tools: Tools | None = None

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise ValueError("the row holds messages: name the tokenizer whose chat template writes them as text")
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template to write messages as text"
            )

    def write(self, talk: Talk, *, opening: bool = False, tools: bool = True) -> str:
        """The messages as text; with `opening`, also what begins the assistant's turn. Raises ValueError for messages that
        the template refuses."""
        from jinja2 import TemplateError

        given = list(self.tools) if tools and self.tools else None
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(talk), tools=given, tokenize=False, add_generation_prompt=opening
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from None

    def tried(self, talk: Talk) -> str:
        """`write`, and nothing where the template refuses."""
        try:
            return self.write(talk)
        except ValueError:
            return ""

    # ---- in which form contents are handed over ----

    def form(self, talks: Sequence[Talk]) -> Form:
        """How to hand over the contents of `talks`, all in the same way. Raises ValueError for what is no text."""
        parts = [part for talk in talks for message in talk for part in parts_of(message)]
        listed = any(isinstance(message.get("content"), list) for talk in talks for message in talk)
        if PROBE in self._by_text and not listed:
            return list
        by_part = self.tried(as_parts(TALK))
        if PROBE not in self._by_text and PROBE in by_part:
            return as_parts
        if by_part != self._by_text or PROBE not in by_part:
            return as_text
        written = "".join(self.tried(talk) for talk in talks)
        return list if all(part.strip() in written for part in parts) else as_text

    @cached_property
    def _by_text(self) -> str:
        return self.tried(TALK)

    # ---- the end of the assistant's turn ----

    @cached_property
    def own_tokens(self) -> list[str]:
        """Tokens that are no ordinary pieces of text: special ones, and those added to the vocabulary."""
        found = dict.fromkeys((*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()))
        return [token for token in found if token]

    @cached_property
    def tail(self) -> str:
        """Everything that is written behind an answer at the end of a conversation."""
        text = self._by_text if PROBE in self._by_text else self.tried(as_parts(TALK))
        return text.rpartition(PROBE)[2] if PROBE in text else ""

    @cached_property
    def end(self) -> str | None:
        """The first token of the tokenizer's own in `tail`; else `tail` without its blanks, if it is a single token."""
        found = [(self.tail.find(token), -len(token), token) for token in self.own_tokens if token in self.tail]
        if found:
            return min(found)[2]
        whole = self.tail.strip()
        number = self.tokenizer.convert_tokens_to_ids(whole) if whole else None
        return whole if number not in (None, self.tokenizer.unk_token_id) else None

    def without_end(self, text: str) -> str:
        """An answer's text up to the end of its turn. Where that is no token, all that the template writes there goes."""
        if self.end is None:
            return text.removesuffix(self.tail)
        body, found, rest = text.rpartition(self.end)
        return body if found and rest.strip() in ("", self.tail.partition(self.end)[2].strip()) else text


def end_of_turn(tokenizer: Any) -> str | None:
    """The token, as text, in which the template ends an assistant's turn; None without one, or without a template."""
    return Template(tokenizer).end if tokenizer is not None and tokenizer.chat_template else None


TALK = ({"role": "user", "content": "Is it?"}, {"role": "assistant", "content": PROBE})


def parts_of(message: Message) -> list[str]:
    """The texts of a message's content; none where it has none. Raises ValueError for anything else, by name."""
    content, who = message.get("content"), f"a message by {message['role']!r}"
    if content is None or isinstance(content, str):
        return [content] if content else []
    if not isinstance(content, list):
        raise ValueError(f"the content of {who} must be text; it is {_kind(content)}")
    return [_text_of(part, who) for part in content]


def _text_of(part: Any, who: str) -> str:
    """The text of a part. Raises ValueError for an image and its like, by name."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ValueError(f"the content of {who} must be text; it is list, and a part of that is {_kind(part)}")
    kind = part.get("type", "text")
    if kind not in TEXTS:
        raise ValueError(f"the content of {who} has a part of type {kind!r}, and only text is read")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"the content of {who} has a part without its text; it is {_kind(part)}")
    return str(part["text"])


def as_text(talk: Talk) -> list[Message]:
    """Lists of text parts joined to texts."""
    return [_with(message, "".join(parts_of(message)), list) for message in talk]


def as_parts(talk: Talk) -> list[Message]:
    """Texts as lists of one text part."""
    return [_with(message, [{"type": "text", "text": message.get("content")}], str) for message in talk]


def _with(message: Message, content: Any, instead_of: type) -> Message:
    return message | {"content": content} if isinstance(message.get("content"), instead_of) else message


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({str(value)[:40]!r})"
