"""Texts encoded word by word have the ids of texts encoded one at a time; where they would not, words are not looked at."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiltlm.data import words
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.data.words import CUTS, TextIds, Words, reads_words
from tiltlm.seeds import stream

ODD = [
    "a", "the", "Dog", "naïve", "e\u0301", "\u0301", "ﬁ", "猫は", "ß", "1", "234", "5678", "'s", "'RE", "n't", ".", "!?",
    "-", "…", "👍🏽", "<s>", "<s", "\u200b", "\u200d", "\x00", "\x1c", "\x85", "\u00a0", "\u3000", "\u2028", "\ufeff", "\n",
    "\r\n", "\t", "  ",
]  # fmt: skip
"""Letters, marks, digits, signs, special tokens, and everything that somebody takes for white space."""


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_tokenizer(stories(50, stream(0, "test-words")), 400)


def like(trained: Any, **parts: Any) -> Any:
    """The same tokenizer with another part."""
    engine = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    for name, value in parts.items():
        setattr(engine, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", pad_token="<s>")


def split_by(expression: str, behavior: str = "isolated") -> Any:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), behavior), last])


def odd_texts(n: int) -> list[str]:
    own = random.Random(0)
    texts = [
        "".join(own.choice(["", " ", " "]) + own.choice(ODD) for _ in range(own.randrange(9))) for _ in range(n)
    ]
    return [*texts, "", " ", "The dog said no. " * 9, *(f"a{x} b {x}c {x} {x}" for x in ODD)]


def one_by_one(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("cut", [None, *CUTS], ids=["gpt2", "llama3", "qwen"])
def test_texts_have_the_ids_of_texts_one_at_a_time(trained, cut, special):
    """Some thousand texts of odd pieces, twice, so that all words but the first are known; NFC joins e and its accent."""
    for normalizer in (None, normalizers.NFC()):
        tokenizer = like(trained, **({"pre_tokenizer": split_by(cut)} if cut else {}), normalizer=normalizer)
        assert reads_words(tokenizer.backend_tokenizer)
        texts, many = odd_texts(600), TextIds(tokenizer)
        wanted = one_by_one(tokenizer, texts, special)
        assert many.of(texts, special) == wanted == many.of(texts, special)
        assert wanted[0][:1] == [0] or not special


def test_a_word_is_encoded_once(trained, monkeypatch):
    asked: list[str] = []
    real = Words._encoded
    monkeypatch.setattr(Words, "_encoded", lambda self, new: asked.extend(new) or real(self, new))
    many = TextIds(trained)
    many.of(["a dog and a dog", "a cat"]), many.of(["the dog and a cat", "and a cat"])
    assert asked == ["a", " dog", " and", " a", " cat", "the", "and"]


def test_no_more_is_held_than_is_allowed(trained, monkeypatch):
    """Nor beginnings of texts and long words; what is not held is encoded again."""
    monkeypatch.setattr(words, "MOST_HELD", 40)
    monkeypatch.setattr(words, "WORDS_AT_ONCE", 7)
    many, texts = TextIds(trained), odd_texts(200)
    for _ in range(2):
        assert many.of(texts, False) == one_by_one(trained, texts, False)
    assert 40 <= sum(map(len, many._words.known)) < 40 + words.LONGEST
    many = TextIds(trained)
    many.of(["beginning then " + "x" * words.LONGEST])
    assert list(many._words.known) == [" then"]


def refused(trained: Any) -> dict[str, Any]:
    """Tokenizers whose texts are not their words, or may not be."""
    added = {}
    for token in (AddedToken("<x>", rstrip=True), AddedToken("dog said", normalized=False)):
        added[token.content] = like(trained)
        added[token.content].add_tokens([token])
    return added | {
        "blank in front": like(trained, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "whole lines": like(trained, pre_tokenizer=split_by(r"\n")),
        "blanks behind": like(trained, pre_tokenizer=split_by(r" ", "merged_with_previous")),
        "no cuts": like(trained, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        "metaspace": like(trained, pre_tokenizer=pre_tokenizers.Metaspace()),
        "nothing": like(trained, pre_tokenizer=None),
        "stripped": like(trained, normalizer=normalizers.Strip()),
    }


def test_others_are_handed_whole_texts(trained):
    """Three of them would go wrong by words: the blank behind a token, one within it, what a normalizer drops."""
    texts, wrong = [*odd_texts(100), "<x> the dog said no"], set()
    for name, tokenizer in refused(trained).items():
        assert not reads_words(tokenizer.backend_tokenizer), name
        wanted = one_by_one(tokenizer, texts, False)
        assert TextIds(tokenizer).of(texts, False) == wanted, name
        if Words(tokenizer.backend_tokenizer).of(texts, False) != wanted:
            wrong.add(name)
    assert wrong >= {"<x>", "dog said", "stripped"}


def test_a_tokenizer_that_was_told_to_cut_or_pad_does_neither_here(trained):
    """What somebody else left the engine with is not looked at, as where texts come one by one."""
    tokenizer = like(trained)
    texts = [" a cat and a dog", " a"]
    plain = TextIds(tokenizer).of(texts)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert TextIds(tokenizer).of(texts) == plain and len(plain[0]) > 2
