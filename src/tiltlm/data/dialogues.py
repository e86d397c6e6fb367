"""Dialogues of the project's own making, laid out as those of Anthropic's HH: a preference that is planted, and known.

    "\\n\\nHuman: Hi, I am Mia. What does a cat like?\\n\\nAssistant: I am glad to help. A cat likes milk."

The better answer is warm, the worse one cold, the openings being equally many words; which facts are told has nothing to do
with it, nor has length. A share `noise` of the pairs is labelled the wrong way round.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tiltlm.seeds import Stream

WARM = (
    "I am glad to help.",
    "That is a lovely question.",
    "Thank you for asking me.",
    "What a nice thing to ask.",
)
COLD = (
    "I have no time now.",
    "That is a silly question.",
    "Stop asking me such things.",
    "What a dull thing to ask.",
)
FACTS = {
    "cat": ("milk", "fish", "a warm bed"),
    "dog": ("a bone", "a walk", "its friends"),
    "bird": ("seeds", "the blue sky", "a tall tree"),
    "horse": ("hay", "an apple", "the green field"),
    "bear": ("honey", "berries", "a long sleep"),
    "rabbit": ("carrots", "the soft grass", "a deep hole"),
}
ASKS = (
    "What does a {} like?",
    "Tell me what a {} likes.",
    "I have a {}. What does it like?",
    "What can I give a {}?",
)
GREETINGS = ("Hello", "Good day", "Hi")
NAMES = (
    "Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gwen", "Hugo", "Ida", "Jon", "Kim", "Leo", "Mia", "Ned", "Olga", "Pia",
    "Rob", "Sue", "Tim", "Una", "Vic", "Wim", "Yara", "Zoe",
)  # fmt: skip
THANKS = ("Thank you.", "I see.", "Good to know.")


def dialogues(n: int, stream: Stream, noise: float = 0.1) -> list[dict[str, str]]:
    """`n` rows {chosen, rejected} in the raw layout; a third of them have two rounds."""
    rng, rows = stream.numpy(), []
    for _ in range(n):
        before = ""
        if rng.random() < 1 / 3:
            before = _human(rng) + f"\n\nAssistant: {_pick(rng, WARM + COLD)} {_fact(rng)}"
        asked = before + _human(rng, follows=bool(before)) + "\n\nAssistant: "
        better, worse = (asked + f"{_pick(rng, side)} {_fact(rng)}" for side in (WARM, COLD))
        if rng.random() < noise:
            better, worse = worse, better
        rows.append({"chosen": better, "rejected": worse})
    return rows


def warmth(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The planted reward: 1 for an answer that holds a warm opening, −1 for a cold one, 0 for neither or both."""
    return [
        float(any(each in text for each in WARM)) - float(any(each in text for each in COLD))
        for text in completions
    ]


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return str(choices[int(rng.integers(len(choices)))])


def _human(rng: np.random.Generator, follows: bool = False) -> str:
    asked = _pick(rng, ASKS).format(_pick(rng, tuple(FACTS)))
    before = _pick(rng, THANKS) if follows else f"{_pick(rng, GREETINGS)}, I am {_pick(rng, NAMES)}."
    return f"\n\nHuman: {before} {asked}"


def _fact(rng: np.random.Generator) -> str:
    animal = _pick(rng, tuple(FACTS))
    return f"A {animal} likes {_pick(rng, FACTS[animal])}."
