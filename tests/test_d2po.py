"""D2PO: OPO with a judge that learns. What a judge does by itself has tests of its own; here it labels a policy's draws."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltlm.engine import Engine, Optim
from tiltlm.feeds import Feed, Stores, course_of, why_not
from tiltlm.fit import Fit
from tiltlm.groups import Groups
from tiltlm.jsonl import read_rows
from tiltlm.judges.judged import in_order
from tiltlm.judges.settings import Judging
from tiltlm.method import Method
from tiltlm.nets import Net, judge_of, learner
from tiltlm.policies.d2po import D2PO
from tiltlm.policies.opo import OPO
from tiltlm.policies.ppo import PPO
from tiltlm.policies.reinforce import Reinforce
from tiltlm.problem import Facts, Problem
from tiltlm.rewards.by_name import is_paid
from tiltlm.samples import Samples
from tiltlm.seeds import stream
from tiltlm.stages.measure import Measure, RulerSettings
from tiltlm.stages.paid import say_once
from tiltlm.target import Target
from tiltlm.train import Pace, Training
from toy import Toy, twos

RLOO = Reinforce("leave_one_out", None)


def untied(samples: Samples) -> Tensor:
    """The share of 2s, and a little more for what no other completion has: no two completions tie."""
    weight = torch.tensor([1.0, 0.1, 0.01])[: samples.tokens.shape[1]]
    return twos(samples) + 1e-3 * (samples.tokens * samples.mask * weight).sum(1)


def problem(reward: Any = untied) -> Problem:
    made = Toy().problem({}, 0)
    return replace(made, target=Target(made.reference, reward, made.beta))


def course(
    made: Problem, method: Method, folder: Path, judge: Judging | None = None, pairs: int = 12, size: int = 2,
    tell: Any = print,
) -> Any:  # fmt: skip
    """(policy, objective, experience) of a training on a judge's labels, or the reward's."""
    _, who = learner(made, method, Net(), stream(1, "init"))
    feed = Feed("live" if method.fed == "groups" else "task", size=size, n=2, judge=judge or Judging())
    stores = Stores(judge=None if judge is None else judge_of(made, judge, stream(2, "judge"), folder))
    found = course_of(made, method, who, feed, Fit(steps=8, batch_size=pairs), "d2po", stores, tell)
    return who.module, method.objective(made), found.experience


def trained(
    made: Problem, method: Method, folder: Path, judge: Judging | None = None, steps: int = 8
) -> list[Tensor]:
    """The policy's tables after some updates."""
    policy, objective, experience = course(made, method, folder, judge)
    engine = Engine(policy, Optim(lr=0.05))
    for step in range(steps):
        engine.update(objective, experience.batch(step))
    return [table.detach().clone() for table in policy.tables]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- between OPO on gold and OPO on a fixed reward ----------------------------------------------------------------


ALL = Judging("reward-model", window=24, relabels=12, batch_size=8, lr=0.05)
"""Twelve pairs a step, and all of them are bought."""


def test_with_every_label_bought_it_is_opo_on_gold(tmp_path):
    gold = trained(problem(), OPO("hard"), tmp_path / "gold")
    assert same(gold, trained(problem(), D2PO("hard"), tmp_path / "all", ALL))
    assert not same(gold, trained(problem(), D2PO("hard"), tmp_path / "half", replace(ALL, relabels=6)))


def test_with_none_bought_it_is_opo_on_the_judge_as_it_is(tmp_path):
    made, still = problem(), replace(ALL, relabels=0, warm=20)
    judge = judge_of(made, still, stream(2, "judge"), tmp_path / "judge")
    _, _, experience = course(made, D2PO(), tmp_path / "first", still)
    warm = experience.begin()
    prompts, completions = experience.rows(warm)
    judge.warm(
        "warm", prompts, completions, lambda rows: made.target.reward(warm.select(torch.tensor(rows))).tolist()
    )

    def scores(samples: Samples) -> Tensor:
        return torch.tensor(judge.score(*experience.rows(samples)))

    fixed = trained(problem(scores), OPO(), tmp_path / "fixed")
    assert same(fixed, trained(made, D2PO(), tmp_path / "none", still))
    assert not same(fixed, trained(made, OPO(), tmp_path / "gold"))


# ---- what is bought ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["spread", "first"])
def test_the_ledger_adds_up_at_every_step_and_ends_at_the_budget(allocation, tmp_path):
    how = Judging("reward-model", budget=30, warm=6, window=48, relabels=8, batch_size=8, allocation=allocation)
    _, _, experience = course(problem(twos), D2PO(), tmp_path, how)
    bought = []
    for step in range(12):
        experience.batch(step)
        found = experience.numbers()
        parts = [found[f"labels_{name}"] for name in ("trained", "tied", "pending")]
        assert found["labels_bought"] == sum(parts) <= 30
        bought.append(found["labels_bought"])
    assert bought == sorted(bought) and bought[-1] == 30 and found["labels_tied"] > 0
    assert bought[0] == (10 if allocation == "spread" else 14)
    assert len(list(read_rows(tmp_path / "purchases.jsonl"))) == 30


class Stop(Exception):
    pass


def train(folder: Path, until: int | None = None) -> tuple[list[Tensor], list[Any], str]:
    """Ten steps with checkpoints at 4 and 8; until: killed after so many steps. (tables, log, what was bought)"""
    how = Judging(
        "reward-model", budget=40, warm=6, window=48, relabels=8, batch_size=8, select="random", replay=4
    )
    policy, objective, experience = course(problem(twos), D2PO(), folder / "judge", how)

    def on_step(step: int, limit: int, metrics: dict[str, float]) -> None:
        if step == until:
            raise Stop

    training = Training(
        policy,
        Engine(policy, Optim(lr=0.05)),
        objective,
        experience,
        Pace(10),
        stream(3, "train"),
        folder,
        4,
        on_step,
    )
    if until is not None:
        with pytest.raises(Stop):
            training.run()
    else:
        training.run()
    lines = list(read_rows(folder / "metrics.jsonl")) if until is None else []
    return [t.detach() for t in policy.tables], lines, (folder / "judge" / "purchases.jsonl").read_text()


@pytest.mark.parametrize("kill", [2, 5, 7, 9])
def test_killed_and_resumed_it_ends_where_it_would_have_and_buys_nothing_twice(kill, tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "killed", until=kill)
    resumed = train(tmp_path / "killed")
    assert same(whole[0], resumed[0]) and whole[1] == resumed[1]
    assert whole[2] == resumed[2]


# ---- rows and groups -------------------------------------------------------------------------------------------------


def test_a_verdict_exchanges_scores_that_say_otherwise():
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 3.0, 3.0, 5.0, 4.0])
    said = torch.tensor([1.0, torch.nan, 1.0, 0.0])
    assert in_order(scores, said).tolist() == [2.0, 1.0, 1.0, 2.0, 3.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("method", [PPO(), RLOO, OPO()])
def test_any_live_method_can_be_judged(method, tmp_path):
    _, objective, experience = course(problem(), method, tmp_path, replace(ALL, relabels=4))
    batch = experience.batch(0)
    assert len(objective.prepare(batch)) == 12 and experience.numbers()["labels_bought"] == (
        4 if method.fed == "groups" else 2
    )


def test_the_policy_itself_can_be_the_judge(tmp_path):
    """beta_pi·h of its own draws: 0 at the start, and no network learns."""
    _, _, experience = course(problem(), D2PO(), tmp_path, Judging("self", window=24, relabels=6))
    batch: Groups = experience.batch(0)
    assert float(batch.reward.abs().max()) < 1e-6
    found = experience.numbers()
    assert found["labels_bought"] == found["labels_tied"] + found["labels_pending"] == 6
    assert batch.preferred is not None and int((~batch.preferred.isnan()).sum()) == found["labels_pending"]


def test_the_judge_is_watched_without_a_charge(tmp_path):
    how = replace(ALL, relabels=0, monitor=True)
    _, _, experience = course(problem(), D2PO(), tmp_path, how)
    experience.batch(0)
    found = experience.numbers()
    assert found["labels_bought"] == 0 and found["gold_looked_at"] == 24
    assert found["judge_accuracy"] == 0.5, "a fresh head says 0 of everything: all ties"


def test_what_cannot_be_judged_is_refused():
    facts, judge = problem().facts, Feed(judge=ALL)
    assert "are a judge's" in (why_not(facts, D2PO(), Feed()) or "")
    assert why_not(facts, D2PO(), judge) is None and why_not(facts, RLOO, judge) is None
    assert "even number" in (why_not(facts, RLOO, replace(judge, n=3)) or "")
    assert "part into pairs" in (why_not(facts, OPO(), replace(judge, size=3)) or "")
    assert "new rows" in (why_not(facts, OPO(), replace(judge, source="own")) or "")
    assert "by the reward itself" in (why_not(facts, OPO(), replace(judge, source="rounds")) or "")


def test_settings_of_a_judge_without_one_are_refused():
    facts = problem().facts
    assert "none is named" in (why_not(facts, OPO(), Feed(judge=Judging(budget=100))) or "")
    assert why_not(facts, OPO(), Feed()) is None


def test_settings_that_do_nothing_beside_the_others_are_said(tmp_path):
    said: list[str] = []
    course(problem(), D2PO(), tmp_path, Judging("self", window=24, relabels=6, lr=0.5), tell=said.append)
    assert len(said) == 1 and said[0].endswith("here --feed.judge's lr 0.5 do nothing")


@pytest.mark.parametrize("winners", [0, 3, 12])
def test_verdicts_that_nearly_all_tie_are_said_once(winners, tmp_path):
    """Of the first 60 pairs bought, twelve a step, none, three or all of a step's twelve have a winner."""

    def rare(samples: Samples) -> Tensor:
        row = torch.arange(len(samples))
        return ((row % 2 == 0) & (row < 2 * winners)).double() * (len(samples) == 24)

    said: list[str] = []
    how = replace(ALL, window=24, relabels=12)
    _, _, experience = course(problem(rare), D2PO(), tmp_path, how, tell=said.append)
    for step in range(7):
        experience.batch(step)
        found = experience.numbers()
        assert found["labels_tied"] == (12 - winners) * (step + 1)
        assert len(said) == (step >= 4 and winners == 0)
    assert winners or said[0].startswith("60 of the first 60 gold verdicts are ties")
    assert winners or "--feed.judge.select" in said[0]


def test_a_policy_of_adapters_can_be_judged(tmp_path):
    """The reference is then the policy without them, and no model that could be written down."""
    from tiltlm.recipes import preset_of
    from tiltlm.recipes.stages import measured
    from tiltlm.run import ensure
    from tiltlm.stages.learn import Learn
    from tiltlm.tasks.language import Language

    preset = preset_of("words-small")
    language = Language("", new_tokens=4, stories=60, fit=Fit(steps=2, batch_size=4))
    task = replace(preset.task, language=language, prompts="stories:8", test_rows=2)
    cell = measured(preset, "d2po").cell
    judge = Judging("reward-model", window=8, relabels=2, warm=2, lora_rank=2)
    how = replace(
        cell, feed=replace(cell.feed, judge=judge), fit=Fit(steps=2, batch_size=4), net=Net("lora", lora_rank=2)
    )
    made = Learn(task, how.method, how.feed, how.fit, how.net, called="d2po")
    run = ensure(made, tmp_path)
    assert [row["labels_bought"] for row in read_rows(run.folder / "metrics.jsonl")] == [4, 6]
    assert (run.folder / "judge" / "body" / "config.json").is_file()


def test_the_judge_reads_what_the_reward_reads(tmp_path):
    """A template stands around what the policy goes on from; judge and gold are asked about the bare prompt."""
    from tiltlm.recipes import preset_of
    from tiltlm.run import ensure
    from tiltlm.tasks.language import Language

    language = Language("", new_tokens=4, stories=60, fit=Fit(steps=2, batch_size=4))
    template = "Say: {prompt} ->"
    task = replace(
        preset_of("words-small").task, language=language, prompts="stories:8", test_rows=2, template=template
    )
    runs = {name: ensure(each, tmp_path) for name, each in task.needs(0).items()}
    made = task.problem(runs, 0)
    how = Judging("reward-model", window=8, relabels=2, allocation="pool")
    _, _, experience = course(made, D2PO(), tmp_path / "judge", how, pairs=4)
    batch = experience.batch(0)
    prompts, _ = experience.rows(batch.samples)
    asked = made.tokenizer.batch_decode(batch.samples.row_prompts.lists(), skip_special_tokens=True)
    assert all(f"Say: {bare} ->" == text for bare, text in zip(prompts, asked, strict=True))
    assert {row["prompts"][0] for row in read_rows(tmp_path / "judge" / "calls.jsonl")} == {prompts[0]}
    assert experience.numbers()["labels_bought"] == 2


def test_a_reward_that_costs_money_wants_a_budget_and_is_not_watched():
    facts = replace(problem().facts, paid=True)
    assert "costs money" in (why_not(facts, D2PO(), Feed(judge=ALL)) or "")
    assert why_not(facts, D2PO(), Feed(judge=replace(ALL, budget=50))) is None
    watched = replace(ALL, budget=50, monitor=True)
    assert "every row" in (why_not(facts, D2PO(), Feed(judge=watched)) or "")
    assert is_paid("ultrafeedbackgold + 0.5*bagofwords") and not is_paid("bagofwords")


@dataclass(frozen=True)
class Paid(Toy):
    """Its reward costs money."""

    name: str = "paid"

    def facts(self) -> Facts:
        return replace(super().facts(), paid=True)


def test_what_asks_a_paid_reward_beside_the_judge_is_said_before_any_work(capsys):
    """The budget bounds the judge's purchases alone; measuring, evaluations and methods without a judge ask as well."""
    say_once.cache_clear()
    feed, fit, ruler = (
        Feed(judge=replace(ALL, budget=50)),
        Fit(steps=4),
        RulerSettings(prompts=5, n=3, absolute=False),
    )

    def said(method: Method, feed: Feed, fit: Fit, task: Toy = Paid()) -> str:
        measure = Measure(task, method, feed, fit, Net(), ruler, called="mine")
        for recipe in (measure, measure, measure.learn()):
            recipe.check()
        return " ".join(capsys.readouterr().err.split())

    first = said(D2PO(), feed, fit)
    assert first.count("costs money") == 1 and "paid: the reward costs money" in first
    assert (
        "all draws that are measured: 3 of 5 test prompts at most" in first
        and "only $TILTLM_JUDGE_CEILING" in first
    )
    assert said(D2PO(), feed, fit) == "", "once"
    watched = said(D2PO(), feed, replace(fit, evaluations=2))
    assert (
        "paid/mine-policy" in watched
        and "64 answers at every evaluation" in watched
        and "learns from" not in watched
    )
    assert "every row that it learns from" in said(OPO(), Feed(), fit)
    assert said(OPO(), Feed(), fit, Toy()) == ""
