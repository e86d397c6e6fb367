"""The number that a completion ends in: behind the last "####", in the last \\boxed{…}, or behind the last "Answer:".

Plain numbers and fractions are compared exactly, with commas, currency and units around them left out. A number that goes
on (1.000.000, 12 1/2, 2x + 3, 5 + 7) is not read in part, and what cannot be read leaves it to the next rule: a heading
"#### Step 3" hides no answer. What is written in LaTeX (a fraction, say) goes through math-verify, and only where it is a
numeral of LaTeX and no formula: nothing is computed that could take long, and nothing a model wrote is run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tiltlm.questions.base import Grade, Question
from tiltlm.questions.graders.words import WORDS
from tiltlm.questions.numerals import NUMERAL, value

GRADERS: dict[str, str] = {"number": "the number behind ####, in \\boxed{} or behind 'Answer:', exactly"}

INSTALL = "the grader 'number' needs the package math-verify: pip install 'tiltlm[questions]'"

AROUND = r"[\s$€£¥₦₹*:=]*"
GOES_ON = (
    r"\d|[.,:]\d|[eE][-+]?\d|\s+\d"
    r"|\s*[/^]|\s*[-+−*×·÷=]\s*[\d(\\]|\s*[+*×·÷=]\s*[a-zA-Z]\b|\s*\\(?:[dt]?frac|times|cdot|div|sqrt|pi)\b"
    r"|[xyz]\b|[a-zA-Z]\s*[-+−*×·÷=/^]"
)
"""What makes a number in front of it part of something else: more digits, an operator, a letter that it multiplies."""

NUMBER = re.compile(rf"{AROUND}(?>({NUMERAL}(?:\s*/\s*{NUMERAL})?))(?!{GOES_ON})")
"""A whole number or fraction, never the beginning of one, with currency or markup before it."""

THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!;])(?=\d{3})")
"""What parts thousands in LaTeX."""

LATEX = re.compile(r"(?:\\[dt]?frac|\\text|\\mathrm|\\[,!;:%$ ]|[\d{}.,/+\-\s]|(?<=\{)[a-zA-Z ]+(?=\}))+")
"""A numeral in LaTeX: digits, fractions, units."""

BEHIND = {
    "####": re.compile(r"####([^\n]*)"),
    "boxed": re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"),
    "answer": re.compile(
        "(?:" + "|".join(re.escape(w) for words in WORDS.values() for w in words) + r")[ \t*]*[:：]([^\n]*)", re.IGNORECASE
    ),
}  # fmt: skip
"""Where an answer stands, by rule: of what a rule finds the last counts, and the first rule whose last can be read
decides."""


def grader(name: str) -> Number:
    try:
        import math_verify  # noqa: F401
    except ImportError:
        raise ValueError(INSTALL) from None
    return Number()


@dataclass(frozen=True)
class Number:
    """The number that a completion ends in, against the right one."""

    def grade(self, question: Question, completion: str, finished: bool) -> Grade:
        for rule, pattern in BEHIND.items():
            found = pattern.findall(completion)
            answer = read(found[-1]) if found else None
            if answer is not None:
                return Grade(same(answer, question.answer), answer, rule)
        return Grade(False)


def read(text: str) -> str | None:
    """The number that a text begins with, as plain digits, or the LaTeX that it is; None where it is neither."""
    text = THOUSANDS.sub(",", text)
    found = NUMBER.match(text)
    if found is not None:
        exact = value(found[1])
        return None if exact is None else str(exact)
    latex = text.strip().strip("$")
    return latex if "\\" in latex and any(mark.isdigit() for mark in latex) and LATEX.fullmatch(latex) else None


def same(answer: str, right: str) -> bool:
    """Whether both are the same number."""
    mine, wanted = value(answer), value(right)
    if mine is not None and wanted is not None:
        return mine == wanted
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(text: str) -> Any:
        return parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)

    return bool(verify(parsed(right), parsed(answer), timeout_seconds=None))
