"""Texts to ids by a tokenizer, many at a time: equal texts are encoded once, and where that is the same, equal words.

A byte-level BPE tokenizer cuts a text by a regular expression and encodes each piece by itself. No piece of the expressions
in `CUTS` goes on from another character to a blank, and none looks at what stands before it. So the ids of a text are those
of its words one behind the other, a word taken with the blanks in front of it; and most of any text is a few thousand
words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import Any

AT_ONCE = 1024
"""Texts that a tokenizer is handed together: what it returns beside ids is let go before the next ones."""

CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""How Llama 3 and Qwen cut texts into pieces; GPT-2's expression is part of the engine."""


class TextIds:
    """`tokenizer(text)["input_ids"]` of many texts by one tokenizer, which must not change meanwhile."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def of(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """The ids of every text; special: whether the tokenizer may add tokens of its own (a start token)."""
        distinct, known = list(dict.fromkeys(texts)), dict[str, list[int]]()
        for begin in range(0, len(distinct), AT_ONCE):
            some = distinct[begin : begin + AT_ONCE]
            known.update(zip(some, self._encoded(some, special), strict=True))
        return [known[text] for text in texts]

    def _encoded(self, texts: list[str], special: bool) -> list[list[int]]:
        first = list(self.tokenizer(texts[0], add_special_tokens=special)["input_ids"])
        if not self._is_fast:
            rest = texts[1:]
            return [first, *(list(self.tokenizer(x, add_special_tokens=special)["input_ids"]) for x in rest)]
        # the call above has put the engine behind the tokenizer into the state that it works in
        if self._words is not None:
            return self._words.of(texts, special)
        found = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=special)
        return [each.ids for each in found]

    @cached_property
    def _is_fast(self) -> bool:
        """Whether its engine alone says what the ids are."""
        from transformers import PreTrainedTokenizerFast

        kind, usual = type(self.tokenizer), PreTrainedTokenizerFast
        own = (kind.__call__, kind._encode_plus) if issubclass(kind, usual) else None
        return own == (usual.__call__, usual._encode_plus)

    @cached_property
    def _words(self) -> Words | None:
        engine = self.tokenizer.backend_tokenizer
        return Words(engine) if reads_words(engine) else None


def reads_words(engine: Any) -> bool:
    """Whether a `tokenizers.Tokenizer` gives every text the ids of its words."""
    normal, cut = (json.loads(x.__getstate__()) if x else None for x in (engine.normalizer, engine.pre_tokenizer))
    added = engine.get_added_tokens_decoder().values()
    return (
        type(engine.model).__name__ == "BPE"
        and not engine.model.dropout
        and normal in (None, {"type": "NFC"})
        and _cuts_at_blanks(cut)
        and not any(token.lstrip or token.rstrip or " " in token.content for token in added)
        and len(engine.encode("a", add_special_tokens=False).ids) == 1
    )


def _cuts_at_blanks(cut: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer, as it describes itself, is one of GPT-2, Llama 3 or Qwen."""
    parts = [] if cut is None else cut.get("pretokenizers", [cut])
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": len(parts) == 1}
    if not parts or {name: parts[-1].get(name) for name in bytewise} != bytewise:
        return False
    splits = [{"type": "Split", "pattern": {"Regex": x}, "behavior": "Isolated", "invert": False} for x in CUTS]
    return len(parts) == 1 or (len(parts) == 2 and parts[0] in splits)


BEFORE_A_WORD = re.compile(r"(?<=\S)(?= )")

MOST_HELD = 1 << 19
"""Characters of words that are remembered, those that come first: some 20 MB of memory. Few words are so many, and rare."""

LONGEST = 32
"""Characters of a word that is remembered."""

WORDS_AT_ONCE = 256
"""New words that are encoded together."""


class Words:
    """Ids of texts by an engine that `reads_words`: those of their words, which are remembered."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.known, self.held = engine, dict[str, tuple[int, ...]](), 0
        (within,), whole = engine.encode("a", add_special_tokens=False).ids, engine.encode("a").ids
        at = whole.index(within)
        self.around: tuple[list[int], list[int]] = whole[:at], whole[at + 1 :]

    def of(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """The ids of every text; special: with the tokens that the engine puts around it."""
        cut = [BEFORE_A_WORD.split(text) for text in texts]
        new = [word for word in dict.fromkeys(chain.from_iterable(cut)) if word not in self.known]
        for begin in range(0, len(new), WORDS_AT_ONCE):
            self.known.update(self._encoded(new[begin : begin + WORDS_AT_ONCE]))
        ids = self.known.__getitem__
        front, back = self.around if special else ([], [])
        found = [[*front, *chain.from_iterable(map(ids, words)), *back] for words in cut]
        self._forget(new)
        return found

    def _encoded(self, words: list[str]) -> dict[str, tuple[int, ...]]:
        """The ids of every word, each encoded by itself."""
        found = [list[int]() for _ in words]
        made = self.engine.encode(words, is_pretokenized=True, add_special_tokens=False)
        for k, token in zip(made.word_ids, made.ids, strict=True):
            found[k].append(token)
        return {word: tuple(ids) for word, ids in zip(words, found, strict=True)}

    def _forget(self, new: list[str]) -> None:
        """Let go of new words that will hardly come again (a text's beginning, a link) or are too many."""
        for word in new:
            if word.startswith(" ") and len(word) <= LONGEST and self.held < MOST_HELD:
                self.held += len(word)
            else:
                del self.known[word]
