"""Arithmetic by steps: the published reward's measured values, ours by hand, and a parser that nothing runs away with."""

from __future__ import annotations

import random
import time

import pytest

from tiltlm.rewards.by_name import text_function
from tiltlm.rewards.gold.expressions import Operation, operations, parsed, reduces, value

LONG = "(((8 + 1) + 9) * 3) ="


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        (LONG, " ((9 + 9) * 3) = (18 * 3) = 54", 0),
        (LONG, " ((9 + 9) * 3) = (18 * 3) = 54 = 54 = 54", 0),
        (LONG, " ((9 + 9) * 3) = (18 * 3) = 55", -1),
        (LONG, "", -23),
        ("(1 - 4) =", " -3", -2),
        ("(1 - 4) =", " -3 = -3", 0),
        ("((1 * 2) * (8 + 5)) =", " ((1 * 2) * 13) = (2 * 13) = 26", -7),
        ("", "hello", 0),
        ("((1 + 2) =", " 3", -200),
        ("1 + 2) =", " 3", -200),
        ("2 ** 3 =", " 8", -200),
        ("() =", " 3", -200),
        ("1 + =", " 3", -200),
    ],
)
def test_the_published_reward_s_measured_values(prompt, response, reward):
    pytest.importorskip("rapidfuzz", reason="pip install 'tiltlm[gold]'")
    assert text_function("math-legacy")([prompt], [response]) == [reward]


@pytest.mark.parametrize(
    ("prompt", "response", "reward"),
    [
        (LONG, " ((9 + 9) * 3) = (18 * 3) = 54", 0),
        (LONG, "(9 + 9) * 3 = 18 * 3 = 54 \n", 0),  # parentheses that say nothing may go
        (LONG, " ((9 + 9) * 3) = (18 * 3) = 54 = 54", -1),  # no free tail
        (LONG, " ((9 + 9) * 3) = (18 * 3) = 54 apples", -2),
        (LONG, " ((9 + 9) * 3) = (18 * 3) = 55", -2),  # one left, one wrong
        (LONG, " ((9 + 9) * 3) = (18 * 3)", -1),
        (LONG, " ((9 + 9) * 3)", -2),
        (LONG, "", -3),
        (LONG, "  ", -3),
        (LONG, " 54", -4),  # two operations are skipped
        (LONG, " (((8 + 1) + 9) * 3)", -4),  # nothing was worked out
        (LONG, " hello", -4),
        (LONG, " = ", -5),
        ("(1 - 4) = ", "-3", 0),  # negatives are right at once
        ("(1 - 4) = ", "(-3)", 0),
        ("(1 - 4) = ", "-3 = -3", -1),
        ("5 - (1 - 4) = ", "5 - -3 = 8", 0),
        ("-(2 + 3) = ", "-5", 0),  # a sign is no operation
        ("-(2 + 3) = ", "-(5)", 0),
        ("-(2 + 3) = ", "", -1),
        ("-(2 + 3) = ", "5", -2),
        ("-(2 + 3) = ", "-1 * 5 = -5", -3),
        ("-(2 + 3) = ", "-(5) = -5", -1),
        ("-((1 + 2) * 3) = ", "-(3 * 3) = -9", 0),
        ("-((1 + 2) * 3) = ", "(3 * 3) = 9", -4),
        ("-(2 + 3) * 4 = ", "-5 * 4 = -20", 0),
        ("-(2 + 3) * -(1 - 4) = ", "-(2 + 3) * 3 = -5 * 3 = -15", 0),
        ("7 - -(2 + 3) = ", "7 - -5 = 12", 0),
        ("-(-(2 + 3)) = ", "5", 0),
        ("+(2 + 3) = ", "5", 0),
        ("((1 * 2) * (8 + 5)) = ", "((1 * 2) * 13) = (2 * 13) = 26", 0),  # any order
        ("((1 * 2) * (8 + 5)) = ", "(2 * (8 + 5)) = (2 * 13) = 26", 0),
        ("((1 * 2) * (8 + 5)) = ", "(2 * 13) = 26", -5),  # two at once
        ("2 + 3 * 4 = ", "2 + 12 = 14", 0),
        ("2 + 3 * 4 = ", "5 * 4 = 20", -4),
        ("7 - 2 - 1 = ", "7 - 1 = 6", -4),  # minus binds to the left
        ("7 - 2 - 1", "5 - 1 = 4", 0),
    ],
)
def test_ours_by_hand(prompt, response, reward):
    assert text_function("math")([prompt], [response]) == [reward]


@pytest.mark.parametrize("prompt", ["5 = ", "(5) =", "-3", "hello", "", "1 + ", "1 / 2 =", "1 = 1 ="])
def test_a_prompt_that_asks_for_nothing_is_refused(prompt):
    with pytest.raises(ValueError, match="math wants a prompt"):
        text_function("math")([prompt], ["5"])


def test_the_best_is_nought_and_only_for_solutions():
    """Random expressions solved in random order get 0; the same with a character changed gets less."""
    dice, reward = random.Random(0), text_function("math")
    for _ in range(60):
        text = _expression(dice, 3)
        steps = _solved(dice, parsed(text))
        assert reward([f"{text} = "], [" = ".join(steps)]) == [0]
        wrong = list(" = ".join(steps))
        at = dice.choice([k for k, c in enumerate(wrong) if c.isdigit()])
        wrong[at] = str((int(wrong[at]) + dice.randint(1, 9)) % 10)
        (found,) = reward([f"{text} = "], ["".join(wrong)])
        assert found < 0 or parsed("".join(wrong).split("=")[-1]) == value(parsed(text))


def _expression(dice: random.Random, depth: int) -> str:
    if depth == 0:
        return str(dice.randint(1, 9))
    left, right = (_expression(dice, dice.randrange(depth)) for _ in "ab")
    return f"({left} {dice.choice('+-*')} {right})"


def _solved(dice: random.Random, found) -> list[str]:
    steps = []
    while isinstance(found, Operation):
        found = _step(dice, found)
        steps.append(_written(found))
    return steps


def _step(dice: random.Random, found: Operation):
    sides = [name for name in ("left", "right") if isinstance(getattr(found, name), Operation)]
    if not sides:
        return value(found)
    side = dice.choice(sides)
    done = {"left": found.left, "right": found.right} | {side: _step(dice, getattr(found, side))}
    return Operation(found.sign, done["left"], done["right"])


def _written(found) -> str:
    return (
        str(found) if isinstance(found, int) else f"({_written(found.left)} {found.sign} {_written(found.right)})"
    )


def test_expressions_are_read_as_arithmetic_has_them():
    for text in ("1 + 2 * 3", "(1 + 2) * 3", "7 - 2 - 1", "-(2 + 3) * 4", "- -3", "2 * -3 - +4", "((7))"):
        assert value(parsed(text)) == eval(text), text  # the test's own texts
    assert operations(parsed("(1 + 2) * (3 - 4)")) == 3
    assert reduces(parsed("1 + 2"), 3) and not reduces(3, 3) and not reduces(parsed("1 + 2"), parsed("1 + 2"))


@pytest.mark.parametrize(
    "text",
    [
        "9" * 16,
        "(" * 61 + "1" + ")" * 61,
        "-" * 70 + "1",
        "1 + " * 600 + "1",
        "9**9**9**9",
        "__import__",
        "1 2",
        "٣ + 1",
    ],
)
def test_what_is_too_large_or_no_expression_is_refused_at_once(text):
    begun = time.monotonic()
    with pytest.raises(ValueError):
        parsed(text)
    assert text_function("math")(["1 + 2 = "], [text]) == [-2]
    assert time.monotonic() - begun < 1
