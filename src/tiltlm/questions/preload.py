"""Stored answers in the place of fresh ones: a file's rows as completions of a problem's prompts.

Rows find their prompt by the number of the question, never by where they stand: a file may lack questions, and hold unlike
numbers of answers. Token ids are those of the file; where it has none (a table of STaR's), or ids that say something else
than its text (another model's tokens), the text is read by the tokenizer without any token in front, and the end token
follows iff the answer had ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tiltlm.groups import Groups
from tiltlm.models.base import without_end
from tiltlm.questions.base import Question
from tiltlm.questions.generated import Generated
from tiltlm.questions.grading import Grading
from tiltlm.samples import Samples, Tokens


@dataclass(frozen=True)
class Preloaded:
    """samples: answers by prompt, graded anew (`reward`), `finished` where the file says how they ended.

    unanswered  prompts without an answer
    strangers   rows of questions that are not among the prompts
    too_long    rows of more tokens than a completion may have, which are left out
    regraded    rows whose grade is another one than the file's
    reworded    rows whose own prompt does not hold the question's text: the question in another language, or another one
    """

    samples: Samples
    unanswered: int
    strangers: int
    too_long: int
    regraded: int
    reworded: int

    @property
    def counts(self) -> torch.Tensor:
        """How many answers each prompt has, int64 [P]."""
        return torch.bincount(self.samples.prompt_index, minlength=len(self.samples.prompts))

    def groups(self) -> Groups:
        """The answers as groups. Raises ValueError where prompts have unlike numbers of them, or fewer than two."""
        sizes = sorted(set(self.counts[self.counts > 0].tolist()))
        if len(sizes) != 1:
            raise ValueError(f"groups are of one size; these prompts have {sizes[0]} to {sizes[-1]} answers each")
        return Groups(self.samples, sizes[0])

    def said(self) -> tuple[str, ...]:
        """What there is to say of the joining, for people."""
        rows, prompts = len(self.samples), len(self.samples.prompts)
        found = {
            f"{self.unanswered} of {prompts} prompts have no stored answer": self.unanswered,
            f"{self.strangers} stored answers belong to none of these prompts": self.strangers,
            f"{self.too_long} stored answers have more tokens than a completion here and are left out": self.too_long,
            f"{self.regraded} of {rows} answers are graded otherwise than in the file": self.regraded,
            f"{self.reworded} of {rows} answers were given to another text than the question's": self.reworded,
        }
        return tuple(text for text, number in found.items() if number)


def preloaded(
    rows: Sequence[Generated],
    prompts: Tokens,
    asked: Sequence[Question],
    grading: Grading,
    eos_ids: Sequence[int],
    width: int,
) -> Preloaded:
    """The answers of these prompts among `rows`, those of a prompt side by side in the order of their samples.

    asked: the question of each prompt; eos_ids: of the model whose answers they are to be, the one to write first; width:
    tokens that a completion may have.
    Raises ValueError where not one of them answers one of the prompts.
    """
    place = {question.index: k for k, question in reversed(list(enumerate(asked)))}
    ours = sorted((row for row in rows if row.index in place), key=lambda row: (place[row.index], row.sample))
    read = [(row, ids) for row in ours if len(ids := _ids(row, grading, eos_ids)) <= width]
    if not read:
        raise ValueError(
            f"none of the {len(rows)} stored answers belongs to one of these {len(prompts)} questions and has at most "
            f"{width} tokens: is it the file of another data set, or of another split? is --task.new-tokens large enough?"
        )
    kept = [row for row, _ in read]
    index, tokens = torch.tensor([place[row.index] for row in kept]), Tokens.of([ids for _, ids in read])
    finished = torch.tensor([row.finish_reason != "length" for row in kept])
    samples = Samples(prompts.to("cpu"), index, tokens.ids, tokens.mask, finished=finished)
    reward = grading(samples)
    return Preloaded(
        samples.with_(reward=reward),
        unanswered=len(prompts) - len(set(index.tolist())),
        strangers=len(rows) - len(ours),
        too_long=len(ours) - len(kept),
        regraded=sum(
            row.score is not None and row.score != r for row, r in zip(kept, reward.tolist(), strict=True)
        ),
        reworded=sum(
            bool(row.prompt) and _plain(asked[place[row.index]].text) not in _plain(row.prompt) for row in kept
        ),
    )


def _ids(row: Generated, grading: Grading, eos_ids: Sequence[int]) -> list[int]:
    if row.completion_ids is not None and _says(grading.tokenizer, row.completion_ids, eos_ids, row.response):
        return list(row.completion_ids)
    ids = list(grading.tokenizer(row.response, add_special_tokens=False)["input_ids"])
    return ids + list(eos_ids[:1]) if row.finish_reason != "length" else ids


def _says(tokenizer: Any, ids: Sequence[int], eos_ids: Sequence[int], text: str) -> bool:
    """Whether these ids are the text, with the end token behind it or without."""
    if any(i >= len(tokenizer) for i in ids):
        return False
    return text in (tokenizer.decode(list(ids)), tokenizer.decode(without_end(list(ids), eos_ids)))


def _plain(text: str) -> str:
    """Text with its white space made alike."""
    return " ".join(text.split())
