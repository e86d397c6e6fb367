"""How a prompt is put to a model: its first tokens alone, and a template around its text.

A reward is asked about the bare prompt, the model goes on from the worded one. Messages have a template of their own, the
tokenizer's, and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tiltlm.data.asked import Asked
from tiltlm.data.chat import is_messages

PLACE = "{prompt}"

TEMPLATES = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Response:"
    ),
    "tulu": "<user>\n{prompt}\n<assistant>\n",
}
"""Templates by name: Stanford Alpaca's for an instruction without input, and Tulu's."""


@dataclass(frozen=True)
class Wording:
    """template: a text with {prompt} in it, or one of `TEMPLATES` (empty: the prompt as it is). tokens: how many of a
    prompt's tokens are kept, the first ones (0: all)."""

    template: str = ""
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(
                f"prompt-tokens is how many of a prompt's first tokens are kept, or 0; got {self.tokens}"
            )
        if self.template and self.text.count(PLACE) != 1:
            known = ", ".join(TEMPLATES)
            raise ValueError(
                f"a template is a text with {PLACE} in it, once, or one of {known}; got {self.template!r}"
            )

    def cut(self, row: Asked, tokenizer: Any) -> Asked:
        """The bare prompt: the first tokens of a text, or of a list of ids."""
        if not self.tokens or is_messages(row.prompt):
            return row
        if not isinstance(row.prompt, str):
            return replace(row, prompt=row.prompt[: self.tokens])
        ids = list(tokenizer(row.prompt)["input_ids"])[: self.tokens]
        return replace(row, prompt=tokenizer.decode(ids, skip_special_tokens=True) if self.template else ids)

    def around(self, row: Asked) -> Asked:
        """A bare prompt in its template, where it is a text."""
        return replace(row, prompt=self.said(row.prompt)) if isinstance(row.prompt, str) else row

    def said(self, prompt: str) -> str:
        """The text of a bare prompt in its template."""
        return self.text.replace(PLACE, prompt) if self.template else prompt

    @property
    def text(self) -> str:
        """The template itself."""
        return TEMPLATES.get(self.template, self.template)
