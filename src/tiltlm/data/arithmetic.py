"""Arithmetic of the project's own making: expressions in full parentheses, and how they are worked out step by step.

    ((8 + 5) * 2) = (13 * 2) = 26

Operands are 1 to 9, signs + − *, at most two operations within one another, and the answer lies within ±98, as in D2PO's
task (Singhal et al. 2024, arXiv:2405.01511). Everything follows from a stream.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tiltlm.seeds import Stream

DEPTH, OPERANDS, LARGEST = 2, 9, 98

WRONG = 0.3
"""Part of the worked solutions in which one step is wrong."""

OFF = 9
"""By how much, at most."""


class Operation(NamedTuple):
    """left sign right."""

    sign: str
    left: Expression
    right: Expression


Expression = int | Operation


def question(rng: np.random.Generator) -> str:
    """A prompt, "((8 + 5) * 2) = "."""
    return f"{written(_expression(rng))} = "


def solutions(n: int, stream: Stream) -> list[str]:
    """`n` expressions with their solutions; in three of ten one step is wrong, and what follows goes on from there."""
    rng = stream.numpy()
    return [_solution(rng) for _ in range(n)]


def written(found: Expression) -> str:
    """An expression as text, every operation in parentheses."""
    return str(found) if isinstance(found, int) else f"({written(found.left)} {found.sign} {written(found.right)})"


def value(found: Expression) -> int:
    """What an expression comes to."""
    if isinstance(found, int):
        return found
    left, right = value(found.left), value(found.right)
    return {"+": left + right, "-": left - right, "*": left * right}[found.sign]


def step(found: Operation, off: int = 0) -> Expression:
    """An expression with the first operation on two numbers worked out, wrong by `off`."""
    if isinstance(found.left, Operation):
        return found._replace(left=step(found.left, off))
    if isinstance(found.right, Operation):
        return found._replace(right=step(found.right, off))
    return value(found) + off


def _expression(rng: np.random.Generator) -> Operation:
    """An operation whose answer is small enough."""
    while True:
        found = _operation(rng, DEPTH)
        if abs(value(found)) <= LARGEST:
            return found


def _operation(rng: np.random.Generator, depth: int) -> Operation:
    sign = "+-*"[rng.integers(3)]
    left, right = (_operand(rng, depth - 1) for _ in range(2))
    return Operation(sign, left, right)


def _operand(rng: np.random.Generator, depth: int) -> Expression:
    if depth and rng.random() < 0.5:
        return _operation(rng, depth)
    return int(rng.integers(1, OPERANDS + 1))


def _solution(rng: np.random.Generator) -> str:
    now: Expression = _expression(rng)
    text = written(now)
    wrong = int(rng.integers(text.count("("))) if rng.random() < WRONG else -1
    for k in range(text.count("(")):
        assert isinstance(now, Operation)
        off = int(rng.integers(1, OFF + 1)) * (1 if rng.random() < 0.5 else -1)
        now = step(now, off if k == wrong else 0)
        text += f" = {written(now)}"
    return text
