"""Functions of one's own as rewards: how they are called, what they may return, and sums of rewards."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from command import tiltlm
from tiltlm.commands.score import score
from tiltlm.rewards.by_name import TextReward, files_of, text_function
from tiltlm.rewards.numbers import as_numbers
from tiltlm.rewards.terms import Term, terms_of
from tiltlm.seeds import stream
from tiltlm.stages.draws import labels, short_numbers
from toy_world import Toy

ASKED, SAID = ["x", "yy"], ["a", "bbb"]


def named(tmp_path: Path, source: str, name: str = "f") -> str:
    (tmp_path / "own.py").write_text(source)
    return f"{tmp_path}/own.py:{name}"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the signature ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("prompts, completions", "len(x) + 10 * len(y)"),
        ("asked, said", "len(x) + 10 * len(y)"),
        ("completions, prompts", "len(x) + 10 * len(y)"),  # by name: their order is free
        ("completions, **columns", "len(x) + 10 * len(y)"),
        ("a, b, /", "len(x) + 10 * len(y)"),
        ("*both", "len(x) + 10 * len(y)"),
        ("*, completions, prompts", "len(x) + 10 * len(y)"),
        ("prompts, completions, missing=1", "len(x) + 10 * len(y)"),
    ],
)
def test_prompts_and_completions_arrive_in_their_places(tmp_path, head, body):
    names = {"asked, said": "asked, said", "a, b, /": "a, b", "*both": "*both"}.get(head, "prompts, completions")
    if head == "completions, **columns":
        names = "columns['prompts'], completions"
    source = f"def f({head}):\n    return [{body} for x, y in zip({names})]\n"
    assert text_function(named(tmp_path, source))(ASKED, SAID) == [11.0, 32.0]


@pytest.mark.parametrize(
    ("head", "seen"),
    [
        ("prompts, completions", []),
        ("prompts, completions, answer", ["answer"]),
        ("prompts, completions, *, level=0, absent=0", ["level"]),
        ("x, y, answer, **more", ["answer", "level"]),
        ("prompts, completions, **columns", ["answer", "level"]),
    ],
)
def test_a_function_gets_the_columns_that_it_takes(tmp_path, head, seen):
    source = (
        f"def f({head}):\n    SEEN.append({{k: v for k, v in locals().items()}})\n    return [0, 1]\nSEEN = []\n"
    )
    reward = text_function(named(tmp_path, source))
    columns = {"answer": ["1", "2"], "level": [3, 4]}
    assert reward(ASKED, SAID, columns) == [0.0, 1.0]
    (own,) = reward.rewards[0].call.function.__globals__["SEEN"]
    given = {**own, **own.get("more", {}), **own.get("columns", {})}
    assert {k: v for k, v in given.items() if k in columns and v == columns[k]} == {k: columns[k] for k in seen}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "def f(rows): return [0]",
            r"takes one argument \(rows\): a reward is f\(prompts, completions, \*\*columns\)",
        ),
        ("def f(completions): return [0]", r"takes one argument \(completions\): a reward is"),
        ("def f(): return [0]", "takes no argument: a reward is"),
        ("def f(a, b, c, /): return [0]", "'c' by position alone, and columns are given by name"),
        ("f = 3", "has no function 'f'"),
        ("import nowhere_at_all", "own.py:1 cannot be imported: ModuleNotFoundError"),
        ("def f(:", "own.py:1 cannot be imported: SyntaxError"),
        ("x = 1\ny = 1 / 0", "own.py:2 cannot be imported: ZeroDivisionError"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_it_is(tmp_path, source, said):
    with pytest.raises(ValueError, match=said):
        text_function(named(tmp_path, source))


def test_a_dataclass_in_the_file_and_an_object_that_can_be_called(tmp_path):
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Longer:\n    by: int\n"
        "    def __call__(self, prompts, completions):\n        return [len(y) + self.by for y in completions]\n"
        "f = Longer(2)\n"
    )
    assert text_function(named(tmp_path, source))(ASKED, SAID) == [3.0, 5.0]


# ---- what may be returned -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        [1, 0],
        (True, False),
        torch.tensor([1.0, 0.0]),
        torch.tensor([True, False]),
        torch.tensor([1, 0], dtype=torch.bfloat16),
        torch.tensor([1.0, 0.0], requires_grad=True),
        np.array([1.0, 0.0], dtype=np.float32),
        [np.float32(1), np.bool_(False)],
        [torch.tensor(1.0), np.array(0)],
        {1: "a", 0: "b"}.keys(),
        map(int, "10"),
    ],
)
def test_numbers_of_every_make(value):
    if isinstance(value, type({}.keys())):
        with pytest.raises(ValueError, match="must return one number for each completion, as a list"):
            as_numbers("r", value, SAID)
        return
    found = as_numbers("r", value, SAID)
    assert found == [1.0, 0.0] and all(type(x) is float for x in found)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([1, None], r"r gave row 1 \('bbb'\) the reward None: every completion needs a number"),
        ([1, math.nan], r"gave row 1 \('bbb'\) the reward nan"),
        (torch.tensor([math.inf, 0]), r"gave row 0 \('a'\) the reward inf: rewards are finite"),
        ([0, -math.inf], r"the reward -inf: rewards are finite \(what must never be said costs"),
        ([1, 10**400], "the reward inf"),
        ([1], "returned 1 numbers for 2 completions"),
        ([1, 2, 3], "returned 3 numbers for 2 completions"),
        ([[1], [2]], r"gave row 0 \('a'\) the reward \[1\] \(list\), no number"),
        (torch.zeros(2, 1), r"gave row 0 \('a'\) the reward \[0.0\] \(list\), no number"),
        (["1", 2], r"the reward '1' \(str\), no number"),
        ([1 + 0j, 2], r"no number"),
        (None, "it returned NoneType None"),
        (0.5, "it returned float 0.5"),
        ("12", "it returned str '12'"),
        ({"rewards": [1, 2]}, "it returned dict"),
        (torch.tensor(1.0), "it returned the single number"),
    ],
)
def test_what_is_no_list_of_finite_numbers_is_named_with_its_row(value, said):
    with pytest.raises(ValueError, match=said):
        as_numbers("r", value, SAID)


def test_a_generator_s_own_mistake_is_named_by_its_line(tmp_path):
    name = named(
        tmp_path, "def f(prompts, completions):\n    for y in completions:\n        yield 1 / (len(y) - 3)\n"
    )
    assert text_function(name)(["x"], ["a"]) == [-0.5]
    with pytest.raises(ValueError, match=r"own\.py:f failed at line 3: ZeroDivisionError"):
        text_function(name)(ASKED, SAID)


# ---- sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a.py:f", [(1, "a.py:f")]),
        ("a.py:f + 0.5*classifier:M:POS", [(1, "a.py:f"), (0.5, "classifier:M:POS")]),
        ("2 * a.py:f - b.py:g", [(2, "a.py:f"), (-1, "b.py:g")]),
        ("-1e-1*a.py:f  -  .5*b.py:g", [(-0.1, "a.py:f"), (-0.5, "b.py:g")]),
        ("c++/a+b.py:f", [(1, "c++/a+b.py:f")]),
        ("a-b.py:f + reward-model:x/y-z", [(1, "a-b.py:f"), (1, "reward-model:x/y-z")]),
        ("https://h/a*b?q=1+2", [(1, "https://h/a*b?q=1+2")]),
        ("2*https://h/3*x + a.py:f", [(2, "https://h/3*x"), (1, "a.py:f")]),
        ("'my + file.py:f' - 2*\"b c.py:g\"", [(1, "my + file.py:f"), (-2, "b c.py:g")]),
        ("a.py:f + 2*a.py:f", [(3, "a.py:f")]),
        ("my folder/a.py:f", [(1, "my folder/a.py:f")]),
    ],
)
def test_a_sum_is_read_as_it_is_meant(text, terms):
    assert list(terms_of(text)) == [Term(*term) for term in terms]


@pytest.mark.parametrize("text", ["", "a.py:f + ", "+ ", "2*"])
def test_what_is_no_sum_says_how_one_looks(text):
    with pytest.raises(ValueError, match=r"sum of rewards is NAME \+ 0.5\*NAME|there is no reward"):
        text_function(text)


def test_a_sum_may_be_longer_than_a_path():
    names = [f"{'x' * 90}{k}.py:f" for k in range(60)]
    assert [term.name for term in terms_of(" + ".join(names))] == names
    with pytest.raises(FileNotFoundError, match="no such file"):
        text_function("x" * 5000 + ".py:f")


def test_a_file_with_a_sign_in_its_name_is_no_sum(tmp_path):
    (tmp_path / "my + 2*own.py").write_text("def f(prompts, completions): return [len(y) for y in completions]\n")
    assert text_function(f"{tmp_path}/my + 2*own.py:f")(ASKED, SAID) == [1.0, 3.0]
    assert files_of(f"{tmp_path}/my + 2*own.py:f") == [f"{tmp_path}/my + 2*own.py"]


def test_a_sum_is_the_weighted_sum_and_keeps_its_terms(tmp_path):
    source = (
        "def f(prompts, completions): return [len(y) for y in completions]\n"
        "def g(prompts, completions, answer): return [y == a for y, a in zip(completions, answer)]\n"
    )
    f, g = named(tmp_path, source), f"{tmp_path}/own.py:g"
    reward = text_function(f"{f} - 0.5*{g}")
    found = reward.judged(ASKED, SAID, {"answer": ["a", "c"]})
    assert found.total == [0.5, 3.0] and found.terms == {f: [1.0, 3.0], g: [1.0, 0.0]}
    assert (
        reward.labels == (f, g)
        and text_function(f).labels == ()
        and files_of(f"{f} - 0.5*{g}") == [f"{tmp_path}/own.py"] * 2
    )
    with pytest.raises(ValueError, match=r"own.py:g takes the column 'answer', and none is here"):
        reward.check_columns(("other",), "none is here")


def test_a_sum_has_a_bound_if_every_term_has_one(tmp_path):
    f = named(tmp_path, "def f(prompts, completions): return [0] * len(completions)")
    assert text_function("exact-answer").most == 1.0 and text_function("3*exact-answer").most == 3.0
    assert text_function("-3*exact-answer").most == 0.0  # the least of it is 0
    assert text_function(f"exact-answer + {f}").most == math.inf == text_function(f"exact-answer - {f}").most
    assert text_function(f"exact-answer + 0*{f}").most == 1.0


def test_terms_are_remembered_for_reports_and_columns_come_from_the_prompt_s_row(tmp_path):
    source = (
        "CALLS = []\ndef f(prompts, completions, answer):\n    CALLS.append(len(completions))\n"
        "    return [float(y == a) for y, a in zip(completions, answer)]\n"
        "def g(prompts, completions): return [len(y) for y in completions]\n"
    )
    f, g = named(tmp_path, source), f"{tmp_path}/own.py:g"
    about = {"x": {"answer": "a"}, "yy": {"answer": "c"}}
    reward = TextReward(f"{f} + 2*{g}", None, about=about.__getitem__)
    assert reward.of(ASKED, SAID) == [3.0, 6.0]
    assert reward.terms(["yy", "x", "x"], ["bbb", "a", "zz"]) == {f: [0.0, 1.0, 0.0], g: [3.0, 1.0, 2.0]}
    calls = reward.function.rewards[0].call.function.__globals__["CALLS"]
    assert calls == [2, 1]  # the one pair that had not been judged before


def test_labels_are_written_with_the_digits_that_the_reward_gave():
    """Rewards are float32; the shortest text of the same float32 is what a function of one's own returned."""
    said = [0.1, -2.3, 1e-7, 5.0, 123456.7, 3.1]
    assert short_numbers(torch.tensor(said)) == said == short_numbers(torch.tensor(said, dtype=torch.float64))
    assert short_numbers(torch.tensor([True, False])) == [1.0, 0.0]
    noise = stream(0, "labels").uniform(range(100), 1)[:, 0].float()
    assert torch.equal(torch.tensor(short_numbers(noise), dtype=torch.float32), noise)
    problem = Toy().problem({}, 0)
    reward = replace(problem.target, reward=lambda samples: torch.full((len(samples),), 0.1))
    problem = replace(
        problem, target=reward, checks={"reward[mine.py:f]": lambda samples: samples.tokens[:, 0] / 10}
    )
    rows = [{"completion_ids": [[0, 1], [1, 2], [2, 2]], "finished": [False] * 3} for _ in range(6)]
    for row in labels(problem, "train", rows)(0, 6):
        assert json.dumps(row["rewards"]) == "[0.1, 0.1, 0.1]"
        assert json.dumps(row["reward_terms"]) == '{"mine.py:f": [0.0, 0.1, 0.2]}'


# ---- the command --------------------------------------------------------------------------------------------

OWN = """
def right(prompts, completions, answer, level=None):
    return [(y == a) * k for y, a, k in zip(completions, answer, level or [1] * len(answer))]

def length(prompts, completions):
    return [len(y) for y in completions]

def ids(prompts, completions, completion_ids):
    return [sum(x) for x in completion_ids]
"""


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_score_writes_every_term_of_a_sum_beside_it(place):
    rows = [
        {"prompt": "x", "completion": "a", "answer": "a", "level": 3},
        {"prompt": "y", "completions": ["b", "cc"], "answer": "cc", "level": 2},
    ]
    (place / "y.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = tiltlm("score", "own.py:right - 0.5*own.py:length", "y.jsonl", "--out", "s.jsonl", cwd=place)
    one, many = lines(place / "s.jsonl")
    assert one == rows[0] | {"reward": 2.5, "reward_terms": {"own.py:right": 3.0, "own.py:length": 1.0}}
    terms = {"own.py:right": [0.0, 2.0], "own.py:length": [1.0, 2.0]}
    assert many == rows[1] | {"rewards": [-0.5, 1.0], "reward_terms": terms}
    assert "own.py:right 1.6667, own.py:length 1.3333" in done.stderr
    tiltlm("score", "own.py:right", "y.jsonl", "--out", "t.jsonl", cwd=place)
    assert lines(place / "t.jsonl")[0] == rows[0] | {"reward": 3.0}


def test_what_a_line_lacks_is_named_by_its_place(place):
    (place / "y.jsonl").write_text(
        '{"prompt": "x", "completion": "a", "answer": "a"}\n{"prompt": "x", "completion": "b"}\n'
    )
    done = tiltlm("score", "own.py:right", "y.jsonl", "--out", "s.jsonl", cwd=place, check=False)
    assert (
        done.returncode == 2 and "y.jsonl:2: column 'answer', which this reward takes, is missing" in done.stderr
    )
    done = tiltlm("score", "own.py:ids", "y.jsonl", "--out", "s.jsonl", cwd=place, check=False)
    assert done.returncode == 2 and "takes the column 'completion_ids', and the lines have answer" in done.stderr
    for bad, said in (
        ('{"prompt": "x"}', "y.jsonl:1: column 'completion' is missing; this line has prompt"),
        ('{"prompt": "x", "completions": true}', "y.jsonl:1: 'completions' must be a list of texts; it is bool"),
    ):
        (place / "y.jsonl").write_text(bad + "\n")
        done = tiltlm("score", "own.py:length", "y.jsonl", "--out", "s.jsonl", cwd=place, check=False)
        assert done.returncode == 2 and said in done.stderr
    assert not (place / "s.jsonl").exists()


def test_of_a_group_every_completion_has_its_own_ids(place):
    """What `tiltlm sample --grouped` writes: lists beside the completions belong to them one by one."""
    row = {
        "prompt": [1],
        "completions": ["a", "b"],
        "completion_ids": [[1, 2], [9]],
        "answer": [9],
        "sizes": [1, 2],
    }
    (place / "y.jsonl").write_text(json.dumps(row) + "\n")
    tiltlm("score", "own.py:ids", "y.jsonl", "--out", "s.jsonl", cwd=place)
    assert lines(place / "s.jsonl")[0]["rewards"] == [3.0, 9.0]
    tiltlm("score", "exact-answer", "y.jsonl", "--out", "t.jsonl", cwd=place)
    assert lines(place / "t.jsonl")[0]["rewards"] == [0.0, 1.0]


def test_text_is_not_compared_to_token_ids(place):
    (place / "y.jsonl").write_text('{"completion": "9", "answer": [9]}\n')
    done = tiltlm("score", "exact-answer", "y.jsonl", "--out", "s.jsonl", cwd=place, check=False)
    assert done.returncode == 2 and "text to text, or token ids to token ids" in done.stderr


def test_a_file_without_lines_has_no_mean_reward(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no lines: there is nothing to score"):
        score(["exact-answer", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()
