"""Text of the project's own making: short children's stories, and labelled sentences, from a small grammar.

They stand in for downloaded text where none is at hand: enough to train a small language model, its tokenizer, and
a classifier of sentiment or of rudeness. Everything follows from a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from tiltlm.seeds import Stream

GIRLS = ("Lily", "Mia", "Sue", "Anna", "Lucy", "Sara", "Amy", "Daisy")
BOYS = ("Tim", "Ben", "Tom", "Max", "Jack", "Sam", "Leo", "Timmy")
ANIMALS = ("dog", "cat", "bird", "fish", "bear", "rabbit", "frog", "duck", "horse", "cow", "fox", "mouse")
LOOKS = ("little", "big", "happy", "sad", "small", "brave", "kind", "funny", "old", "red", "brown", "lonely")
PLACES = ("park", "garden", "forest", "house", "beach", "school", "farm", "river", "yard", "hill")
THINGS = ("ball", "toy", "book", "cake", "kite", "hat", "boat", "apple", "box", "flower", "doll", "car")
GOOD = ("happy", "proud", "glad", "excited", "safe", "warm")
BAD = ("sad", "angry", "scared", "mean", "upset", "alone")
GIFTS = ("shared", "found", "loved", "fixed", "gave away", "played with")
HARM = ("broke", "lost", "took", "hid", "threw away", "spoiled")


class _Pen:
    """Picks from lists with one random generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def __call__(self, words: Sequence[str]) -> str:
        return words[int(self.rng.integers(len(words)))]


def stories(n: int, stream: Stream) -> list[str]:
    """`n` stories of four to seven sentences; most begin "Once upon a time, there was a"."""
    pen = _Pen(stream.numpy())
    return [_story(pen) for _ in range(n)]


OPENING = 9
"""Words of a story's opening."""


def opening(rng: np.random.Generator) -> str:
    """How a story begins: its first nine words."""
    return " ".join(_story(_Pen(rng)).split()[:OPENING])


def _story(pen: _Pen) -> str:
    girl = pen(("", "x")) == "x"
    name = pen(GIRLS if girl else BOYS)
    she, her = ("She", "her") if girl else ("He", "his")
    hero = f"{pen(LOOKS)} {'girl' if girl else 'boy'} named {name}"
    if pen(("child", "animal")) == "animal":
        hero = f"{pen(LOOKS)} {pen(ANIMALS)} named {name}"
    animal, thing, place = pen(ANIMALS), pen(THINGS), pen(PLACES)
    begin = (
        f"Once upon a time, there was a {hero}." if pen("aab") == "a" else f"One day, {name} went to the {place}."
    )
    middle = pen(
        (
            f"{she} loved to play with {her} {thing} in the {place}.",
            f"{she} liked to go to the {place} with {her} {animal}.",
            f"{she} had a {pen(LOOKS)} {animal} and a {pen(LOOKS)} {thing}.",
            f"{she} lived in a {pen(LOOKS)} house near the {place}.",
        )
    )
    turn = pen(
        (
            f"One day, {name} saw a {pen(LOOKS)} {animal}.",
            f"One day, a {pen(LOOKS)} {animal} came to the {place} and said hello.",
            f"{name} and the {animal} wanted to find the {thing}.",
            f"The {animal} was very {pen(LOOKS)} and wanted to be friends.",
        )
    )
    end = (
        _happy_end(pen, name, she, animal, thing) if pen("hhs") == "h" else _sad_end(pen, name, she, animal, thing)
    )
    return " ".join([begin, middle, turn, *end])


def _happy_end(pen: _Pen, name: str, she: str, animal: str, thing: str) -> list[str]:
    return [
        pen((f"{name} {pen(GIFTS)} the {thing} with the {animal}.", f"They {pen(GIFTS)} the {thing} together.")),
        pen((f"{she} was very {pen(GOOD)}.", f"They were {pen(GOOD)} and laughed all day.")),
        pen(("They became best friends.", "The end.", f"{name} went home with a big smile.")),
    ]


def _sad_end(pen: _Pen, name: str, she: str, animal: str, thing: str) -> list[str]:
    return [
        pen((f"But the {animal} {pen(HARM)} the {thing}.", f"But {name} {pen(HARM)} the {thing}.")),
        pen((f"{she} was very {pen(BAD)} and started to cry.", f"The {animal} was {pen(BAD)} and ran away.")),
        pen((f"{name} said sorry.", f"{name} had no friends that day.", f"{she} went home alone.")),
    ]


def labelled(n: int, stream: Stream, kind: Literal["sentiment", "toxicity"]) -> list[tuple[str, int]]:
    """`n` sentences with a label: sentiment (1 glad, 0 sad), toxicity (1 rude, in mild words, 0 kind)."""
    pen, rows = _Pen(stream.numpy()), []
    for _ in range(n):
        label = int(pen.rng.integers(2))
        rows.append((_sentence(pen, label, kind), label))
    return rows


def _sentence(pen: _Pen, label: int, kind: str) -> str:
    name, animal, thing = pen(GIRLS + BOYS), pen(ANIMALS), pen(THINGS)
    if kind == "sentiment":
        state, deed = (GOOD, GIFTS) if label else (BAD, HARM)
        plain = (f"Once upon a time, there was a {pen(state)} {animal}.", f"The {animal} was {pen(state)}.")
        return pen((f"{name} {pen(deed)} the {thing} and was {pen(state)}.", *plain, f"{name} felt {pen(state)}."))
    rude = ("stupid", "ugly", "dumb", "mean", "bad", "nasty")
    kindly = ("sweet", "lovely", "clever", "kind", "good", "gentle")
    word = pen(rude if label else kindly)
    speech = f'"You are a {word} {animal}," said {name}.'
    verb = "hated" if label else "loved"
    return pen(
        (speech, f"{name} {verb} the {word} {animal}.", f"There was a {word} {animal} who {verb} everyone.")
    )


def train_tokenizer(texts: Sequence[str], vocab_size: int = 512) -> Any:
    """A byte-level BPE tokenizer with `<s>` (id 0) in front of every text; decode(encode(text)) gives the text
    back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", pad_token="<s>")
