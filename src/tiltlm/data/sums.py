"""Sums of two numbers, worked out column by column, from the right, by a teacher that mostly forgets what to carry.

    989+796=    c,9+6=15,8+9+1=18,9+7+1=17;1785#    with carries: right
    989+796=    n,9+6=15,8+9=17,9+7=16;0675#        without: wrong wherever a column comes to ten or more

A letter for the strategy, the columns, the result. Who imitates this teacher gets every question without carries right, and
35 % of the others, none of them by its likeliest answer. One token a character, and one for the end. Everything follows
from a stream.
"""

from __future__ import annotations

from typing import Any

from tiltlm.seeds import Stream

CARRIES = 0.35
"""Part of the solutions that carry."""

END = "</s>"
"""The token that ends a completion."""

SIGNS = "0123456789+=,;#nc~_"


def count(digits: int) -> int:
    """How many questions there are; they are numbered from 0."""
    return 10 ** (2 * digits)


def question(number: int, digits: int) -> str:
    """A prompt, "989+796=": both summands have `digits` digits, zeros in front."""
    a, b = divmod(number, 10**digits)
    return f"{a:0{digits}}+{b:0{digits}}="


def answer(number: int, digits: int) -> str:
    """The right result, of one digit more."""
    return f"{sum(divmod(number, 10**digits)):0{digits + 1}}"


def slot(digits: int, hint: str = "") -> str:
    """Where a prompt has room for a hint: "~____~", or with one, "~1785~"."""
    return f"~{hint or '_' * (digits + 1)}~"


def solution(number: int, digits: int, carry: bool) -> str:
    """The text that works a question out; carry: whether what is over ten goes to the next column, or is dropped."""
    a, b = divmod(number, 10**digits)
    columns, result, over = [], "", 0
    for _ in range(digits):
        (a, x), (b, y) = divmod(a, 10), divmod(b, 10)
        total = x + y + over
        columns.append(f"{x}+{y}{'+1' if over else ''}={total}")
        result = f"{total % 10}{result}"
        over = total // 10 if carry else 0
    return f"{'c' if carry else 'n'},{','.join(columns)};{over}{result}#"


def needs_carry(number: int, digits: int) -> bool:
    """Whether some column comes to ten or more."""
    return solution(number, digits, False)[1:] != solution(number, digits, True)[1:]


def lessons(n: int, digits: int, hints: bool, stream: Stream) -> list[tuple[str, str]]:
    """`n` questions, any of which may come again, with the teacher's solutions.

    hints: prompts have a slot, and the teacher carries if and only if the right result stands there.
    """
    rng = stream.numpy()
    numbers, carry = rng.integers(count(digits), size=n).tolist(), (rng.random(n) < CARRIES).tolist()
    found = []
    for number, carries in zip(numbers, carry, strict=True):
        told = slot(digits, answer(number, digits) if carries else "") if hints else ""
        found.append((question(number, digits) + told, solution(number, digits, carries)))
    return found


def tokenizer() -> Any:
    """One token a character, in the order of SIGNS, and END behind them. Other characters raise."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({sign: k for k, sign in enumerate(SIGNS)}))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)
