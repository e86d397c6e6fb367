"""Verdicts on differences: Student's t and Holm by hand, their error rates by simulation, and runs as contestants."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tiltlm.commands.compared import ABSOLUTE, comparisons, contestants, footnote, incomparable, same_prompts
from tiltlm.commands.measure import _metrics, differences
from tiltlm.commands.prompts import hardest, spread
from tiltlm.ruler.compare import Difference, holm, over_seeds, p_value, paired
from tiltlm.ruler.estimate import Estimate, mean
from tiltlm.ruler.measure import Measurement
from tiltlm.run import Recipe, Run
from tiltlm.seeds import stream
from tiltlm.stages.task import OfTask, Task

ROOT = stream(11, "test-compare")


def noise(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=ROOT.child(name).generator(), dtype=torch.float64)


def difference(value: float, p: float, metric: str = "reward") -> Difference:
    return Difference(metric, Estimate(value, 1.0, 9), p)


def test_student_s_p_by_hand():
    """Differences 1 and 3: mean 2, sd √2, error 1, t = 2 with one degree of freedom, whose law is Cauchy's:
    P(|t| > 2) = 1 − 2·arctan(2)/π = 0.2952."""
    assert p_value(mean(torch.tensor([1.0, 3.0]))) == pytest.approx(1 - 2 * math.atan(2) / math.pi)


def test_without_any_spread_only_signs_count():
    """Five equal positive differences: under exchangeable signs 2 of 32 arrangements are as extreme."""
    assert p_value(Estimate(0.3, 0.0, 5)) == 2 / 32
    assert p_value(Estimate(0.0, 0.0, 5)) == 1.0
    assert (
        Difference("reward", Estimate(1.0, 0.0, 2), p_value(Estimate(1.0, 0.0, 2))).verdict
        == "no difference shown"
    )


def test_holm_by_hand():
    """p = .01, .04, .03: 3·.01 = .03; 2·.03 = .06; 1·.04 is below what went before, so .06."""
    found = holm([difference(1, p) for p in (0.01, 0.04, 0.03)])
    assert [each.p for each in found] == pytest.approx([0.03, 0.06, 0.06])
    assert [each.verdict for each in found] == ["higher", "no difference shown", "no difference shown"]
    assert holm([difference(-1, 0.7)])[0].p == 0.7 and holm([]) == []


def test_a_model_compared_with_itself_is_no_comparison():
    same = Difference("reward", Estimate(0.0, 0.0, 9), 1.0)
    found = holm([same, difference(1, 0.03), same])
    assert [each.verdict for each in found] == ["identical", "higher", "identical"] and found[1].together == 1


@pytest.mark.parametrize("n", [2, 4, 10])
def test_equal_methods_are_called_different_one_time_in_twenty_whatever_n(n):
    """4000 comparisons of n pairs: 5% false ± 4 standard errors (1.4%). With 1.96 instead of t, n = 2 gives 30%."""
    rates = [p_value(mean(row)) <= 0.05 for row in noise(f"null {n}", 4000, n)]
    assert abs(sum(rates) / 4000 - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 4000)


def test_fourteen_equal_methods_show_no_difference_nineteen_times_in_twenty():
    """91 pairs at once, 100 times: any false verdict at most 5% ± 4 s.e. (9%); unadjusted, most times some pair differs."""
    some, unadjusted = 0, 0
    for draws in noise("family", 100, 14, 40):
        methods = [Measurement({"reward": row}) for row in draws]
        found = [paired(a, b)[0] for a, b in itertools.combinations(methods, 2)]
        unadjusted += any(each.verdict != "no difference shown" for each in found)
        some += any(each.verdict != "no difference shown" for each in holm(found))
    assert some <= 14 and unadjusted > 60


def test_the_least_difference_is_shown_four_times_in_five():
    """2000 comparisons of 12 pairs whose true difference is what the spread of 12 pairs can show: 80% ± 4 s.e. (3.6%), and
    2% for taking a shifted t."""
    size = Difference("reward", Estimate(0.0, 1 / math.sqrt(12), 12), 1.0).least
    shown = sum(p_value(mean(row + size)) <= 0.05 for row in noise("power", 2000, 12))
    assert abs(shown / 2000 - 0.8) < 0.056


def test_several_seeds_become_one_difference_with_the_error_of_their_spread():
    """Seeds 1, 2, 6 apart: mean 3, sd √7, error √(7/3), t = 3/√(7/3) = 1.964 with two degrees of freedom: p = 0.188, by
    P(|t| > x) = 1 − x/√(2 + x²) for two degrees."""
    one = over_seeds([difference(value, 1e-9) for value in (1.0, 2.0, 6.0)])
    x = 3 / math.sqrt(7 / 3)
    assert (one.estimate.value, one.estimate.n, one.seeds) == (3.0, 3, 3)
    assert one.estimate.stderr == pytest.approx(math.sqrt(7 / 3)) and one.p == pytest.approx(
        1 - x / math.sqrt(2 + x * x)
    )
    assert one.verdict == "no difference shown"  # though each seed by itself was certain
    with pytest.raises(ValueError, match="the same metric"):
        over_seeds([difference(1, 1, "reward"), difference(1, 1, "kl_to_target")])


# ---- finished runs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim(Task):
    """A task of which nothing but its values is asked."""

    name: str = "f"
    beta: float = 1.0
    reward: str = "r"
    prompts: int = 3

    def untilted(self) -> Aim:
        return Aim(self.name, prompts=self.prompts)


@dataclass(frozen=True)
class Toy(OfTask):
    task: Aim = Aim()
    lr: float = 0.1
    seed: int = 0
    stage: ClassVar[str] = "toy"


@dataclass(frozen=True)
class Other(Toy):
    stage: ClassVar[str] = "other"


@dataclass(frozen=True)
class Third(Toy):
    stage: ClassVar[str] = "third"


def run_of(folder: Path, recipe: Recipe, values: dict[str, torch.Tensor]) -> Run:
    """A finished run with a measurement, a report, and a line for each prompt."""
    own = folder / recipe.name / recipe.key
    own.mkdir(parents=True)
    measured = Measurement(values)
    measured.save(own / "measurement.safetensors")
    (own / "report.json").write_text(json.dumps(measured.rows(recipe.name, recipe.stage, recipe.seed)))
    n = len(next(iter(values.values())))
    (own / "samples.jsonl").write_text("".join(json.dumps({"prompt": f"prompt {k}"}) + "\n" for k in range(n)))
    return Run(recipe, own, {})


@pytest.fixture
def runs(tmp_path) -> list[Run]:
    """Two methods, three seeds; the prompts of a seed differ much, the methods on a prompt by 1 ± 0.1."""
    found = []
    for seed in (0, 1, 2):
        shared = 10 * noise(f"prompts {seed}", 20)
        for kind, shift in ((Toy, 1.0), (Other, 0.0)):
            x = shared + shift + 0.1 * noise(f"{kind.stage} {seed}", 20)
            found.append(run_of(tmp_path, kind(seed=seed), {"objective": x, "reward": 2 * x}))
    return found


def test_runs_that_differ_in_the_seed_alone_are_one_contestant(runs, tmp_path):
    toy, other = contestants(runs)
    assert (toy.name, other.name) == ("toy", "other") and set(toy.runs) == {0, 1, 2}
    slower = run_of(tmp_path, Toy(lr=0.2), {"objective": torch.zeros(20).double()})
    names = [each.name for each in contestants([*runs, slower])]
    assert names == ["toy lr=0.1", "other", "toy lr=0.2"]


def test_one_seed_compares_prompts_and_says_so(runs):
    found = comparisons(contestants(runs[:2]))
    assert {each.difference.metric for each in found} == {"reward", "objective"}
    (j,) = [each.difference for each in found if each.difference.metric == "objective"]
    assert j.estimate.n == 20 and j.estimate.value == pytest.approx(1, abs=0.15) and j.verdict == "higher"
    assert j.together == 2 and "Trained once" in footnote(found)


def test_several_seeds_compare_trainings(runs):
    found = comparisons(contestants(runs), ["objective"])
    (only,) = found
    assert only.difference.seeds == only.difference.estimate.n == 3 and only.difference.together == 1
    assert "Over 3 seeds" in footnote(found) and "Trained once" not in footnote(found)


def test_a_control_is_what_is_subtracted_and_must_be_there(runs):
    (only,) = comparisons(contestants(runs), ["objective"], control="toy")
    assert (only.first, only.second) == ("other", "toy") and only.difference.estimate.value < 0
    with pytest.raises(ValueError, match=r"called 'tog'; there are toy, other"):
        comparisons(contestants(runs), control="tog")
    with pytest.raises(ValueError, match="Did you mean objective"):
        _metrics(("objectiv",))


def test_methods_without_a_common_seed_are_not_compared(runs):
    assert comparisons(contestants([runs[0], runs[3]])) == []


def test_the_hardest_prompts_and_the_spread_over_them(runs):
    toy = contestants(runs)[0]
    values = Measurement.load(toy.runs[0].folder / "measurement.safetensors").values["objective"]
    (made,) = hardest([toy], ("objective", "reward"), 3)
    assert list(made.columns[2].cells) == [
        f"prompt {k}" for k in values.argsort()[:3].tolist()
    ]  # a low J is worst
    table = spread([toy], ("objective",))
    assert list(table.columns[6].cells) == [f"{float(values.quantile(0.5)):.3f}"]
    assert list(table.columns[3].cells) == [f"{float(values.min()):.3f}"]
    assert hardest([contestants([_alone(toy.runs[0])])[0]], ("objective",), 3) == []


def _alone(run: Run) -> Run:
    """The same run, of a single prompt: its numbers are draws."""
    path = run.folder / "samples.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    return run


def test_the_table_shows_interval_p_verdict_and_reach(runs):
    found = comparisons(contestants(runs[:2]), ["objective"])
    made = differences(found)
    assert [column.header for column in made.columns][-3:] == ["p (Holm)", "verdict", "would show"]
    assert list(made.columns[4].cells) == ["< 0.001"] and list(made.columns[5].cells) == ["higher"]


def test_runs_whose_files_changed_in_between_are_neither_one_method_nor_compared(tmp_path):
    """The same settings, but the reward's file held something else for the second seed, and for the other method."""
    made = ((Toy, 0, "aa"), (Toy, 1, "bb"), (Other, 0, "bb"), (Third, 0, "aa"))
    found = []
    for kind, seed, digest in made:
        run = run_of(tmp_path, kind(seed=seed), {"objective": noise(f"{kind.stage} {seed}", 9)})
        (run.folder / "config.json").write_text(json.dumps({"files": {"mine.py": digest}}))
        found.append(run)
    own = contestants(found)
    assert [len(each.runs) for each in own] == [1, 1, 1, 1] and len({each.name for each in own}) == 4
    pairs = {(each.first.split()[0], each.second.split()[0]) for each in comparisons(own)}
    assert pairs == {("toy", "third")}


def test_what_targets_share_decides_what_can_be_compared(tmp_path):
    """Another temperature leaves the reward and KL to the reference comparable, another reward only the latter."""

    def made(**changed) -> Run:
        values = {name: noise(name, 9) for name in ("objective", "reward", "kl_to_reference", "kl_to_target")}
        return run_of(tmp_path, Toy(Aim(**changed)), values)

    plain, colder, renamed = made(), made(beta=0.5), made(name="g")
    other, elsewhere = made(reward="s"), made(prompts=4)
    aimed = {"objective", *ABSOLUTE}
    assert incomparable(plain, colder) == aimed and same_prompts(plain, colder)
    assert incomparable(plain, renamed) == set() and same_prompts(plain, renamed)
    assert incomparable(plain, other) == aimed | {"reward", "win_rate"} and same_prompts(plain, other)
    assert not same_prompts(plain, elsewhere) and "kl_to_reference" in incomparable(plain, elsewhere)
    names = [each.name for each in contestants([plain, colder])]
    assert names == ["toy task.beta=1.0", "toy task.beta=0.5"]
