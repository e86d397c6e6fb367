"""How questions are put to a model and its answers become one number a question.

    greedy                  the likeliest token at every step, one completion
    avg@K                   the mean over K draws at temperature 1; avg@1 is a single draw
    maj@K                   the answer that most of K draws give; of those that as many give, the one drawn first. Draws
                            that no answer can be read off have no vote; where none has, the answer is wrong
    letters                 the likeliest letter (`scored.py` says of what exactly)
    options                 the likeliest option, by its text
    options-per-character   the same, log-likelihoods divided by the texts' lengths

avg@K and maj@K look at the same draws: draw k of question i follows from the stream, i and k alone, whatever K is, which
other questions there are and how many are answered at once.
"""

from __future__ import annotations

import re

from tiltlm.mistakes import nearest
from tiltlm.questions.drawn import Drawn
from tiltlm.questions.exam import Protocol
from tiltlm.questions.scored import Scored

SCORED = {"letters": "letters", "options": "options", "options-per-character": "options"}
KNOWN = ("greedy", "avg@4", "maj@4", *SCORED)
"""Protocols as examples of names."""


def protocol(name: str) -> Protocol:
    """The protocol called `name`. Raises ValueError for what is none, naming the nearest."""
    if name == "greedy":
        return Drawn(1, greedy=True)
    if name in SCORED:
        return Scored(by_letter=name == "letters", per_character=name == "options-per-character")
    found = re.fullmatch(r"(avg|maj)@([1-9]\d*)", name)
    if found is None:
        raise ValueError(
            f"there is no protocol {name!r}.{nearest(name, KNOWN)} There are {', '.join(KNOWN)} (any number)"
        )
    return Drawn(int(found[2]), vote=found[1] == "maj")
