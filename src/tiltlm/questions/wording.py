"""How a question is put to a model: instructions, options, a chat's turns, and hints.

The letters' instructions are those of OpenAI's simple-evals, as the original STaR on MMLU has them. A question's prompt has
one begin-of-text token, where its tokenizer has one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Any, Literal

from tiltlm.data.chat import opened
from tiltlm.jsonl import open_text, reading
from tiltlm.mistakes import nearest
from tiltlm.questions.base import Question

TEMPLATES = {
    "letters": (
        "Answer the following multiple choice question. The last line of your response should be of the following format: "
        "'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. {meta}\n\n{question}\n\n{choices}"
    ),
    "numbers": (
        "Solve the following problem. The last line of your response should be of the following format: '#### $NUMBER' "
        "(without quotes) where NUMBER is the answer. {meta}\n\n{question}"
    ),
    "short": "{question}\n{choices}\nAnswer:",
}
"""Templates by name."""

METAS = {
    "default": "Think step by step before answering.",
    "english": "Think step by step in English before answering.",
    "translate": (
        "Translate the question and answers to English to begin with, and think step by step before answering."
    ),
}
"""How to think about a question, by name: as one likes, in English, or after translating it."""

PLACES = re.compile(r"\{(question|choices|letters|meta)\}")

BARE = (
    "<|begin_of_text|>{system}<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
BARE_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
"""Llama 3's headers alone, without the dates that its chat template adds."""


@dataclass(frozen=True)
class Asking:
    """How a question is put to a model."""

    template: str = ""
    """letters, numbers or short; a text with {question}, and {choices}, {letters} and {meta} where they belong; or a file
    that ends in .txt with such a text (empty: letters where a question has options, else numbers)."""

    meta: str = "default"
    """How to think about it: default, english, translate, or a sentence of yours (empty: nothing is said)."""

    system: str = "You are a helpful assistant"
    """The chat's message by the system (empty: none)."""

    chat: Literal["auto", "bare", "none"] = "auto"
    """auto: by the tokenizer's chat template, where it has one, else as plain text. bare: Llama 3's headers alone. none:
    plain text."""

    hint: Literal["mark", "answer"] = "mark"
    """How a hint tells the answer: ' (CORRECT)' behind the right option, or the answer behind the question."""

    def __post_init__(self) -> None:
        if self.meta and self.meta not in METAS and " " not in self.meta.strip():
            raise ValueError(
                f"meta is a sentence, or one of {', '.join(METAS)}; got {self.meta!r}.{nearest(self.meta, METAS)}"
            )
        if self.template and not self.file and self.template not in TEMPLATES:
            self._checked(self.template)

    @property
    def file(self) -> str:
        """The file that the template is in; empty where it is in none."""
        return self.template if self.template.endswith(".txt") else ""

    def put(self, question: Question, tokenizer: Any, hint: bool = False) -> list[int]:
        """The prompt as token ids; hint: it tells the answer. Raises ValueError, naming the question, where the template
        or the tokenizer cannot put it."""
        try:
            ids = self._ids(self.said(question, hint), tokenizer)
            if ids[:2] == [tokenizer.bos_token_id] * 2:
                raise ValueError("the prompt begins with two begin-of-text tokens: leave the template's own out")
        except ValueError as error:
            raise ValueError(f"question {question.index}: {error}") from None
        return ids

    def said(self, question: Question, hint: bool = False) -> str:
        """What the user says. Raises ValueError for a template without a place for what the question has."""
        template = self.template or ("letters" if question.choices else "numbers")
        text = TEMPLATES.get(template) or self._checked(_written(self.file) if self.file else template)
        if question.choices and "{choices}" not in text:
            raise ValueError("the question has options, and the template has no {choices} for them")
        meta = METAS.get(self.meta, self.meta)
        marked = hint and self.hint == "mark" and bool(question.choices)
        told = f" (the answer is {question.hint or question.answer})" if hint and not marked else ""
        values = {
            "question": question.text + told, "choices": options(question, marked), "meta": meta,
            "letters": LETTERS[: len(question.choices)],
        }  # fmt: skip
        return PLACES.sub(lambda found: values[found[1]], text if meta else text.replace(" {meta}", ""))

    def _checked(self, text: str) -> str:
        if text.count("{question}") != 1:
            raise ValueError(
                "a template is a text with {question} in it, once, a file of one that ends in .txt, or one of "
                f"{', '.join(TEMPLATES)}; got {text[:60]!r}"
            )
        return text

    def _ids(self, text: str, tokenizer: Any) -> list[int]:
        if self.chat == "bare":
            return self._bare(text, tokenizer)
        if self.chat == "auto" and tokenizer.chat_template:
            talk = [{"role": "system", "content": self.system}] if self.system else []
            text = opened(tokenizer, [*talk, {"role": "user", "content": text}])
        return list(tokenizer(text)["input_ids"])

    def _bare(self, text: str, tokenizer: Any) -> list[int]:
        if "<|eot_id|>" not in tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} does not know Llama 3's headers: take --task.chat auto"
            )
        system = BARE_SYSTEM.format(system=self.system) if self.system else ""
        # the headers have the begin-of-text token themselves
        return list(tokenizer(BARE.format(system=system, user=text), add_special_tokens=False)["input_ids"])


def options(question: Question, marked: bool = False) -> str:
    """The options, a line each; marked: the right one is."""
    lines = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    if marked:
        lines = [line + " (CORRECT)" * line.startswith(f"{question.answer})") for line in lines]
    return "\n".join(lines)


def _written(file: str) -> str:
    """The template in a file, without the line's end that editors put behind it."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file}: no such file, and a template that ends in .txt is one")
    with reading(path), open_text(path) as opened_file:
        return opened_file.read().removesuffix("\n")
