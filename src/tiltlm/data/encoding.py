"""Texts as token ids, the one way every stage of preference alignment does it.

Prompt and completion are encoded apart and their ids joined: a completion's tokens do not depend on its prompt, and
no assertion about how the two would have been split is needed. A completion ends in exactly one end token exactly if
it is *finished*; cut at `most_new` tokens it is not. In a conversation (told by its prompt, which holds the
template's end of turn) that is the end of turn, elsewhere the first of `eos_ids`; a text that brings an end of its
own gets no second one. Prompts lose their front, all to the same `most - most_new` tokens, so that every completion
of a prompt is conditioned on the same thing; a start token stays in front. Nothing looks for a padding id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from tiltlm.data.words import TextIds
from tiltlm.groups import Groups
from tiltlm.models.base import without_end
from tiltlm.samples import Pairs, Samples, Tokens

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Encoder:
    """`tokenizer`; any of `eos_ids` ends a completion, the first is written where none is; sequences hold `most` tokens,
    completions `most_new` of them."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    most: int
    most_new: int
    turn_id: int | None = None
    """Ends a finished completion instead, where the prompt is a conversation: where it holds this very token."""

    def __post_init__(self) -> None:
        if not 0 < self.most_new < self.most:
            raise ValueError(f"completions of {self.most_new} tokens do not fit sequences of {self.most}")

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt, cut on the left. Raises ValueError for a prompt of no tokens."""
        return self._cut(text, list(self.tokenizer(text)["input_ids"]))

    def _cut(self, text: str, ids: list[int]) -> list[int]:
        if not ids:
            raise ValueError(f"the prompt {text!r} has no tokens: a causal LM needs one to begin with")
        return cut_left(ids, self.most - self.most_new, self.tokenizer.bos_token_id)

    @cached_property
    def _ids(self) -> TextIds:
        return TextIds(self.tokenizer)

    @property
    def ends(self) -> tuple[int, ...]:
        """Every token that ends a completion."""
        return self.eos_ids if self.turn_id is None else (*self.eos_ids, self.turn_id)

    def end_after(self, prompt: Sequence[int]) -> int:
        """The token that ends a completion of this prompt."""
        return self.turn_id if self.turn_id is not None and self.turn_id in prompt else self.eos_ids[0]

    def completion(self, text: str, finished: bool = True, end: int | None = None) -> tuple[list[int], bool]:
        """Ids of a completion, and whether it ends by itself: if it is `finished`, and fitted; `end` ends it."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._ended(ids, finished, self.eos_ids[0] if end is None else end)

    def _ended(self, ids: list[int], finished: bool, end: int) -> tuple[list[int], bool]:
        ended = bool(ids) and ids[-1] in self.ends
        ids = [*ids, end] if finished and not ended else ids
        return ids[: self.most_new], finished and len(ids) <= self.most_new

    def text(self, ids: Sequence[int]) -> str:
        """The text of a completion's ids, without what ended it; other special tokens are part of it."""
        return str(self.tokenizer.decode(without_end(list(ids), self.ends)))

    def prompt_text(self, ids: Sequence[int]) -> str:
        """The text of a prompt's ids, without a start token in front; other special tokens are part of it."""
        start = bool(ids) and ids[0] == self.tokenizer.bos_token_id
        return str(self.tokenizer.decode(ids[int(start) :]))

    def texts(self, samples: Samples) -> tuple[list[str], list[str]]:
        """Every row's prompt, as it was cut, and completion, as texts: what a reward of texts judges."""
        used, index = samples.prompt_index.unique(return_inverse=True)
        asked = [self.prompt_text(ids) for ids in samples.prompts.select(used).lists()]
        return [asked[k] for k in index.tolist()], [self.text(ids) for ids in samples.completions.lists()]

    def prompts(self, texts: Sequence[str]) -> Tokens:
        """`prompt` of every text."""
        return Tokens.of([self._cut(*each) for each in zip(texts, self._ids.of(texts), strict=True)])

    def completions(
        self, texts: Sequence[str], finished: Sequence[bool], ends: Sequence[int]
    ) -> list[tuple[list[int], bool]]:
        """`completion` of every text."""
        found = self._ids.of(texts, special=False)
        return [self._ended(*each) for each in zip(found, finished, ends, strict=True)]

    def samples(
        self, prompts: Tokens, index: Sequence[int], texts: Sequence[str], finished: Sequence[bool] | None = None
    ) -> Samples:
        """Completions as text; row i answers prompt `index[i]`, and ends by itself unless `finished` says it did not."""
        end = [self.eos_ids[0]] * len(prompts)
        if self.turn_id is not None:
            end = [self.end_after(prompt) for prompt in prompts.lists()]
        found = self.completions(texts, finished or [True] * len(texts), [end[k] for k in index])
        done = Tokens.of([ids for ids, _ in found])
        whole = torch.tensor([each for _, each in found], dtype=torch.bool)
        return Samples(prompts, torch.tensor(index, dtype=torch.int64), done.ids, done.mask, finished=whole)

    def answers(self, rows: Sequence[Row], column: str) -> Samples:
        """One completion a row: {prompt, `column`}."""
        prompts = self.prompts([row["prompt"] for row in rows])
        return self.samples(prompts, range(len(rows)), [row[column] for row in rows])

    def pairs(self, rows: Sequence[Row]) -> Pairs:
        """{prompt, chosen, rejected} a row."""
        prompts = self.prompts([row["prompt"] for row in rows])
        sides = [
            self.samples(prompts, range(len(rows)), [row[side] for row in rows]) for side in ("chosen", "rejected")
        ]
        return Pairs(*sides)

    def judged(self, rows: Sequence[Row]) -> Samples:
        """{prompt, completion, label} a row, with reward 1 (wanted) or 0; rows of one prompt share it, so that none is
        taken for another's."""
        number = {text: k for k, text in enumerate(dict.fromkeys(row["prompt"] for row in rows))}
        index = [number[row["prompt"]] for row in rows]
        samples = self.samples(self.prompts(list(number)), index, [row["completion"] for row in rows])
        return samples.with_(reward=torch.tensor([float(row["label"]) for row in rows]))

    def groups(self, rows: Sequence[Row]) -> Groups:
        """{prompt, completions, rewards} a row, as many completions in each. What is said in `completion_ids` and
        `finished` of a row counts before its texts."""
        if any(row.get("prompt_ids") for row in rows):
            prompts = Tokens.of([row.get("prompt_ids") or self.prompt(row["prompt"]) for row in rows])
        else:
            prompts = self.prompts([row["prompt"] for row in rows])
        size = len(rows[0]["completions"])
        return Groups(self.grouped(rows, prompts, size), size)

    def grouped(self, rows: Sequence[Row], prompts: Tokens, size: int, first: int = 0) -> Samples:
        """The completions of groups of `size`, whose prompts these are; the first one is called group `first`."""
        uneven = [k for k, row in enumerate(rows) if len(row["completions"]) != size]
        if uneven:
            k = uneven[0]
            raise ValueError(
                f"group {first + k} has {len(rows[k]['completions'])} completions, those before it {size}"
            )
        index = torch.arange(len(rows)).repeat_interleave(size)
        if "completion_ids" in rows[0]:
            done = Tokens.of([ids for row in rows for ids in row["completion_ids"]])
            finished = torch.tensor([flag for row in rows for flag in row["finished"]], dtype=torch.bool)
            samples = Samples(prompts, index, done.ids, done.mask, finished=finished)
        else:
            ends = [flag for row in rows for flag in row.get("finished") or [True] * size]
            samples = self.samples(
                prompts, index.tolist(), [text for row in rows for text in row["completions"]], ends
            )
        if "rewards" in rows[0]:
            rewards = torch.tensor([value for row in rows for value in row["rewards"]], dtype=torch.float32)
            samples = samples.with_(reward=rewards)
        return samples


def cut_left(ids: list[int], room: int, bos_id: int | None) -> list[int]:
    """The last `room` of a prompt's ids; a start token in front stays in front."""
    if len(ids) <= room:
        return ids
    start = [ids[0]] if ids[0] == bos_id else []
    return start + ids[len(ids) - room + len(start) :]
