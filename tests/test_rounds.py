"""Rounds: the chain of runs behind a method whose feed's source is `rounds`, on tables where everything can be computed."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from letters import letters
from tiltlm.exact import all_completions, every_pair
from tiltlm.feeds import Feed, Rounds, why_not
from tiltlm.fit import Fit
from tiltlm.jsonl import read_json, read_rows
from tiltlm.methods import method
from tiltlm.nets import Net
from tiltlm.objective import Outcome
from tiltlm.policies.dpo import DPO
from tiltlm.policies.exo_rw import ExoRw
from tiltlm.policies.kto import KTO
from tiltlm.policies.sft import SFT
from tiltlm.run import Run, ensure, find
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages.answers import GREEDY, OVER, Answers
from tiltlm.stages.cells import Cell
from tiltlm.stages.measure import Measure, RulerSettings
from tiltlm.stages.rounds import Round, chain
from tiltlm.stages.validation import reason_to_end
from tiltlm.target import Target
from toy_world import HORIZON, VOCAB, Table, Toy

FIT = Fit(lr=0.05, epochs=2.0, batch_size=4)
RULER = RulerSettings(n=20)


def feed(**how: Any) -> Feed:
    return Feed("rounds", rounds=Rounds(**({"count": 2, "n": 8} | how)))


def measure(learner: Any, fit: Fit = FIT, task: Toy = Toy(), seed: int = 0, **how: Any) -> Measure:  # noqa: B008
    called = type(learner).__name__.lower()
    return Measure(task, learner, feed(**how), fit, Net(), RULER, called=called, seed=seed)


def built(recipe: Any, root: Path) -> Run[Any]:
    return ensure(recipe, root)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def log_of(run: Run[Any]) -> list[dict[str, Any]]:
    return list(read_rows(run.folder / "metrics.jsonl"))


# ---- the chain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learner", "epochs"), [(SFT(), 8.0), (DPO(1.0), 1.0), (ExoRw(beta_pi=0.5), 40.0), (KTO(), 8.0)]
)
def test_any_method_on_answers_pairs_groups_or_verdicts_learns_in_rounds(learner, epochs, tmp_path):
    run = built(measure(learner, Fit(lr=0.1, epochs=epochs, batch_size=16), n=16), tmp_path)
    story = read_json(run.folder / "rounds.json")
    reward = {row["round"]: row["value"] for row in story if row["metric"] == "reward"}
    assert sorted(reward) == [0, 1, 2]
    assert reward[2] > reward[0] + 0.1
    assert (run.folder / "rounds.png").stat().st_size > 10_000
    assert {row["drawn"] for row in story if "drawn" in row} == {0, 6 * 16, 2 * 6 * 16}


def test_methods_share_the_answers_of_the_reference_and_more_rounds_go_on_from_those_there_are(tmp_path):
    two = find(measure(SFT()).learn(), tmp_path)
    three = find(measure(SFT(), count=3).learn(), tmp_path)
    other = find(measure(DPO(0.1)).learn(), tmp_path)
    assert three.inputs["before"].folder == two.folder
    first, of_other = two.inputs["before"], other.inputs["before"]
    assert first.inputs["answers"].folder == of_other.inputs["answers"].folder
    assert first.folder != of_other.folder
    assert first.inputs["valid"].folder == two.inputs["valid"].folder


def test_more_answers_begin_with_the_fewer(tmp_path):
    few, more = (built(Answers(Toy(), n=n, rows=rows), tmp_path) for n, rows in ((2, 256), (5, 10)))
    both = [[row["completion_ids"] for row in read_rows(run.folder / "answers.jsonl")] for run in (few, more)]
    assert [ids[:2] for ids in both[1]] == both[0]


def test_a_round_learns_from_the_policy_of_the_round_before(tmp_path):
    """The second round's answers are those of the first one's policy, whatever the update begins from."""
    run = built(measure(SFT(), Fit(lr=0.5, epochs=40.0, batch_size=4), n=16), tmp_path)
    second = run.inputs["learnt"]
    rate = [torch.tensor([row["rewards"] for row in read_rows(each.inputs["answers"].folder / "answers.jsonl")]).mean()
            for each in chain(second)]  # fmt: skip
    assert rate[1] > rate[0] + 0.2


@pytest.mark.parametrize("where", ["answers", "training"])
def test_a_chain_that_was_interrupted_ends_where_it_would_have(where, tmp_path):
    whole = built(measure(DPO(0.1)), tmp_path / "whole")
    run = built(measure(DPO(0.1)), tmp_path / "cut")
    second = run.inputs["learnt"]
    if where == "answers":  # cut in the middle of a line; all that follows was not there yet
        path = second.inputs["answers"].folder
        text = (path / "answers.jsonl").read_text()
        (path / "answers.jsonl").write_text(text[: len(text) // 2])
        (path / "DONE").unlink()
        shutil.rmtree(second.folder)
    else:
        (second.folder / "report.json").unlink()
    (second.folder / "DONE").unlink(missing_ok=True)
    shutil.rmtree(run.folder)
    again = built(measure(DPO(0.1)), tmp_path / "cut")
    for name in ("rounds.json", "report.json"):
        assert read_json(again.folder / name) == read_json(whole.folder / name)
    policies = [each.inputs["learnt"].recipe.learnt(each.inputs["learnt"], Toy().problem({}, 0)).policy
                for each in (whole, again)]  # fmt: skip
    assert same(*policies)


# ---- where an update begins, and what log-ratios are taken to -----------------------------------------------------


@pytest.mark.parametrize(
    ("start", "reference", "ln_two"),
    [("base", "base", True), ("previous", "previous", True), ("previous", "base", False), ("base", "previous", False)],
)  # fmt: skip
def test_step_0_of_dpo_is_ln_2_where_start_and_reference_are_the_same(start, reference, ln_two, tmp_path):
    run = built(
        measure(DPO(1.0), Fit(lr=0.2, epochs=5.0, batch_size=4), start=start, reference=reference), tmp_path
    )
    first, second = chain(run.inputs["learnt"])
    assert log_of(first)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (abs(log_of(second)[0]["loss"] - math.log(2)) < 1e-6) == ln_two


def test_checkpoints_of_the_last_round_and_the_ends_of_all_have_names(tmp_path):
    fit = Fit(lr=0.05, steps=4, batch_size=4, checkpoints=2)
    last, problem = built(measure(SFT(), fit), tmp_path).inputs["learnt"], Toy().problem({}, 0)
    found = {
        name: last.recipe.learner_at(last, problem, name).policy for name in ("", "round1", "round2", "2", "4")
    }
    assert same(found["4"], found["round2"]) and same(found["4"], found[""])
    assert not same(found["2"], found["4"]) and not same(found["2"], found["round1"])
    with pytest.raises(ValueError, match="has no '3'; there are round0, round1, round2, 2, 4"):
        last.recipe.learner_at(last, problem, "3")


def test_growth_makes_later_rounds_longer(tmp_path):
    run = built(measure(SFT(), Fit(lr=0.05, steps=5, batch_size=4), growth=1.2, count=3), tmp_path)
    assert [len(log_of(each)) for each in chain(run.inputs["learnt"])] == [5, 6, 7]


def test_accumulated_rounds_learn_from_all_that_was_found(tmp_path):
    def rows(run: Run[Any]) -> list[float]:
        return [next(x["value"] for x in read_json(each.folder / "report.json") if x["metric"] == "rows")
                for each in chain(run.inputs["learnt"])]  # fmt: skip

    alone = rows(built(measure(SFT()), tmp_path))
    both = rows(built(measure(SFT(), accumulate=True), tmp_path))
    assert both[0] == alone[0] and both[1] == alone[0] + alone[1]


# ---- where it ends ---------------------------------------------------------------------------------------------------


def test_star_in_a_table_ends_at_the_reference_given_that_it_is_right(tmp_path):
    """Many draws, learnt to the end: p(y|x) = pi_ref(y | x, right) (spec: the limit beta → 0 of pi*)."""
    task = Toy(table=Table(prompts=3))
    run = built(
        measure(SFT(), Fit(lr=0.05, steps=600, batch_size=2000, decay="linear", floor=0.0), task, count=1, n=2000),
        tmp_path,
    )
    last, problem = run.inputs["learnt"], task.problem({}, 0)
    policy: Any = last.recipe.learnt(last, problem).policy
    for k in range(3):
        every = every_pair(problem.prompts["test"].select(slice(k, k + 1)), all_completions(VOCAB, HORIZON))
        right = problem.target.reward(every) == 1
        log_ref = problem.reference.log_prob(every).sum(1).double()
        given = (log_ref - log_ref[right].logsumexp(0)).exp() * right
        found = policy.log_prob(every).sum(1).double().exp()
        assert float((found - given).abs().sum()) / 2 < 0.05  # total variation; 2000 draws err by about 0.02


@dataclass(frozen=True)
class Hopeless(Toy):
    """No answer to the last prompts is right; with `never`, to none."""

    never: bool = False

    def problem(self, runs: Any, seed: int) -> Any:
        made = super().problem(runs, seed)
        inner = made.target.reward

        def reward(samples: Samples) -> torch.Tensor:
            asked = samples.row_prompts.ids[:, 0]
            return inner(samples) * (asked < (0 if self.never else 3))

        return replace(made, target=Target(made.reference, reward, made.beta), log_z=None)

    def facts(self) -> Any:
        return replace(super().facts(), log_z=False)


def test_prompts_without_a_right_answer_stay_as_they_are(tmp_path):
    task = Hopeless()
    last = built(measure(SFT(), Fit(lr=0.2, epochs=20.0, batch_size=4), task, n=16).learn(), tmp_path)
    problem = task.problem({}, 0)
    policy: Any = last.recipe.learnt(last, problem).policy
    tables = list(zip(policy.tables, problem.reference.tables, strict=True))
    moved = [any(not torch.equal(new[k], old[k]) for new, old in tables) for k in range(6)]
    assert moved == [True] * 3 + [False] * 3


def test_a_chain_with_nothing_to_learn_from_ends_and_later_rounds_pass_it_on(tmp_path, capsys):
    task = Hopeless(never=True)
    run = built(replace(measure(SFT(), task=task, count=3), ruler=replace(RULER, absolute=False)), tmp_path)
    last = run.inputs["learnt"]
    assert read_json(last.folder / OVER)["round"] == 1 and chain(last) == []
    assert "no prompt has a right answer" in capsys.readouterr().err
    problem = task.problem({}, 0)
    assert same(last.recipe.learnt(last, problem).policy, problem.reference)
    assert not (
        last.inputs["answers"].folder / "answers.jsonl"
    ).exists()  # nobody drew for a round that does not come


@dataclass(frozen=True)
class Unlearn(SFT):
    """Makes right answers rarer."""

    def loss(self, model: Any, batch: Samples) -> Outcome:
        found = super().loss(model, batch)
        return Outcome(-found.loss, found.metrics)


def test_a_collapse_ends_the_chain(tmp_path):
    unlearn = measure(Unlearn(), Fit(lr=0.5, epochs=20.0, batch_size=4), count=3, collapse=0.9, seed=1)
    last = built(replace(unlearn, ruler=replace(RULER, absolute=False)), tmp_path).inputs["learnt"]
    assert "collapsed" in read_json(last.folder / OVER)["why"] and len(chain(last)) == 1


def test_a_round_without_a_significant_gain_is_the_last(tmp_path):
    """Six validation prompts cannot show anything at the level of 1%."""
    last = built(measure(SFT(), count=3, gain=0.01), tmp_path).inputs["learnt"]
    over = read_json(last.folder / OVER)
    assert over["round"] == 1 and "no significant gain" in over["why"] and len(chain(last)) == 1


@dataclass(frozen=True)
class Hinted(Toy):
    """Prompts 3 to 5 are never answered right; prompt k with a hint is prompt k + 6, which always is."""

    table: Table = Table(12)

    def facts(self) -> Any:
        return replace(super().facts(), log_z=False, hints=True)

    def problem(self, runs: Any, seed: int) -> Any:
        made = super().problem(runs, seed)
        last: Any = made.reference.tables[1]
        last.data[3:6, :, 2] -= 8
        last.data[6:, :, 2] += 20
        own = {name: Tokens.of([[k] for k in range(6)]) for name in ("train", "valid", "test")}

        def hinted(prompts: Tokens) -> Tokens:
            return Tokens.of([[ids[0] + 6] for ids in prompts.lists()])

        return replace(made, prompts=own, log_z=None, hinted=hinted)


def test_what_is_right_with_a_hint_is_learnt_as_if_there_had_been_none(tmp_path):
    made = measure(SFT(), Fit(lr=0.3, epochs=30.0, batch_size=8), Hinted(), count=1, n=8, rationalize=True)
    run = built(replace(made, ruler=replace(RULER, absolute=False)), tmp_path)
    last, problem = run.inputs["learnt"], Hinted().problem({}, 0)
    drawn = last.inputs["answers"]
    asked_again = [row["prompt_ids"] for row in read_rows(drawn.folder / "hinted.jsonl")]
    never = [row["prompt_ids"] for row in read_rows(drawn.folder / "answers.jsonl") if max(row["rewards"]) < 1]
    assert asked_again == never and [3] in never and [0] not in never
    rows = last.recipe.rows(last, problem, 1.0)
    of_hopeless = [ids for ids in rows.row_prompts.lists() if ids[0] in (3, 4, 5)]
    assert len(of_hopeless) == 3 * 8 and all(ids[0] < 6 for ids in rows.row_prompts.lists())
    assert problem.target.reward(rows).min() == 1
    policy: Any = last.recipe.learnt(last, problem).policy
    hopeless = problem.prompts["test"].select(slice(3, 6))
    assert (
        float(problem.target.reward(draw(policy, hopeless, n=50, max_new_tokens=2, stream=stream(0))).mean()) > 0.9
    )


@pytest.mark.parametrize(("part", "low", "high"), [(0.0, 0, 0), (0.5, 1, 23), (1.0, 24, 24)])
def test_some_hints_stay_where_that_is_asked_for(part, low, high, tmp_path):
    made = measure(
        SFT(), Fit(lr=0.3, epochs=1.0, batch_size=8), Hinted(), count=1, n=8, rationalize=True, show_hint=part
    )
    last = built(made.learn(), tmp_path)
    rows = last.recipe.rows(last, Hinted().problem({}, 0), 1.0).row_prompts.lists()
    shown = [ids[0] for ids in rows if ids[0] >= 6]
    plain = [ids[0] for ids in rows if ids[0] in (3, 4, 5)]
    assert (
        low <= len([k for k in shown if k >= 9]) <= high and len([k for k in shown if k >= 9]) + len(plain) == 24
    )


def test_a_round_weighs_prompts_alike(tmp_path):
    """The first loss is the mean over prompts, or over rows."""
    fit = Fit(lr=1e-4, steps=1, batch_size=10**6)
    alike, rows = (
        built(measure(SFT(), fit, count=1, n=16, weigh=how).learn(), tmp_path) for how in ("prompts", "rows")
    )
    losses = [log_of(each)[0]["loss"] for each in (alike, rows)]
    problem = Toy().problem({}, 0)
    data = rows.recipe.rows(rows, problem, 1.0)
    nll = -problem.reference.log_prob(data).sum(1).double()
    own = torch.stack([nll[data.prompt_index == k].mean() for k in data.prompt_index.unique()])
    assert losses[0] == pytest.approx(float(own.mean()) / HORIZON, rel=1e-6)
    assert losses[1] == pytest.approx(float(nll.mean()) / HORIZON, rel=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3


# ---- what is told of a round -----------------------------------------------------------------------------------------


def test_greedy_accuracy_is_that_of_the_likeliest_tokens(tmp_path):
    last = built(measure(SFT(), Fit(lr=0.2, epochs=3.0, batch_size=4), count=1, seed=1).learn(), tmp_path)
    policy: Any = last.recipe.learnt(last, Toy().problem({}, 1)).policy
    first = policy.tables[0][:, 0].argmax(1)
    second = policy.tables[1][torch.arange(6), first].argmax(1)
    rows = {row["metric"]: row["value"] for row in read_json(last.folder / "report.json")}
    assert rows["accuracy[greedy]"] == pytest.approx(float((second == 2).double().mean()))
    lines = list(read_rows(last.inputs["valid"].folder / "answers.jsonl"))
    some = torch.tensor([0 < sum(line["rewards"]) < len(line["rewards"]) for line in lines])
    assert 1 < int(some.sum()) < 6  # some prompts, and not all
    assert rows["accuracy[greedy, sometimes right]"] == pytest.approx(float((second == 2)[some].double().mean()))


def test_validation_takes_all_rows_and_the_same_ones_at_every_round(tmp_path):
    """With a rate of nothing the loss stays what it is on every pair there is."""
    run = built(measure(DPO(1.0), Fit(lr=1e-12, epochs=1.0, batch_size=4), n=6), tmp_path)
    rows = [
        {row["metric"]: row for row in read_json(each.folder / "report.json")}
        for each in chain(run.inputs["learnt"])
    ]
    lines = list(read_rows(chain(run.inputs["learnt"])[0].inputs["valid"].folder / "answers.jsonl"))
    pairs = sum(int(sum(line["rewards"])) * (6 - int(sum(line["rewards"]))) for line in lines)
    assert [row["valid_loss"]["n"] for row in rows] == [pairs, pairs]
    assert [row["valid_loss"]["value"] for row in rows] == pytest.approx([math.log(2)] * 2, abs=1e-9)
    assert rows[0]["valid_reward_accuracy"]["n"] == pairs


def test_validation_is_in_float32_whatever_trains(tmp_path):
    how = feed(n=6, count=1)
    fit = Fit(lr=1e-12, steps=1, batch_size=8, precision="bfloat16")
    last = built(Measure(letters(), DPO(1.0), how, fit, Net(), RULER, called="dpo").learn(), tmp_path)
    rows = {row["metric"]: row["value"] for row in read_json(last.folder / "report.json")}
    assert abs(rows["valid_reward_chosen"]) < 1e-6 and abs(rows["valid_reward_rejected"]) < 1e-6


@pytest.mark.parametrize(("now", "ends"), [(50, True), (58, False)])
def test_a_gain_is_one_over_the_round_before(now, ends, tmp_path):
    """Of 100 prompts the reference gets none right, the round before 50: the same 50 are no gain, eight more are."""

    def run_of(right: int, name: str, **inputs: Any) -> Run[Any]:
        (tmp_path / name).mkdir()
        (tmp_path / name / GREEDY).write_text(json.dumps([int(k < right) for k in range(100)]))
        return Run(recipe, tmp_path / name, inputs)

    recipe: Any = replace(measure(SFT(), gain=0.05).learn(), index=1)
    base, before = run_of(0, "base"), run_of(50, "before")
    found = reason_to_end(recipe, run_of(now, "now", valid=base, before=before))
    assert ("no significant gain" in found) == ends


# ---- what makes no sense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("rloo", {}, "from no others"),
        ("q-sharp", {}, "a round builds"),
        ("dpo", {"n": 1}, "--feed.rounds.n 2"),
        ("dpo", {"rationalize": True}, "rationalize does nothing"),
        ("sft", {"pairs": 3}, "pairs does nothing"),
        ("exo-rw", {"weigh": "prompts"}, "weigh does nothing"),
        ("sft", {"rationalize": True}, "prompts have no hints: leave --feed.rounds.rationalize out"),
        ("sft", {}, None),
    ],
)
def test_what_cannot_be_learnt_in_rounds_is_refused(name, how, said):
    found = why_not(Toy().facts(), method(name), feed(**how))
    assert (found is None) if said is None else said in found


def test_settings_of_rounds_without_rounds_are_refused():
    why = why_not(Toy().facts(), SFT(), Feed("fresh", rounds=Rounds(n=8)))
    assert "--feed.source rounds" in str(why)
    assert "--feed.rounds.n" in str(why_not(Toy().facts(), SFT(), replace(feed(), n=4)))


def test_a_reward_without_a_bound_wants_a_bar():
    facts = replace(Toy().facts(), r_max=None)
    assert "--feed.rounds.right" in str(why_not(facts, SFT(), feed()))
    assert why_not(facts, SFT(), feed(right=0.5)) is None
    assert "many prompts" in str(why_not(replace(facts, prompts="one"), SFT(), feed(right=0.5)))


def test_evaluations_on_the_way_are_refused():
    why = Cell(SFT(), feed(), replace(FIT, evaluations=2)).why_not(Toy().facts())
    assert "validated at its end" in str(why)


def test_in_memory_rounds_are_refused_with_what_to_do():
    import tiltlm as tl

    with pytest.raises(ValueError, match="run on disk"):
        tl.learn(Toy().problem({}, 0), SFT(), feed=feed())


def test_the_last_round_is_a_value_that_more_rounds_do_not_change():
    cell = Cell(SFT(), feed(count=2), FIT)
    assert Round.last_of(Toy(), cell, "sft", 0).before == Round.last_of(
        Toy(), replace(cell, feed=feed(count=1)), "sft", 0
    )


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["full", "lora"])
@pytest.mark.parametrize("reference", ["base", "previous"])
def test_networks_go_on_from_the_round_before(policy, reference, tmp_path):
    """Step 0 of round 2 is ln 2 exactly where log-ratios are taken to what it begins from, adapters or not."""
    how = feed(n=6, start="previous", reference=reference)
    made = Measure(
        letters(), DPO(1.0), how, Fit(lr=5e-3, epochs=3.0, batch_size=8), Net(policy=policy, lora_rank=2),
        replace(RULER, absolute=False), called="dpo",
    )  # fmt: skip
    run = built(made, tmp_path)
    first, second = chain(run.inputs["learnt"])
    assert log_of(first)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (abs(log_of(second)[0]["loss"] - math.log(2)) < 1e-5) == (reference == "previous")
    problem = letters().problem({"base": second.inputs["base"]}, 0)
    again = [second.recipe.learnt(second, problem).policy, first.recipe.learnt(first, problem).policy]
    rows = first.inputs["answers"].recipe.graded(first.inputs["answers"])
    assert not torch.allclose(again[0].log_prob(rows), again[1].log_prob(rows))
    lines = list(read_rows(second.inputs["answers"].folder / "answers.jsonl"))
    drawn = second.inputs["answers"].recipe.graded(second.inputs["answers"])
    log_q = torch.tensor([x for line in lines for x in line["log_q"]])
    assert torch.allclose(again[1].log_prob(drawn).sum(1), log_q, atol=1e-4)  # the first round's policy drew
