"""Drawing, scoring and measuring shared out over processes: what two of them write is what one writes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import question_world
import ranked
import toy
from close import NETWORK, alike, close
from side_by_side import side_by_side
from tiltlm import ranks
from tiltlm.feeds import Draws as Drawing
from tiltlm.feeds import Feed, Rounds
from tiltlm.fit import Fit
from tiltlm.jsonl import read_json, read_rows
from tiltlm.models.heads import ValueHead
from tiltlm.nets import Net
from tiltlm.policies.dpo import DPO
from tiltlm.policies.sft import SFT
from tiltlm.problem import Problem
from tiltlm.recipes.preset import Preset
from tiltlm.recipes.stages import cell, measured
from tiltlm.run import Recipe, ensure
from tiltlm.samplers.ancestral import draw, draw_in_batches
from tiltlm.samplers.smc import SMC, smc_in_batches
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream, stream
from tiltlm.stages.answers import Answers
from tiltlm.stages.exact import ExactSettings
from tiltlm.stages.examine import Examine, ExamSettings
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import Measure, RulerSettings
from tiltlm.target import Target
from tiltlm.tensors import load_tensors
from tiltlm.twists.draws import TwistDraws
from tiltlm.twists.learned import LearnedTwist
from tiltlm.twists.objective import Draws
from toy_world import Toy

ONE = toy.Toy(one=True, bounded=True)


def asked(problem: Problem, told: Callable[[Samples], None]) -> Problem:
    """`problem`, whose reward tells of the rows that it is asked for."""

    def reward(samples: Samples) -> torch.Tensor:
        told(samples)
        return problem.target.reward(samples)

    return replace(problem, target=replace(problem.target, reward=reward))


@dataclass(frozen=True)
class Counted(Toy):
    """Every process writes down how many rows it asks the reward for."""

    def problem(self, runs: Any, seed: int) -> Problem:
        def told(samples: Samples) -> None:
            with Path(f"asked-{os.environ.get('RANK', 'alone')}.txt").open("a") as file:
                file.write(f"{len(samples)}\n")

        return asked(super().problem(runs, seed), told)


def in_rounds(task: Any, method: Any = DPO(1.0), count: int = 2, **fit: Any) -> Measure:  # noqa: B008
    feed = Feed("rounds", rounds=Rounds(count=count, n=8, batch_size=8))
    how = Fit(**{"lr": 0.05, "epochs": 1.0, "batch_size": 8} | fit)
    return Measure(
        task, method, feed, how, Net(), RulerSettings(n=20, batch_size=30, absolute=False), called="method"
    )


def files(root: Path) -> dict[str, Path]:
    """Every file of all runs but what tells when they were made, and what optimizers keep."""
    apart = ("provenance.json", "trainer.pt")
    return {
        str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file() and path.name not in apart
    }


def same_files(two: Path, one: Path, exactly: str = "") -> None:
    """The same files in two folders: byte for byte where `exactly` is in their names, else up to the order of sums."""
    assert files(two).keys() == files(one).keys()
    for name, path in files(two).items():
        other = files(one)[name]
        if path.suffix == ".png":
            continue
        if (exactly and exactly in name) or path.suffix not in (".json", ".jsonl", ".safetensors"):
            assert path.read_bytes() == other.read_bytes(), name
        elif path.suffix == ".safetensors":
            found, wanted = load_tensors(path), load_tensors(other)
            assert found.keys() == wanted.keys()
            for column, x in found.items():
                assert x.dtype == wanted[column].dtype
                close(x.double().nan_to_num(), wanted[column].double().nan_to_num(), 1e-5)
        else:
            read = read_json if path.suffix == ".json" else lambda path: list(read_rows(path))
            alike(read(path), read(other), name)


def built_by_two_and_one(recipes: list[Recipe], folder: Path) -> tuple[Path, Path]:
    """Two folders of runs: by two processes side by side, by this one alone."""
    two, one = folder / "two", folder / "one"

    def work() -> None:
        for recipe in recipes:
            ensure(recipe, two)

    assert side_by_side(work) == [0, 0]
    for recipe in recipes:
        ensure(recipe, one)
    return two, one


def test_a_chain_of_rounds_is_that_of_one_process_and_half_as_long(tmp_path, monkeypatch):
    """Answers, updates, validation; what is drawn of the reference to the byte. Each process scores about half."""
    monkeypatch.chdir(tmp_path)
    two, one = built_by_two_and_one([in_rounds(Counted()).learn()], tmp_path)
    same_files(two, one, exactly="toy/answers")
    found = [sum(map(int, Path(f"asked-{who}.txt").read_text().split())) for who in ("0", "1", "alone")]
    assert found[0] + found[1] == found[2] > 100
    assert min(found[:2]) > 0.4 * found[2]
    made = [json.loads(path.read_text()) for path in two.rglob("provenance.json")]
    assert all(each["processes"] == 2 for each in made)


def shortly(made: Measure) -> Measure:
    """Three steps, looked at once."""
    fit = replace(made.fit, steps=3, evaluations=1, batch_size=8)
    feed = replace(made.feed, draws=Drawing(4, batch_size=8)) if isinstance(made.feed, Feed) else made.feed
    if made.method.trained().fed == "draws":
        fit, feed = replace(fit, evaluations=0, batch_size=64), replace(feed, particles=4)
    return replace(made, fit=fit, feed=feed)


def test_measurements_are_those_of_one_process(tmp_path):
    """The methods that measure themselves, one prompt and several, log Z by every way that is shared out, stored draws and
    their labels, evaluation on the way."""
    ruler, exact = RulerSettings(n=21, batch_size=16), ExactSettings(n=20, batch_size=64)
    many = Preset(toy.Toy(), ruler=ruler, exact=exact, log_z=LogZSettings(draws=32))
    listing = replace(many, log_z=LogZSettings("listing", floor=0.01))
    one = Preset(ONE, ruler=ruler, exact=exact, log_z=LogZSettings(draws=200, batch_size=50))
    bounds = replace(one, log_z=LogZSettings("bounds", particles=(4,), repeats=3))
    stored = replace(many, cells={"dpo": replace(cell(many, "dpo"), feed=Feed("stored"))})
    names = {"reference": many, "best-of-n": many, "smc": one, "rejection": many, "sft": listing, "dpo": stored}
    made = [shortly(measured(preset, name)) for name, preset in names.items()]
    short = shortly(measured(bounds, "ctl"))
    made.append(replace(short, twist=short.cell))
    same_files(*built_by_two_and_one(made, tmp_path))


def test_exams_and_rounds_of_a_network_are_those_of_one_process(tmp_path):
    """One right answer to learn from: one of the two has no row of the batch."""
    task = replace(
        question_world.Letters(),
        language=replace(question_world.Letters().language, model=str(question_world.written(tmp_path / "model"))),
    )
    rounds = in_rounds(task, SFT(), 1, lr=1e-3)
    same_files(*built_by_two_and_one([rounds, Examine.of(rounds, "avg@3", ExamSettings(batch_size=4))], tmp_path))


@dataclass(frozen=True)
class Dying(Toy):
    """The second process is killed when it asks the reward for the second time."""

    def problem(self, runs: Any, seed: int) -> Problem:
        calls: list[int] = []

        def told(samples: Samples) -> None:
            calls.append(len(samples))
            if os.environ.get("RANK") == "1" and len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        return asked(super().problem(runs, seed), told)


def test_a_killed_process_ends_the_others_and_the_next_command_goes_on(tmp_path, capfd):
    two, one = tmp_path / "two", tmp_path / "one"
    answers = Answers(Dying(), n=8, rows=8)  # a prompt at a time
    assert side_by_side(lambda: ensure(answers, two)) == [1, -signal.SIGKILL]
    assert "have lost each other" in capfd.readouterr().err
    left = next(two.rglob("answers.jsonl"))
    assert len(left.read_text().splitlines()) == 2
    for root in (two, one):
        ensure(answers, root)
    same_files(two, one, exactly="toy/answers")


def test_any_part_of_the_rows_is_drawn_as_it_stands_in_the_whole():
    """Stretches of rows from any row on, whatever the batches: prompts with one draw, a few, more than a batch."""
    problem = toy.Toy().problem({}, 0)
    prompts, own = problem.prompts["test"], stream(0, "test-sharing")
    for n, batch_size in ((1, 4), (3, 7), (5, 2)):
        how = {"n": n, "max_new_tokens": 3, "stream": own, "batch_size": batch_size}
        whole = draw_in_batches(problem.reference, prompts, **how)
        assert whole.prompt_index.tolist() == [k for k in range(6) for _ in range(n)]
        for begin in range(6 * n):
            for end in {begin + 1, max(begin + 1, 6 * n - begin % n)}:
                part = draw_in_batches(problem.reference, prompts, some=range(begin, end), **how)
                assert torch.equal(part.tokens, whole.tokens[begin:end])
                assert torch.equal(part.prompt_index, whole.prompt_index[begin:end])


def test_populations_of_some_prompts_are_those_of_all():
    problem = toy.Toy().problem({}, 0)
    prompts: Tokens = problem.prompts["test"]
    how: dict[str, Any] = {"max_new_tokens": 3, "stream": stream(0, "test-sharing"), "batch_size": 8}
    whole = smc_in_batches(problem.target, None, prompts, SMC(4, 1.0), **how)
    part = smc_in_batches(problem.target, None, prompts, SMC(4, 1.0), some=range(2, 5), **how)
    assert torch.equal(part.samples.tokens, whole.samples.tokens[8:20])
    assert torch.equal(part.log_z, whole.log_z[2:5])
    assert part.samples.prompts.lists() == prompts.lists()[2:5]


TWISTS: dict[str, dict[str, Any]] = {
    "q": {},
    "resampled": {"drawn_by": "resampled", "tempered": 0.5},
    "mixed": {"drawn_by": "mixed"},
    "exact": {"drawn_by": "exact", "positives": "exact", "induced": True, "backups": True},
    "reference": {"drawn_by": "reference", "positives": "exact", "prefixes": True},
    "csmc": {"positives": "csmc", "csmc_threshold": 1.0},
}


def twist_draws(count: int) -> list[Draws]:
    """A step's draws by every setting, for so many prompts of unequal lengths; the supply stands for exact draws."""
    reference, width = ranked.network().requires_grad_(False), 5
    twist = ValueHead(ranked.network(), per_token=True)
    torch.nn.init.normal_(twist.head[-1].weight, generator=torch.Generator().manual_seed(0))
    prompts = Tokens.of([[1, 2, 4], [5], [6, 7]][:count])
    found = []
    for how in TWISTS.values():
        n = 1 if how.get("positives") == "csmc" else 3

        def scene(own: Stream, n: int = n) -> tuple[Tokens, Samples]:
            return prompts, draw(reference, prompts, n=n, max_new_tokens=width, stream=own)

        needs = ("proposal", "positives", "reference")
        target, learnt = Target(reference, ranked.total, 20.0), LearnedTwist(twist)
        found.append(TwistDraws(target, learnt, scene, width, stream(0), needs, 6, **how).batch(2))
    return found


@pytest.mark.parametrize("count", [1, 3])
def test_a_twists_draws_are_those_of_one_process(count, tmp_path):
    """A population to a process, all else row by row; every part answers the very same prompts."""

    def work() -> None:
        found = twist_draws(count)
        for each in found:
            drawn = [x for x in vars(each).values() if isinstance(x, Samples)]
            assert all(x.prompts is drawn[0].prompts for x in drawn)
        torch.save([flat(each) for each in found], tmp_path / f"{ranks.number()}.pt")

    assert side_by_side(work) == [0, 0]
    first, second = (torch.load(tmp_path / f"{k}.pt") for k in range(2))
    for k, each in enumerate(twist_draws(count)):
        assert first[k].keys() == second[k].keys() == flat(each).keys()
        for name, x in flat(each).items():
            assert torch.equal(first[k][name], second[k][name]), name
            close(first[k][name].double(), x.double(), NETWORK)


def flat(draws: Draws) -> dict[str, torch.Tensor]:
    """All tensors of a step's draws, by name."""
    found = {}
    for name, part in vars(draws).items():
        if isinstance(part, Samples):
            found |= {f"{name}.{column}": x for column, x in part.optional().items()}
            found |= {f"{name}.{column}": getattr(part, column) for column in ("prompt_index", "tokens", "mask")}
        elif isinstance(part, torch.Tensor):
            found[name] = part
    return found
