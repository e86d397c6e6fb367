"""Two dialogues of the Anthropic-HH data -> one prompt and two responses, by the same rules for both sides.

A dialogue is text like "\\n\\nHuman: …\\n\\nAssistant: …\\n\\nHuman: …". The rules:

1. Cut at blank lines ("\\n\\n"); what stands before the first is empty.
2. "Human: " or "Humans: " opens a human turn (written "Human: "); "Assistant: " opens an assistant turn, in whose
   opening piece the words "Human: " and "Humans: " become a space. Every other piece continues its turn.
3. An assistant's text starts after exactly one space.
4. Turns both sides share are the prompt. The first difference must be two assistant turns: the responses.
5. Later turns are left out (and counted). No pair is made of sides that are the same, of which one continues the
   other, that differ in spaces only, or of which one response is blank.
6. The prompt starts with "\\n\\nHuman: " and ends with "\\n\\nAssistant:"; a response starts with one space.

Treating both sides alike matters: the original program (exact-optimization, exp/hh_exp/preproc.py) stripped spaces
from the chosen side only, which tells a reward model by spaces alone which side was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

HUMAN, HUMANS, ASSISTANT = "Human: ", "Humans: ", "Assistant: "


@dataclass(frozen=True)
class Pair:
    """One prompt, two responses; prompt + response is the dialogue up to the first difference."""

    prompt: str
    chosen: str
    rejected: str
    later_turns: int = 0
    """Turns after the responses, of both sides together, that were left out."""


@dataclass(frozen=True)
class Dropped:
    """A row of which no pair is made, and why, in a few words that are the same for all such rows."""

    reason: str


def split_dialogues(chosen: str, rejected: str) -> Pair | Dropped:
    """The pair that two dialogues make, or why they make none. Swapping the sides swaps the responses."""
    sides = _turns(chosen), _turns(rejected)
    if sides[0] is None or sides[1] is None:
        return Dropped("text before the first turn")
    return _pair(sides[0], sides[1])


def _pair(chosen: list[str], rejected: list[str]) -> Pair | Dropped:
    at = agreeing(chosen, rejected)
    if at == len(chosen) == len(rejected):
        return Dropped("identical sides")
    if at in (len(chosen), len(rejected)):
        return Dropped("one side continues the other")
    if not (chosen[at].startswith(ASSISTANT) and rejected[at].startswith(ASSISTANT)):
        return Dropped("first difference is not two assistant turns")
    if not chosen[0].startswith(HUMAN):
        return Dropped("no human turn at the start")
    colon = len(ASSISTANT) - 1  # a response keeps the space behind the colon
    responses = chosen[at][colon:], rejected[at][colon:]
    if not all(response.strip() for response in responses):
        return Dropped("blank response")
    if responses[0].split() == responses[1].split():
        return Dropped("sides differ in spaces only")
    prompt = "\n\n".join(["", *chosen[:at], "Assistant:"])
    return Pair(prompt, *responses, later_turns=len(chosen) + len(rejected) - 2 * (at + 1))


def _turns(dialogue: str) -> list[str] | None:
    """The turns with their speakers, by rules 1 to 3; None where text stands before the first."""
    first, *pieces = dialogue.split("\n\n")
    turns: list[str] = []
    for piece in pieces:
        if piece.startswith((HUMAN, HUMANS)):
            turns.append(piece.replace(HUMANS, HUMAN))
        elif piece.startswith(ASSISTANT):
            text = piece.removeprefix(ASSISTANT)
            turns.append(ASSISTANT + text.replace(HUMANS, " ").replace(HUMAN, " "))
        elif turns:
            turns[-1] += "\n\n" + piece
        else:
            return None
    return [_one_space(turn) for turn in turns] if first == "" else None


def _one_space(turn: str) -> str:
    """An assistant's turn with one space behind the colon; whole turns, as its text may start after a blank line."""
    return ASSISTANT + turn.removeprefix(ASSISTANT).lstrip() if turn.startswith(ASSISTANT) else turn


def agreeing(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many elements at the start of both are the same."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
