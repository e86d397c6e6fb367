"""Protocols of log-likelihoods: which of a question's options is the likeliest answer.

What is scored is the prompt, as the task puts it to the model, followed by `Answer:` (on a new line, unless the prompt ends
in one or in a special token, as chat templates make it) and one continuation for every option:

    letters   " A", " B", …               argmax over log p(continuation | prompt, "Answer:")
    options   " " + the option's text     the same, or each divided by the number of its text's characters

The sum runs over all tokens of a continuation. Its tokens are those by which the tokens of "Answer: A" go beyond those of
"Answer:", encoded apart from the prompt: so EleutherAI's lm-evaluation-harness tells context and continuation apart, and
divided by characters is its acc_norm. With a tokenizer that makes another last token of "Answer:" when a letter follows,
the continuation begins at the first token that differs. Nothing is drawn, so `parsed` and `finished` mean nothing here. Of
options that are as likely the first is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import torch

from tiltlm.questions.base import Question
from tiltlm.questions.exam import Exam
from tiltlm.questions.outcomes import Outcome
from tiltlm.samples import Samples, Tokens

CUE = "Answer:"
"""What stands between prompt and option."""


@dataclass(frozen=True)
class Scored:
    """The likeliest option of a question; by_letter: by its letter, not its text."""

    by_letter: bool = True
    per_character: bool = False

    @property
    def rows(self) -> int:
        return 1

    def lines(self, exam: Exam, begin: int, end: int) -> Iterator[dict[str, Any]]:
        asked, prompts = exam.questions[begin:end], exam.prompts.select(slice(begin, end)).lists()
        texts = [self._texts(question) for question in asked]
        scores = log_likelihoods(exam, prompts, texts)
        for question, prompt, own, log_p in zip(asked, prompts, texts, scores, strict=True):
            lengths = [max(1, len(text)) if self.per_character else 1 for text in own]
            best = max(range(len(own)), key=lambda k: log_p[k] / lengths[k])
            yield {
                "index": question.index, "subject": question.subject, "prompt": exam.grading.tokenizer.decode(prompt),
                "answer": letters(question)[best], "correct_answer": question.answer,
                "score": float(best == right_option(question)), "log_p": log_p, "settings": dict(exam.settings),
            }  # fmt: skip

    def _texts(self, question: Question) -> list[str]:
        """What continues `Answer: `, for every option."""
        return letters(question) if self.by_letter else list(question.choices)

    def outcomes(self, lines: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        return [
            Outcome(row["index"], row["subject"], row["correct_answer"], (row["answer"],), row["score"])
            for row in lines
        ]


def letters(question: Question) -> list[str]:
    """The letters of a question's options. Raises ValueError where it has none or one, or more than there are letters."""
    if not 2 <= len(question.choices) <= len(ascii_uppercase):
        raise ValueError(
            f"question {question.index} has {len(question.choices)} options: letters and options are scored where there "
            "are 2 to 26; take greedy, avg@K or maj@K"
        )
    return list(ascii_uppercase[: len(question.choices)])


def right_option(question: Question) -> int:
    """Which option is right, by letter or by text. Raises ValueError where the answer is none of them."""
    for names in (letters(question), list(question.choices)):
        if question.answer in names:
            return names.index(question.answer)
    raise ValueError(f"question {question.index}: the answer {question.answer!r:.40} is none of its options")


@torch.no_grad()
def log_likelihoods(exam: Exam, prompts: Sequence[list[int]], texts: Sequence[Sequence[str]]) -> list[list[float]]:
    """log p(" " + text | prompt, "Answer:") of every text of these prompts, nats."""
    tokenizer, rows = exam.grading.tokenizer, []
    for prompt, own in zip(prompts, texts, strict=True):
        cue = CUE if opens_a_line(prompt, tokenizer) else "\n" + CUE
        rows += [(prompt, *_split(tokenizer, cue, text)) for text in own]
    done = Tokens.of([continuation for _, _, continuation in rows])
    asked = Tokens.of([prompt + shared for prompt, shared, _ in rows])
    samples = Samples(asked, torch.arange(len(rows)), done.ids, done.mask).to(exam.prompts.device)
    found = iter(exam.model.log_prob(samples).double().sum(1).tolist())
    return [[next(found) for _ in own] for own in texts]


def opens_a_line(prompt: list[int], tokenizer: Any) -> bool:
    """Whether what follows a prompt begins a line: behind a line's end, or a special token."""
    return prompt[-1] in tokenizer.all_special_ids or str(tokenizer.decode(prompt)).endswith("\n")


def _split(tokenizer: Any, cue: str, text: str) -> tuple[list[int], list[int]]:
    """The tokens of a cue that stay when a text follows, and the text's own."""
    whole, alone = (
        list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (f"{cue} {text}", cue)
    )
    unlike = (k for k, (a, b) in enumerate(zip(whole, alone, strict=False)) if a != b)
    shared = next(unlike, min(len(whole), len(alone)))
    return whole[:shared], whole[shared:]
