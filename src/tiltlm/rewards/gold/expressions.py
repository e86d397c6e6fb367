"""Sums and products of whole numbers: a parser that runs nothing, with limits on what it reads.

sum     =  product { (+ | -) product }
product =  factor { * factor }
factor  =  [+ | -] factor | number | ( sum )
"""

from __future__ import annotations

import re
from dataclasses import dataclass

LONGEST = 2000
"""Characters of an expression, at most."""
DEEPEST = 60
"""Parentheses and signs within one another, at most."""
DIGITS = 15
"""Digits of a number, at most."""

_TOKEN = re.compile(rf"\s*(?:(\d{{1,{DIGITS}}})(?!\d)|([-+*()]))", re.ASCII)


@dataclass(frozen=True)
class Operation:
    """left sign right."""

    sign: str
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Negative:
    """A minus in front of what is yet to be worked out: no operation of its own."""

    of: Expression


Expression = int | Negative | Operation


def parsed(text: str) -> Expression:
    """The expression that all of a text is. Raises ValueError for anything else, and beyond the limits."""
    return _Reader(_tokens(text)).whole()


def value(found: Expression) -> int:
    """What an expression comes to."""
    if isinstance(found, int):
        return found
    if isinstance(found, Negative):
        return -value(found.of)
    left, right = value(found.left), value(found.right)
    return {"+": left + right, "-": left - right, "*": left * right}[found.sign]


def operations(found: Expression) -> int:
    """How many operations are to be worked out."""
    if isinstance(found, int):
        return 0
    if isinstance(found, Negative):
        return operations(found.of)
    return 1 + operations(found.left) + operations(found.right)


def reduces(before: Expression, after: Expression) -> bool:
    """Whether `after` is `before` with exactly one operation, one on two numbers, worked out."""
    if isinstance(before, int):
        return False
    if isinstance(before, Negative):
        return not isinstance(after, Operation) and reduces(before.of, negated(after))
    if isinstance(before.left, int) and isinstance(before.right, int):
        return after == value(before)
    if not isinstance(after, Operation) or after.sign != before.sign:
        return False
    if after.right == before.right and reduces(before.left, after.left):
        return True
    return after.left == before.left and reduces(before.right, after.right)


def negated(found: Expression) -> Expression:
    """An expression with a minus in front, or without the one it has."""
    if isinstance(found, Negative):
        return found.of
    return -found if isinstance(found, int) else Negative(found)


def _tokens(text: str) -> list[str]:
    if len(text) > LONGEST:
        raise ValueError(f"an expression has {LONGEST} characters at most; this one {len(text)}")
    found, at, text = [], 0, text.strip()
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError(f"{text[at : at + 20]!r} is no number of up to {DIGITS} digits, sign or parenthesis")
        found.append(token[1] or token[2])
        at = token.end()
    return found


class _Reader:
    """Recursive descent over tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def taken(self) -> str:
        token = self.next
        self.at += 1
        return token

    def whole(self) -> Expression:
        found = self.sum()
        if self.next:
            raise ValueError(f"an expression ends before {self.next!r}")
        return found

    def sum(self) -> Expression:
        found = self.product()
        while self.next in ("+", "-"):
            found = Operation(self.taken(), found, self.product())
        return found

    def product(self) -> Expression:
        found = self.factor()
        while self.next == "*":
            found = Operation(self.taken(), found, self.factor())
        return found

    def factor(self) -> Expression:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"an expression is {DEEPEST} deep at most")
        found = self._inner(self.taken())
        self.depth -= 1
        return found

    def _inner(self, token: str) -> Expression:
        if token in ("+", "-"):
            inner = self.factor()
            return inner if token == "+" else negated(inner)
        if token == "(":
            found = self.sum()
            if self.taken() != ")":
                raise ValueError("a parenthesis is not closed")
            return found
        if not token.isdigit():
            raise ValueError(f"a number or a parenthesis is missing before {token or 'the end'!r}")
        return int(token)
