"""Paired accuracies: McNemar and power by hand, the top group's error rate by simulation; `compare`, `power`, sweeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import toy_world
from command import tiltlm
from tiltlm.commands.models import load_run
from tiltlm.commands.observed import Observed, of_file, of_runs, shared
from tiltlm.commands.run import grid
from tiltlm.ruler.compare import difference_of, holm, paired
from tiltlm.ruler.intervals import bootstrap_t, of_mean, wilson
from tiltlm.ruler.mcnemar import McNemar
from tiltlm.ruler.measure import Measurement
from tiltlm.ruler.power import (
    before_a_run,
    discordance_of_samples,
    least_difference,
    normal_errors,
    questions_needed,
)
from tiltlm.ruler.standing import standings
from tiltlm.seeds import stream

ROOT = stream(23, "test-statistics")


def answers(both: int, first: int, second: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right and wrong answers of two models with these counts."""
    one = [1.0] * (both + first) + [0.0] * (second + neither)
    other = [1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither
    return torch.tensor(one), torch.tensor(other)


# ---- one accuracy, two, several -------------------------------------------------------------------------------------


def test_wilson_of_1404_questions():
    """z²/n = 0.0027361: middle (0.65 + 0.001368)/1.0027361 = 0.649591, half 1.96·√(0.2275/1404 + 4.87e-7)/1.0027361."""
    assert wilson(0.65, 1404) == pytest.approx((0.6247, 0.6745), abs=5e-5)
    found = of_mean(answers(913, 0, 0, 491)[0], rate=True)  # 913 of 1404: 0.65028
    assert found.kind == "Wilson" and (found.low, found.high) == pytest.approx(wilson(913 / 1404, 1404))


def test_mcnemar_by_hand():
    """5 against 1: P(Bin(6, ½) ≤ 1) = (1 + 6)/64, twice that is 7/32. 3 against 3: more than 1 is 1. 8 against 0: 2/256."""
    found = McNemar.of(*answers(10, 5, 1, 4))
    assert found == McNemar(10, 5, 1, 4) and found.p == pytest.approx(7 / 32)
    assert found.n == 20 and found.discordance == pytest.approx(0.3)
    assert McNemar(0, 3, 3, 0).p == 1.0 and McNemar(7, 0, 0, 2).p == 1.0
    assert McNemar(0, 0, 8, 0).p == pytest.approx(2 / 256)


def test_right_and_wrong_are_tested_by_mcnemar_and_averages_by_student_s_t():
    one, other = answers(10, 5, 1, 4)
    (found,) = paired(Measurement({"accuracy": one.double()}), Measurement({"accuracy": other.double()}))
    assert (found.test, found.p) == ("exact McNemar", pytest.approx(7 / 32))
    assert found.estimate.value == pytest.approx(4 / 20)
    halves = difference_of("accuracy", one / 2, other)
    assert halves.test == "Student's t"


@pytest.mark.parametrize("n", [12, 400])
def test_mcnemar_s_false_verdicts(n):
    """Two models that are right with chance 0.6: at most 5% + 4 s.e.; with many questions not far less."""
    right = (ROOT.child("null", n).uniform(range(4000), n) < 0.6).double().reshape(2000, 2, n)
    share = sum(McNemar.of(*pair).p <= 0.05 for pair in right) / 2000
    assert share <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000)
    assert n == 12 or share > 0.02


def test_the_paired_bootstrap_covers_a_difference_of_averages():
    """Two averages of four answers to each of 60 questions of unlike difficulty, the second 0.05 better: 500 intervals."""
    p = 0.9 * ROOT.child("difficulty").uniform(range(500), 60)
    draws = [ROOT.child("answers", k).uniform(range(500), 240).reshape(500, 60, 4) for k in (0, 1)]
    first, second = (
        (u < (p + shift)[..., None]).double().mean(2) for u, shift in zip(draws, (0.0, 0.05), strict=True)
    )
    ends = [bootstrap_t(apart) for apart in second - first]
    held = sum(low <= 0.05 <= high for low, high in ends) / 500
    assert 0.95 - 4 * math.sqrt(0.05 * 0.95 / 500) <= held <= 0.99


def test_the_best_and_what_is_not_told_apart_from_it():
    """100 questions. a right on 80; b on 79 of them; c on 30 of them: b − a has one discordant question, c − a fifty."""
    a, b, c = ((torch.arange(100) < k).double() for k in (80, 79, 30))
    found = standings({"c": c, "a": a, "b": b})
    assert [(each.name, each.top) for each in found] == [("a", True), ("b", True), ("c", False)]
    assert found[0].behind is None and found[1].behind.p == 1.0
    assert found[2].behind.p == pytest.approx(3 * 2 * 0.5**50) and found[2].behind.together == 3
    assert found[2].behind.estimate.value == pytest.approx(-0.5)
    assert (found[0].interval.low, found[0].interval.high) == pytest.approx(wilson(0.8, 100))


def test_of_nine_equal_models_none_is_told_apart_from_the_best_nineteen_times_in_twenty():
    """By Holm over all 36 pairs. Over the eight pairs with the best, chosen by the same answers: one in eight."""
    draws = torch.randn(150, 9, 60, generator=ROOT.child("equal").generator(), dtype=torch.float64)
    families = [{str(k): x for k, x in enumerate(each)} for each in draws]
    found = [standings(each) for each in families]
    apart = sum(not all(each.top for each in some) for some in found)
    with_best = sum(
        any(d.p <= 0.05 for d in holm([difference_of("", each[s.name], each[some[0].name]) for s in some[1:]]))
        for each, some in zip(families, found, strict=True)
    )
    assert apart <= 150 * (0.05 + 4 * math.sqrt(0.05 * 0.95 / 150)) and apart < with_best and with_best > 10


# ---- power ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("discordance", "points", "questions"), [(0.1, 2.36, 7849), (0.2, 3.34, 15698), (0.3, 4.10, 23547)]
)
def test_what_1404_questions_show(discordance, points, questions):
    assert 100 * least_difference(1404, discordance) == pytest.approx(points, abs=0.005)
    assert questions_needed(0.01, discordance) == questions


@pytest.mark.parametrize(("samples", "points"), [(1, 3.5), (4, 1.75), (10, 1.1)])
def test_what_averages_of_samples_show(samples, points):
    """E[p(1 − p)] = 0.11: two samples of one model disagree on 22% of the questions."""
    found = least_difference(1404, discordance_of_samples(0.11, samples))
    assert 100 * found == pytest.approx(points, abs=0.01)


def test_the_least_difference_is_shown_four_times_in_five():
    """2000 comparisons on 1000 questions of which a fifth is discordant, split so that the accuracies differ by the least
    difference: McNemar shows 80% ± 4 s.e. (3.6%), and 2% for its discreteness and for taking d without its square."""
    n, d = 1000, 0.2
    size = least_difference(n, d)
    u = ROOT.child("power").uniform(range(2000), n)
    first, second = u < (d + size) / 2, u > 1 - (d - size) / 2
    shown = sum(McNemar.of(a.double(), b.double()).p <= 0.05 for a, b in zip(first, second, strict=True)) / 2000
    assert abs(shown - 0.8) < 4 * math.sqrt(0.16 / 2000) + 0.02


def test_the_line_before_a_run():
    assert normal_errors() == pytest.approx(2.802, abs=5e-4)
    said = before_a_run(1404, 0.2)
    assert "1,404 questions" in said and "3.34 points" in said and "15,698" in said


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (lambda: least_difference(0, 0.2), "one question or more; got 0"),
        (lambda: least_difference(10, 1.5), "at most 1; got 1.5"),
        (lambda: questions_needed(0.0, 0.2), "above 0"),
        (lambda: discordance_of_samples(0.4, 1), "at most 0.25; got 0.4"),
        (lambda: discordance_of_samples(0.1, 0), "1 sample a question or more; got 0"),
    ],
)
def test_what_has_no_power(asked, told):
    with pytest.raises(ValueError, match=told):
        asked()


# ---- joined by question ---------------------------------------------------------------------------------------------


def observed(questions: list[str], x: list[float], name: str = "a") -> Observed:
    return Observed(name, questions, Measurement({"accuracy": torch.tensor(x).double()}))


def test_questions_are_joined_by_name_and_not_by_place():
    """Shared: r and q, in the first one's order; p and s are in one of the two alone."""
    one, other = shared([observed(["p", "r", "q"], [1, 0, 1]), observed(["q", "s", "r"], [0, 1, 1])])
    assert one.questions == other.questions == ["r", "q"]
    assert one.measurement.values["accuracy"].tolist() == [0, 1]
    assert other.measurement.values["accuracy"].tolist() == [1, 0]
    with pytest.raises(
        ValueError, match="a has 1 questions, like 'p'; b has 1 questions, like 's': none is in all"
    ):
        shared([observed(["p"], [1]), observed(["s"], [1], "b")])


def test_rows_of_one_question_are_its_samples(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"index": 7, "score": 1}\n{"index": 7, "score": 0}\n{"index": 3, "scores": [1, 1]}\n'
    )
    (tmp_path / "b.csv").write_text('indices,scores,raw_responses\n3,1.0,"so, A"\n7,False,"B"\n')
    found = [of_file(tmp_path / name) for name in ("a.jsonl", "b.csv")]
    assert [each.questions for each in found] == [["7", "3"], ["3", "7"]]
    assert [each.measurement.values["accuracy"].tolist() for each in found] == [[0.5, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            '{"id": 1, "score": 1}\n',
            "a.jsonl:1: a row needs one of the columns index, indices, prompt; this one has id",
        ),
        ('{"index": 1, "grade": 1}\n', "score, scores, reward, rewards; this one has index, grade"),
        (
            '{"index": 1, "score": 1}\n{"index": 2, "score": "A"}\n',
            "a.jsonl:2: 'score' is a number for each answer",
        ),
        ('{"index": 1, "score": null}\n', "got None"),
        ('{"index": 1, "scores": []}\n', "a question without scores"),
        ("", "has no rows"),
    ],
)
def test_what_is_no_file_of_scores(text, told, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        of_file(path)
    assert told in str(error.value)


# ---- commands -------------------------------------------------------------------------------------------------------


def test_two_files_of_scores_are_compared(tmp_path):
    """40 shared questions in other orders: the first alone right on 9, the second on 1: P(Bin(10, ½) ≤ 1)·2 = 22/1024."""
    one, other = ([int(x) for x in row] for row in answers(20, 9, 1, 10))
    (tmp_path / "a.jsonl").write_text("".join(f'{{"index": {k}, "score": {x}}}\n' for k, x in enumerate(one)))
    rows = [f"{k},{x}\n" for k, x in enumerate(other)][::-1]
    (tmp_path / "b.csv").write_text("indices,scores\n" + "99,1\n" + "".join(rows))
    shown = tiltlm("compare", "a.jsonl", "b.csv", cwd=tmp_path).stdout
    assert "40 questions shared (of 40 and 41)" in shown and "exact McNemar" in shown
    assert "both right 20, the first alone 9, the second alone 1, neither 10" in shown
    low, high = wilson(29 / 40, 40)
    assert f"0.7250 [{low:.4f}, {high:.4f}]" in shown and "+0.2000" in shown
    assert f"{22 / 1024:.3f}" in shown and "higher" in shown


def refused(*args: str, cwd: Path) -> str:
    found = tiltlm(*args, cwd=cwd, check=False)
    assert found.returncode == 2 and found.stderr.count("\n") == 1, found
    return found.stderr


def test_what_cannot_be_compared(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"index": 1, "score": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"index": 2, "score": 1}\n{"index": 3, "score": 0}\n')
    assert "none is in all of them" in refused("compare", "a.jsonl", "b.jsonl", cwd=tmp_path)
    assert "a run is compared with a run" in refused("compare", "a.jsonl", ".", cwd=tmp_path)
    assert "two shared questions or more" in refused("compare", "a.jsonl", "a.jsonl", cwd=tmp_path)
    assert "no such file" in refused("compare", "a.jsonl", "c.jsonl", cwd=tmp_path)
    assert "Did you mean accuracy?" in refused(
        "compare", "b.jsonl", "b.jsonl", "--metrics", "acuracy", cwd=tmp_path
    )


@pytest.fixture
def toy(monkeypatch) -> None:
    toy_world.install(monkeypatch)


def done(*args: str, cwd: Path) -> Path:
    """The folder of the run that a command ends with."""
    return cwd / tiltlm("run", *args, cwd=cwd).stdout.splitlines()[-1]


QUICK = ("--fit.steps", "3", "--ruler.n", "20")


def test_two_runs_are_compared_on_the_prompts_that_both_have(toy, tmp_path):
    """Six prompts and four of them; the same measurement with itself is identical."""
    whole = done("toy/reference", "--ruler.n", "20", cwd=tmp_path)
    part = done("toy/dpo", *QUICK, "--ruler.prompts", "4", cwd=tmp_path)
    shown = tiltlm("compare", str(whole), str(part), "--metrics", "reward", cwd=tmp_path).stdout
    assert "4 questions shared (of 6 and 4)" in shown
    values = [Measurement.load(run / "measurement.safetensors").values["reward"] for run in (whole, part)]
    assert f"{float((values[0][:4] - values[1]).mean()):+.4f}" in shown
    assert "identical" in tiltlm("compare", str(whole), str(whole), cwd=tmp_path).stdout
    evaluated = done("toy/evaluate", "--methods", "reference", "best-of-n", "--ruler.n", "20", cwd=tmp_path)
    assert "holds no measurement of its own; it is made of" in refused(
        "compare", str(evaluated), str(whole), cwd=tmp_path
    )


def test_runs_whose_prompts_differ_are_joined_by_the_questions_ids(toy, tmp_path):
    whole = done("toy/reference", "--ruler.n", "20", cwd=tmp_path)
    part = done("toy/dpo", *QUICK, "--ruler.prompts", "3", cwd=tmp_path)
    asked = {30: "A", 10: "B", 20: "C", 40: "D", 50: "A", 60: "B", 70: "C"}
    (whole / "questions.json").write_text(json.dumps([[k, asked[k]] for k in (30, 10, 20, 40, 50, 60)]))
    (part / "questions.json").write_text(json.dumps([[k, asked[k]] for k in (10, 70, 30)]))
    one, other = shared(of_runs([load_run(whole), load_run(part)]))
    assert one.questions == ["30", "10"]
    values = [Measurement.load(run / "measurement.safetensors").values["reward"] for run in (whole, part)]
    assert torch.equal(one.measurement.values["reward"], values[0][:2])
    assert torch.equal(other.measurement.values["reward"], values[1][[2, 0]])
    (part / "questions.json").write_text(json.dumps([[10, "A"], [70, "C"], [30, "A"]]))
    assert "question 10 has the right answer 'A'" in refused("compare", str(whole), str(part), cwd=tmp_path)
    (part / "questions.json").write_text("[1, 2, 3]")
    assert "no list of questions, [index, answer]" in refused("compare", str(whole), str(part), cwd=tmp_path)


def test_power_is_said_before_a_run(tmp_path):
    shown = tiltlm("power", "--questions", "1404", cwd=tmp_path).stdout
    for number in ("2.36", "3.34", "4.10", "7,849", "15,698", "23,547"):
        assert number in shown
    shown = tiltlm("power", "--questions", "1404", "--samples", "4", "--disagreement", "0.11", cwd=tmp_path).stdout
    assert "1.75" in shown and "4,317" in shown  # 2.8016²·0.055/0.01² = 4316.9
    assert "belong together" in refused("power", "--questions", "9", "--samples", "4", cwd=tmp_path)


def test_the_values_of_a_sweep_s_axis_may_be_the_lines_of_a_file(tmp_path):
    """Commas, and what looks like an option, are text; empty lines are none."""
    path = tmp_path / "prompts.txt"
    path.write_text("Think, then answer.\n\n--no-thinking: A, B\n")
    points = grid(["--task.prompt", f"@{path}", "--seed", "1,2"])
    assert [point[0] for point in points[::2]] == [
        "--task.prompt=Think, then answer.",
        "--task.prompt=--no-thinking: A, B",
    ]
    assert points[1][1:] == ["--seed", "2"] and grid([f"--task.prompt=@{path}"]) == [
        [point[0]] for point in points[::2]
    ]
    for args, told in (([f"@{path}"], "follows no option"), (["--seed", "1,2", f"@{path}"], "follows no option")):
        with pytest.raises(ValueError, match=told):
            grid(args)
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="has no lines"):
        grid(["--seed", f"@{path}"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        grid(["--seed", "@nowhere.txt"])


def test_a_sweep_over_a_file_ends_in_a_table_of_accuracies(toy, tmp_path):
    """Two rewards on the same six prompts, each between 0 and 1."""
    (tmp_path / "rewards.txt").write_text("first\nlast\n")
    shown = tiltlm(
        "sweep", "toy/reference", "--ruler.n", "20", "--task.reward", "@rewards.txt", cwd=tmp_path
    ).stdout
    assert "by accuracy on 6 shared questions (p by Holm over all pairs" in shown
    ranks = shown[shown.index("by accuracy") :]
    assert "--task.reward=first" in ranks and "--task.reward=last" in ranks and "*" in ranks
    assert (
        "by accuracy"
        not in tiltlm("sweep", "toy/reference", "--ruler.n", "20", "--seed", "0,1", cwd=tmp_path).stdout
    )
