"""Arithmetic of the project's own making: what is asked, and how it is worked out."""

from __future__ import annotations

import re
from itertools import pairwise

from tiltlm.data.arithmetic import Operation, question, solutions, step, value, written
from tiltlm.data.own_prompts import own_prompts
from tiltlm.seeds import stream

DEEP = Operation("*", Operation("+", 8, 5), Operation("-", 1, 4))


def evaluated(text: str) -> int:
    """By Python, of text that is arithmetic alone."""
    assert re.fullmatch(r"[0-9+\-*() ]+", text)
    return int(eval(text, {"__builtins__": {}}))


def test_steps_work_out_the_first_operation_on_two_numbers():
    assert written(DEEP) == "((8 + 5) * (1 - 4))" and value(DEEP) == -39
    first = step(DEEP)
    assert first == Operation("*", 13, Operation("-", 1, 4)) and written(first) == "(13 * (1 - 4))"
    assert step(first) == Operation("*", 13, -3) and step(step(first)) == -39
    assert step(Operation("-", 1, 4), off=2) == -1


def test_questions_are_small_and_differ():
    asked = own_prompts("arithmetic:500")
    assert asked is not None and len(set(asked)) == 500
    for text in asked:
        expression = text.removesuffix(" = ")
        assert text.endswith(" = ") and abs(evaluated(expression)) <= 98
        assert 1 <= expression.count("(") <= 3 and set(re.findall(r"\d+", expression)) <= set("123456789")
    assert any("((" in text for text in asked) and any(text.count("(") == 1 for text in asked)
    assert question(stream(0, "prompts", "arithmetic").numpy()) == asked[0]


def test_three_in_ten_of_the_solutions_have_one_wrong_step_and_go_on_from_there():
    wrong = []
    for text in solutions(1000, stream(0, "solutions")):
        parts = text.split(" = ")
        assert len(parts) == parts[0].count("(") + 1
        values = [evaluated(part) for part in parts]
        wrong.append(sum(a != b for a, b in pairwise(values)))
        assert parts[-1] == str(values[-1])
    assert max(wrong) == 1 and 0.25 < sum(wrong) / len(wrong) < 0.35
