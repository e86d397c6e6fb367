"""A tagger of a few hundred words and some rules: Penn Treebank tags without a model, for tests and small worlds.

A word is what the lexicon says; else what its ending says; else a noun. Four rules look at the word before: after "to" or
a modal a word that may be both is a verb; after a determiner, a possessive or an adjective it is a noun; a capital within a
sentence makes a proper noun; after a noun or pronoun a verb may end in s. It is right where text is plain, and no match for
a trained tagger.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORDS = {
    "DT": "a an the this that these those each every some any no another either neither all both half",
    "IN": "of in on at by for with from into onto over under about after before between through during without within "
    "against among around behind below beside beyond despite except inside like near off outside past since than toward "
    "towards until upon because although though if while whether as unless per via out up down across along",
    "CC": "and or but nor yet so plus",
    "PRP": "i you he she it we they me him her us them myself yourself himself herself itself ourselves themselves one "
    "mine yours hers ours theirs someone anyone everyone nobody nothing something anything everything",
    "PRP$": "my your his its our their",
    "MD": "can could may might must shall should will would ca wo 'll 'd",
    "TO": "to",
    "EX": "there",
    "POS": "'s",
    "WP": "who whom what which whose",
    "WRB": "when where why how",
    "RB": "not n't n’t very too also just only even still already always never often sometimes again soon now then here "
    "away back almost quite rather really well perhaps maybe however therefore once twice today together ever far first "
    "instead later least less more most much once please yes",
    "VBP": "am are 're 've 'm do have",
    "VBZ": "is has does",
    "VBD": "was were had did said went came saw took got made gave knew thought found told felt left kept held stood ran "
    "sat began became brought bought caught taught sent spent built lost met paid read led fell flew grew drew threw wore "
    "broke spoke woke chose ate drank sang swam hid heard slept won",
    "VBN": "been gone done seen taken given known written eaten fallen broken chosen spoken driven shown grown flown",
    "VB": "be go come see take get make give know think say tell find want need ask seem feel become leave keep let begin "
    "bring happen write sit stand lose pay meet include continue learn lead understand speak read spend grow open win "
    "teach remember appear buy serve die send build stay fall reach remain suggest raise sell require decide pull create "
    "provide ensure explain choose put eat drink sing bake follow allow try bark",
    "JJ": "good new old great big small large little long short high low young early late important few public bad same "
    "able other many own last next right left happy sad red green blue white black brown yellow warm cold hot quick slow "
    "nice kind brave funny silly pretty beautiful tall strong weak soft hard heavy light dark bright clean dirty full "
    "empty easy difficult simple different such certain true false real free safe best better appropriate first second "
    "third several lazy fast tiny huge deep wide main major whole general clear sure ready afraid proud glad angry tired",
    "NN": "time person year way day thing man woman child world life hand part place case week company system program "
    "question work government number night point home water room mother father area money story fact month lot right "
    "study book eye job word business issue side head house friend power hour game line end member law car city community "
    "name team minute idea body information back parent face others level office door health art war history party result "
    "morning reason research girl boy guy moment air teacher force education dog cat bird fish bear frog duck horse cow "
    "pig mouse lion fox bee tree park sun moon star sky sea river hill road school food bread cake apple ball toy box bed "
    "table chair window garden flower grass rain snow wind fire king queen rice sugar milk egg tea data hope help answer "
    "experience code example text model language problem",
    "NNS": "people men women children feet teeth mice geese things years days words friends toys trees",
    "UH": "oh hello hi hey wow ah",
}  # fmt: skip
LEXICON = {word: tag for tag, words in reversed(_WORDS.items()) for word in words.split()}
"""Word -> its commonest tag; where it stands in two lists, the earlier one counts."""

_EITHER = (
    "work play help look walk run love name answer question study hope talk turn start show call move live use change "
    "watch stop cook plan point place face back head hand smile laugh dance visit wish care rest drink swim jump fall cry "
    "rain snow sleep dream ride race paint report test result experience code cause fight kiss hug gift step order open "
    "end light book water guess try need kick swing cut drive building feeling meeting drawing painting reading "
    "writing"
)
EITHER = frozenset(_EITHER.split())
"""Words that are verbs or nouns, as the word before them says."""

ENDINGS = (
    ("JJ", ("ous", "ful", "ive", "able", "ible", "less", "ish", "ical", "ary", "est")),
    ("NN", ("tion", "sion", "ment", "ness", "ity", "ism", "ance", "ence", "ship", "hood", "dom", "ology", "ist")),
    ("RB", ("ly",)),
    ("VBG", ("ing",)),
    ("VBD", ("ed",)),
    ("JJ", ("al", "ic")),
)
"""What the end of an unknown word says, the first that fits."""

VERBS = EITHER | frozenset(_WORDS["VB"].split())
_BEFORE_S = ("NN", "NNS", "NNP", "PRP", "RB")
"""Behind these, a verb with an s at its end is one."""
_BEFORE_NOUNS = ("DT", "PRP$", "JJ", "POS")
_BEFORE_VERBS = ("TO", "MD")
_NUMBER = re.compile(r"\d[\d.,:]*(?:st|nd|rd|th|s|%)?")
_IN_WORDS = "two three four five six seven eight nine ten eleven twelve twenty hundred thousand million"
_END = (".", "!", "?")


def lexicon_tags(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Penn tags of every token of tokenised texts."""
    return [_tags(words) for words in texts]


def _tags(words: Sequence[str]) -> list[str]:
    found: list[str] = []
    for k, word in enumerate(words):
        first = k == 0 or words[k - 1] in _END or not words[k - 1][0].isalnum()
        found.append(_tag(word, found[-1] if found else "", first))
    return found


def _tag(word: str, before: str, first: bool) -> str:
    """The tag of a word behind a word of the tag `before`; first: it opens a sentence or a quote."""
    small = word.lower()
    if not any(c.isalnum() for c in word):
        return word
    if _NUMBER.fullmatch(small) or small in _IN_WORDS.split():
        return "CD"
    if word[0].isupper() and not first and word != "I":
        return "NNP"
    if before in _BEFORE_S and small.endswith("s") and small[:-1] in VERBS:
        return "VBZ"
    if small in EITHER:
        return "NN" if before in _BEFORE_NOUNS else "VB" if before in _BEFORE_VERBS else LEXICON.get(small, "VBP")
    if small in LEXICON:
        return LEXICON[small]
    return _by_ending(small, before)


def _by_ending(word: str, before: str) -> str:
    if before in _BEFORE_VERBS:
        return "VB"
    for tag, endings in ENDINGS:
        if word.endswith(endings) and len(word) > 4:
            return "NN" if tag == "VBG" and before in _BEFORE_NOUNS else tag
    return "NNS" if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else "NN"
