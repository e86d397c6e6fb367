"""The letter that a completion picks: behind the last "Answer:", in any of the languages of MMMLU.

Both sides are in Unicode's composed form, without characters of no width, markup taken out. The letter stands on the
same line as the word, in brackets or quotes or without, and ends there (so "Answer: All of them" picks nothing). Small
letters count as capital ones, unless a word follows ("Answer: a dog"). A capital that may be an article or a pronoun is one
where a word in small letters follows that does not speak of an option ("Answer: A common mistake", but "Answer: A is
right"), and a letter in front of an apostrophe is none ("d'accord"). Of several the last counts: a model may correct
itself. Where no such word is followed by a letter, a completion whose first line is a letter and nothing else ("B", "(B)")
picks that one.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from string import ascii_uppercase

from tiltlm.questions.base import Grade, Question
from tiltlm.questions.graders.words import OTHER_LETTERS, WORDS

GRADERS: dict[str, str] = {"pick": "the letter behind the last 'Answer:' of a line, in many languages"}

NO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad"))
"""Characters that are not seen."""

MARKUP = re.compile(r"\\(boxed|text|textbf|mathrm|mathbf)\b|\\[()\[\]]|[*_`${}]")

OPENING, CLOSING = r"[ \t(\[\"'“‘«「（]*", r"[ \t)\]\"'”’»」）.,:;،。]*"

LATIN = r"[0-9A-Za-zÀ-ɏḀ-ỿ_\u0300-\u036f]"
"""What a Latin letter is part of a word with."""

ANY = r"[\w\u0300-\u036f\u064b-\u065f\u0900-\u0dff]"
"""What any letter is part of a word with, marks included."""

WORD = re.compile(r"[ \t]+(\w+)")
"""A further word on the same line."""

ARTICLES = {"en": "AI", "pt": "AO", "it": "I"}
"""Letters that are words of their own, by language."""

OF_AN_OPTION = {
    "en": (
        "is", "was", "are", "were", "has", "had", "does", "did", "can", "could", "would", "should", "must",
        "may", "might", "will", "seems", "looks", "because", "since", "as", "for", "and", "or", "but", "not",
        "if", "so", "by", "from", "in", "on", "to", "with", "due", "which", "that", "the", "this", "it", "they",
        "we", "you", "only", "instead", "rather", "based", "according", "given",
    ),
    "pt": (
        "é", "está", "era", "foi", "seria", "tem", "porque", "pois", "por", "já", "e", "ou", "mas", "não", "se", "com",
        "como", "que", "em", "de", "para",
    ),
    "it": ("è", "era", "ha", "perché", "poiché", "e", "o", "ma", "non", "se", "con", "come", "che", "in", "di", "per"),
}  # fmt: skip
"""Words that follow a letter which stands for an option, and no article."""

LETTERS_IF_UNKNOWN = 4
"""A to D, where a question does not tell its options."""


def grader(name: str) -> Pick:
    return Pick()


@dataclass(frozen=True)
class Pick:
    """The letter that a completion picks."""

    def grade(self, question: Question, completion: str, finished: bool) -> Grade:
        answer, rule = picked(completion, len(question.choices) or LETTERS_IF_UNKNOWN)
        return Grade(bool(rule) and answer == question.answer, answer, rule)


def picked(completion: str, options: int) -> tuple[str, str]:
    """(letter, the word that it stands behind, or "start"); two empty texts where none is picked."""
    text = plain(completion)
    behind, alone = _patterns(options)
    found = [m for m in behind.finditer(text) if not _is_word(m["letter"], m["word"], WORD.match(text, m.end()))]
    if found:
        return _capital(found[-1]["letter"]), found[-1]["word"]
    start = alone.match(text)
    return ("", "") if start is None else (_capital(start["letter"]), "start")


def _is_word(letter: str, behind: str, after: re.Match[str] | None) -> bool:
    """Whether a letter is a word of the sentence that goes on after it; behind: the word for "answer" in front."""
    if after is None:
        return False
    if letter.islower() or not after[1].islower():
        return letter.islower()
    language = _languages()[behind.lower()]
    return letter in ARTICLES.get(language, "") and after[1] not in OF_AN_OPTION[language]


@cache
def _languages() -> dict[str, str]:
    """A word for "answer", in small letters -> its language."""
    return {plain(word).lower(): language for language, words in WORDS.items() for word in words}


def _capital(letter: str) -> str:
    return OTHER_LETTERS.get(letter.upper(), letter.upper())


def plain(text: str) -> str:
    """Text in composed form, without characters of no width and without markup."""
    return MARKUP.sub("", unicodedata.normalize("NFC", text).translate(NO_WIDTH))


@cache
def _patterns(options: int) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A letter behind a word; a letter that is the whole first line. options: how many there are."""
    latin = ascii_uppercase[:options]
    others = "".join(other for other, letter in OTHER_LETTERS.items() if letter in latin)
    letter = f"(?P<letter>[{latin}](?!['’]?{LATIN})|[{others}](?!{ANY}))"
    words = "|".join(_whole(plain(word)) for found in WORDS.values() for word in found)
    behind = rf"(?P<word>{words})[ \t]*[:：ঃ]{OPENING}{letter}"
    return re.compile(behind, re.IGNORECASE), re.compile(rf"\s*{OPENING}{letter}{CLOSING}(?:\n|\Z)")


def _whole(word: str) -> str:
    """A word that no other letters stand before; in scripts that do not part words, any may."""
    return (rf"(?<!{LATIN})" if re.match(LATIN, word) else "") + re.escape(word)
