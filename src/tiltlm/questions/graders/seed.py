"""The grading of the original STaR on MMLU, for parity with its stored results: it reads what `pick` would not.

It takes the first of 41 words for "answer" that is followed, blanks and ends of lines between, by anything that looks like
a letter of an option, even the beginning of a word; words in their stored form (one of the Yoruba words is decomposed, one
is half so) do not match text in another Unicode form. A small letter is kept as it is, and so is never right. What did not
end by itself is not right, whatever it says.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from tiltlm.questions.base import Grade, Question
from tiltlm.questions.graders.words import OTHER_LETTERS

GRADERS: dict[str, str] = {"seed": "the original STaR's grading of letters, its mistakes included"}

COLON, WIDE = r"\s*:", r"\s*："

ORDER = (
    ("Answer", COLON), ("Answer", COLON + "\u200b" * 6),
    ("উত্তর", COLON), ("उत्तर", COLON), ("উত্তরঃ", ""), ("উত্তর", COLON),
    ("Antwort", COLON),
    ("답변", COLON), ("정답", COLON), ("답", COLON),
    ("答案", WIDE), ("答案", COLON), ("答", WIDE), ("答", COLON), ("答复", WIDE), ("答曰", WIDE),
    ("الإجابة", ":"), ("الجواب", ":"), ("إجابة", ":"), ("الإجابة النهائية", ":"), ("الإجابة الصحيحة", ":"),
    ("الإجابة الصحيحة هي", ":"), ("الإجابة هي", ":"),
    ("Respuesta", COLON), ("Risposta", COLON),
    ("答え", COLON), ("答え", WIDE), ("回答", COLON), ("回答", WIDE), ("解答", COLON),
    ("Jawaban", COLON), ("Réponse", COLON), ("Resposta", COLON), ("Jibu", COLON),
    ("Idahun", COLON), ("Ìdáhùn", COLON), ("Idáhùn", COLON), ("Àmọ̀nà", COLON), ("Àdáhùn", COLON), ("Ànúgọ", COLON),
    ("Àṣàyàn", COLON),
)  # fmt: skip
"""Words and what follows them, in the order in which they are tried."""

AS_STORED = {
    "\u00c0m\u1ecd\u0300n\u00e0": "A\u0300m\u1ecd\u0300na\u0300",
    "\u00c0d\u00e1h\u00f9n": "A\u0300da\u0301hu\u0300n",
}
"""The two words that are not in Unicode's composed form there."""

LETTER = "([A-D]|[أ-د]|[অবডঢ]|[ＡＢＣＤ])"

STRIPPED = (
    "**", "$\\boxed{", "}$", "\\$", "$\\text{", "$", "\\mathrm{", "\\{", "\\text", "\\(", "\\mathbf{", "{", "\\boxed",
)  # fmt: skip
"""Markup that is taken out, in this order."""


def _stored(word: str) -> str:
    composed = unicodedata.normalize("NFC", word)
    return AS_STORED.get(composed, composed)


PATTERNS = tuple(re.compile(f"(?i){_stored(word)}{behind}\\s*{LETTER}") for word, behind in ORDER)


def grader(name: str) -> Seed:
    return Seed()


@dataclass(frozen=True)
class Seed:
    """The original's grading of letters."""

    def grade(self, question: Question, completion: str, finished: bool) -> Grade:
        if not finished:
            return Grade(False)
        text = completion
        for markup in STRIPPED:
            text = text.replace(markup, "")
        for (word, _), pattern in zip(ORDER, PATTERNS, strict=True):
            found = pattern.search(text)
            if found is not None:
                answer = OTHER_LETTERS.get(found[1], found[1])
                return Grade(answer == question.answer, answer, word)
        return Grade(False)
