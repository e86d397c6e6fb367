"""What a user says of rounds: answers by themselves or of a file, other weights to begin with, V-STaR, list and help."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

import question_world
from tiltlm import recipes
from tiltlm.commands.help import short_help
from tiltlm.commands.models import load_run
from tiltlm.commands.run import parse
from tiltlm.feeds import Feed, Rounds
from tiltlm.feeds.rounds import Shares, rates
from tiltlm.fit import Fit
from tiltlm.jsonl import read_json, read_rows
from tiltlm.methods import method
from tiltlm.models.causal import CausalLM
from tiltlm.nets import Net, learner
from tiltlm.policies.dpo import DPO
from tiltlm.policies.sft import SFT
from tiltlm.problem import Problem
from tiltlm.questions.generated import Generated, write_generated
from tiltlm.recipes import preset_of, recipe
from tiltlm.ruler.of_draws import best_at, majority_at, pass_at, ranking
from tiltlm.run import Run, begin, ensure, find
from tiltlm.samples import Samples, Tokens
from tiltlm.settings import hashed
from tiltlm.stages.answers import Answers
from tiltlm.stages.cells import Cell
from tiltlm.stages.learn import Learn
from tiltlm.stages.measure import Measure, RulerSettings
from tiltlm.stages.rounds import chain
from tiltlm.stages.v_star import Candidates, VStar
from toy_world import Toy, install

FIT = Fit(lr=0.05, epochs=2.0, batch_size=4)
RULER = RulerSettings(n=20)


def measure(learns: Any, fit: Fit = FIT, net: Net = Net(), task: Any = Toy(), **how: Any) -> Measure:  # noqa: B008
    feed = Feed("rounds", rounds=Rounds(**({"count": 2, "n": 8} | how)))
    return Measure(task, learns, feed, fit, net, RULER, called=type(learns).__name__.lower())


def lines(run: Run[Any]) -> list[dict[str, Any]]:
    return list(read_rows(run.folder / "answers.jsonl"))


def policy(run: Run[Any]) -> Any:
    return run.recipe.learnt(run, Toy().problem({}, 0)).policy


def weights(model: Any) -> list[torch.Tensor]:
    return [x.detach() for x in model.parameters()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


# ---- answers --------------------------------------------------------------------------------------------------------


def test_the_stage_answers_tells_of_how_many_prompts_all_some_and_no_answers_are_right(tmp_path, capsys):
    run = ensure(Answers(Toy(), n=12), tmp_path)
    assert [len(line["rewards"]) for line in lines(run)] == [12] * 6
    run.recipe.show(run)
    said = capsys.readouterr().out
    right = [sum(line["rewards"]) for line in lines(run)]
    graded = run.recipe.graded(run)
    rate = rates(graded.reward >= 1, graded.prompt_index, 6)
    rows = run.recipe.shares(Shares.of(graded.reward >= 1, graded.prompt_index), rate)
    found = {row["metric"]: row["value"] for row in rows}
    assert found["always_right"] == sum(r == 12 for r in right) and found["never_right"] == right.count(0)
    assert found["pairs"] == sum(r * (12 - r) for r in right) and found["unanswered"] == 0
    assert f"{sum(right) / 72:.4f} [" in said and "always" in said


def test_another_policy_answers_where_one_is_named(tmp_path):
    """Learnt to near certainty; what it draws is right more often than the reference's."""
    sure = ensure(measure(SFT(), Fit(lr=0.5, epochs=10.0, batch_size=8), n=16, count=1).learn(), tmp_path)
    plain = ensure(Answers(Toy(), n=20), tmp_path)
    own = ensure(Answers(Toy(), n=20, policy=str(sure.folder)), tmp_path)
    rate = [torch.tensor([line["rewards"] for line in lines(run)]).mean() for run in (plain, own)]
    assert rate[1] > rate[0] + 0.2 and plain.folder != own.folder


@pytest.mark.parametrize("stage", ["answers", "answers-valid", "sft-answers-2", "sft-round-2", "v-star"])
def test_runs_of_rounds_are_read_back_by_their_names(stage, tmp_path, monkeypatch):
    install(monkeypatch)
    run = find(parse([f"toy/{stage}"], "run").recipe, tmp_path)
    assert run.recipe.name == f"toy/{stage}"
    run.folder.mkdir(parents=True)
    begin(run)
    for name in ("provenance.json", "DONE"):
        (run.folder / name).write_text("{}")
    again = load_run(run.folder)
    assert again.folder.resolve() == run.folder.resolve() and again.recipe.key == run.recipe.key


# ---- answers of a file ----------------------------------------------------------------------------------------------


def test_rounds_on_stored_answers_are_the_rounds_that_drew_them(tmp_path):
    for learns in (SFT(), DPO(0.1)):
        drew = find(measure(learns, count=1).learn(), tmp_path)
        ensure(drew.recipe, tmp_path)
        train, valid = (drew.inputs[name].folder / "answers.jsonl" for name in ("answers", "valid"))
        made = measure(learns, count=1, samples=str(train), valid_samples=str(valid)).learn()
        read = ensure(made, tmp_path)
        assert read.folder != drew.folder and same(policy(read), policy(drew))
        told = [
            [
                {name: x for name, x in row.items() if name != "recipe"}
                for row in read_json(run.folder / "report.json")
            ]
            for run in (drew, read)
        ]
        assert told[0] == told[1]


def test_a_file_counts_by_its_content_and_the_second_round_draws(tmp_path):
    drew = ensure(Answers(Toy(), n=8), tmp_path)
    file = tmp_path / "answers.jsonl"
    file.write_bytes((drew.folder / "answers.jsonl").read_bytes())
    made = measure(SFT(), samples=str(file))
    run = find(made.learn(), tmp_path)
    first = run.inputs["before"]
    assert first.inputs["answers"].recipe.samples == str(file)
    assert run.inputs["answers"].recipe.samples == "" and run.inputs["answers"].recipe.before is not None
    keys = [made.key, made.learn().key, run.inputs["answers"].recipe.inputs()["before"].key]
    file.write_text(file.read_text() + "\n".join(file.read_text().splitlines()[:1]) + "\n")
    again = find(made.learn(), tmp_path)
    assert all(
        key != other
        for key, other in zip(keys, [made.key, made.learn().key, again.inputs["before"].key], strict=True)
    )


def test_ragged_answers_strangers_and_long_ones(tmp_path, capsys):
    """Prompt 0 has three, 1 one, the others none; one line is of a prompt that is not there."""
    file = tmp_path / "a.jsonl"
    rows = [
        {"prompt_ids": [0], "completion_ids": [[0, 2], [0, 1]], "finished": [True, True]},
        {"prompt_ids": [9], "completion_ids": [[0, 2]], "finished": [True]},
        {"prompt_ids": [1], "completion_ids": [[1, 2], [0, 0, 0]], "finished": [True, True]},
        {"prompt_ids": [0], "completion_ids": [[1, 0]], "finished": [True]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ensure(measure(DPO(0.1), count=1, samples=str(file)).learn(), tmp_path)
    drawn = run.inputs["answers"]
    assert [line["rewards"] for line in lines(drawn)] == [[1, 0, 0], [1], [], [], [], []]
    told = {row["metric"]: row["value"] for row in read_json(run.folder / "report.json")}
    assert told["train_accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert (told["always_right"], told["sometimes_right"], told["pairs"], told["rows"]) == (1, 1, 2, 2)
    said = " ".join(capsys.readouterr().err.split())
    for text in (
        "4 of 6 prompts have no stored answer",
        "1 stored answers belong to none",
        "1 stored answers have more",
    ):
        assert text in said
    drawn.recipe.show(drawn)
    assert "unanswered" in capsys.readouterr().out


def test_files_that_do_not_fit_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    made = measure(SFT(), count=1, samples=str(file)).learn()
    with pytest.raises(ValueError, match="no such file of answers"):
        ensure(made, tmp_path)
    for text, said in [
        ({"prompt_ids": [9], "completion_ids": [[0]], "finished": [True]}, "no answer to one of these 6 prompts"),
        ({"prompt_ids": [0], "completion_ids": [[7]], "finished": [True]}, "token ids, 0 to 2"),
        ({"prompt_ids": [0], "completion_ids": [[1]], "finished": []}, "an entry for each answer"),
    ]:
        file.write_text(json.dumps(text) + "\n")
        with pytest.raises(ValueError, match=said):
            ensure(made, tmp_path)
    with pytest.raises(ValueError, match="not asked for again"):
        Rounds(samples="x", rationalize=True)


# ---- other weights to begin with --------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path) -> Run[Any]:
    return ensure(measure(SFT(), Fit(lr=0.3, epochs=10.0, batch_size=4), count=1).learn(), tmp_path)


def test_dpo_from_a_checkpoint_keeps_the_base_as_its_reference(trained, tmp_path):
    """Its answers are the checkpoint's, its first weights too, and h is taken to the base: step 0 is not ln 2."""
    net = Net(weights=str(trained.folder))
    run = ensure(measure(DPO(1.0), Fit(lr=1e-9, steps=1, batch_size=4), net, count=1).learn(), tmp_path)
    first = next(iter(read_rows(run.folder / "metrics.jsonl")))
    assert abs(first["loss"] - math.log(2)) > 1e-3
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(weights(policy(run)), weights(policy(trained)), strict=True)
    )
    assert run.inputs["answers"].recipe.policy == run.inputs["valid"].recipe.policy == str(trained.folder)
    expected = ensure(Answers(Toy(), n=8, policy=str(trained.folder)), tmp_path)
    assert expected.folder == run.inputs["answers"].folder


def test_learn_begins_with_them_as_well_and_their_content_counts(trained, tmp_path):
    made = Learn(
        Toy(), DPO(1.0), Feed("stored"), Fit(lr=1e-9, steps=1, batch_size=4), Net(weights=str(trained.folder))
    )
    run = ensure(replace(made, called="dpo"), tmp_path)
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(weights(policy(run)), weights(policy(trained)), strict=True)
    )
    assert str(trained.folder) in run.recipe.files()
    assert "weights" not in hashed(Net())


def test_round_zero_of_the_story_is_what_the_chain_began_with(trained, tmp_path):
    run = ensure(measure(SFT(), net=Net(weights=str(trained.folder)), count=1), tmp_path)
    reward = {
        row["round"]: row["value"] for row in read_json(run.folder / "rounds.json") if row["metric"] == "reward"
    }
    base = ensure(measure(SFT(), count=1), tmp_path)
    plain = {
        row["round"]: row["value"] for row in read_json(base.folder / "rounds.json") if row["metric"] == "reward"
    }
    assert reward[0] > plain[0] + 0.05


@pytest.mark.parametrize(
    ("name", "net", "said"),
    [
        ("ctl", Net(weights="x"), "a policy's"),
        ("sft", Net("head", weights="x"), "--net.policy full or lora"),
        ("sft", Net(weights="./nowhere"), "no such folder"),
    ],
)
def test_weights_that_make_no_sense_are_refused(name, net, said):
    assert said in str(net.why_not(method(name), replace(Toy().facts(), network=True)))


def test_weights_of_another_shape_are_refused(tmp_path):
    torch.save({}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"no weights of a model like the reference|no such"):
        learner(Toy().problem({}, 0), SFT(), Net(weights=str(tmp_path)), Toy().problem({}, 0).stream)


# ---- the same of networks -------------------------------------------------------------------------------------------


def network(seed: int) -> CausalLM:
    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    return CausalLM.from_config(config, seed=seed)


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """A reference, another model, and adapters beside the reference."""
    found = {name: tmp_path / name for name in ("base", "other", "adapters")}
    for k, name in enumerate(("base", "other")):
        network(k).save(found[name])
    adapted = CausalLM.load(found["base"], eos_ids=()).with_lora(4, 8)
    for name, x in adapted.named_parameters():
        if "lora_B" in name:
            x.data.normal_(generator=torch.Generator().manual_seed(0))
    adapted.save(found["adapters"])
    return found


def begins(folders: dict[str, Path], net: Net) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of one completion by the policy as it begins, and by what its ratios are taken to."""
    reward: Any = lambda samples: samples.mask.sum(1).double()  # noqa: E731
    model = CausalLM.load(folders["base"], eos_ids=()).requires_grad_(False)
    problem = Problem.of(model, reward=reward, prompts=[[1, 2]], beta=1.0, max_new_tokens=3)
    problem, who = learner(problem, DPO(0.1), net, problem.stream)
    assert who.policy is not None and any(x.requires_grad for x in who.module.parameters())
    with torch.no_grad():
        return who.policy.log_prob(ONE), problem.reference.log_prob(ONE)


ONE = Samples(
    Tokens.of([[1, 2]]), torch.tensor([0]), torch.tensor([[3, 4, 5]]), torch.ones(1, 3, dtype=torch.bool)
)


@pytest.mark.parametrize("policy", ["full", "lora"])
@pytest.mark.parametrize("weights", ["other", "adapters"])
def test_networks_begin_as_the_weights_and_keep_their_reference(policy, weights, folders):
    found, reference = begins(folders, Net(policy, lora_rank=4, weights=str(folders[weights])))
    if weights == "other":
        expected = CausalLM.load(folders["other"], eos_ids=())
    else:
        expected = CausalLM.load(folders["base"], eos_ids=()).with_lora(4, 8)
        expected.restore(folders["adapters"])
    base = CausalLM.load(folders["base"], eos_ids=())
    with torch.no_grad():
        assert torch.allclose(found, expected.eval().log_prob(ONE), atol=1e-5)
        assert torch.allclose(reference, base.log_prob(ONE), atol=1e-6)
        assert not torch.allclose(found, reference, atol=1e-2)


def test_adapters_of_another_rank_or_model_say_how_to_go_on(folders):
    with pytest.raises(ValueError, match=r"have rank 4, and those to train --net\.lora-rank 8: merge them first"):
        begins(folders, Net("lora", weights=str(folders["adapters"])))
    config = folders["adapters"] / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folders["base"]), str(folders["other"])))
    with pytest.raises(ValueError, match=r"belong to .*other, and the reference is .*base"):
        begins(folders, Net("lora", lora_rank=4, weights=str(folders["adapters"])))


# ---- what n draws are worth -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_pass_and_best_are_means_over_all_subsets(n):
    right = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    score = torch.tensor([[0.3, 0.1, 2.0, 2.0, -1.0], [1.0, 2, 3, 4, 5], [0.0, 0, 0, 0, 0]])
    for p in range(3):
        some, best = [], []
        for subset in itertools.combinations(range(5), n):
            some.append(float(right[p, list(subset)].any()))
            top = max(score[p, k] for k in subset)
            tied = [float(right[p, k]) for k in subset if score[p, k] == top]
            best.append(sum(tied) / len(tied))
        assert float(pass_at(right, n)[p]) == pytest.approx(sum(some) / len(some))
        assert float(best_at(right, score, n)[p]) == pytest.approx(sum(best) / len(best))


def test_majorities_and_rankings_by_hand():
    right = torch.tensor([[False, True, True, False]])
    said = [["a", "b", "b", ""]]
    assert [float(majority_at(right, said, n)) for n in (1, 2, 4)] == [
        0.5,
        0.5,
        1.0,
    ]  # a; b — a of a, b; b of b — b
    assert float(ranking(right, torch.tensor([[1.0, 2.0, 1.0, 0.0]]))) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert len(ranking(torch.tensor([[True, True]]), torch.zeros(1, 2))) == 0
    with pytest.raises(ValueError, match="1 to 4"):
        pass_at(right, 5)


# ---- V-STaR -----------------------------------------------------------------------------------------------------------


def v_star(**how: Any) -> VStar:
    fit = Fit(lr=0.1, epochs=6.0, batch_size=8)
    generator = Cell(SFT(), Feed("rounds", rounds=Rounds(2, 8, accumulate=True)), replace(fit, lr=0.02))
    return VStar(Toy(), generator, Cell(DPO(0.5), generator.feed, fit), Candidates(**({"n": 16} | how)))


def test_v_star_chooses_by_a_verifier_learnt_from_all_answers_of_the_generators_rounds(tmp_path, capsys):
    run = ensure(v_star(), tmp_path)
    told = {row["metric"]: row for row in read_json(run.folder / "report.json")}
    names = [f"accuracy[{way}@{n}]" for n in (1, 2, 4, 8, 16) for way in ("best", "pass")]
    assert list(told) == [*names, "verifier_accuracy"]  # no answers are read off here, so nothing votes
    assert told["accuracy[best@1]"]["value"] == pytest.approx(told["accuracy[pass@1]"]["value"])
    assert told["accuracy[best@16]"]["value"] > told["accuracy[best@1]"]["value"] + 0.1
    assert all(
        told[f"accuracy[best@{n}]"]["value"] <= told[f"accuracy[pass@{n}]"]["value"] + 1e-9 for n in (2, 16)
    )
    assert told["verifier_accuracy"]["value"] > 0.8
    assert (run.folder / "best-of-n.png").stat().st_size > 10_000
    generator, verifier = run.inputs["generator"], run.inputs["verifier"]
    assert len(chain(generator)) == 2 and len(chain(verifier)) == 1
    both = sum(
        sum(x for x in line["rewards"]) * sum(1 - x for x in line["rewards"])
        for line in [line for each in chain(generator) for line in lines(each.inputs["answers"])]
    )
    rows = next(row["value"] for row in read_json(verifier.folder / "report.json") if row["metric"] == "rows")
    assert rows >= both  # pairs of one round, and those across rounds of the same prompt
    run.recipe.show(run)
    assert "by the verifier" in capsys.readouterr().out


def test_v_star_trains_nothing_twice_and_more_candidates_train_nothing(tmp_path):
    one, two = (find(v_star(n=n), tmp_path) for n in (4, 8))
    assert one.folder != two.folder
    for name in ("generator", "verifier"):
        assert one.inputs[name].folder == two.inputs[name].folder
    assert two.inputs["verifier"].inputs["answers"].folder == two.inputs["generator"].inputs["answers"].folder
    other = find(replace(v_star(), task=Toy(beta=0.3)), tmp_path)
    assert other.folder == find(v_star(), tmp_path).folder


def test_a_generator_that_ended_early_is_measured_where_it_ended(tmp_path):
    made = v_star()
    how = replace(made.generator.feed.rounds, count=3, gain=0.01)
    made = replace(made, generator=replace(made.generator, feed=replace(made.generator.feed, rounds=how)))
    run = ensure(made, tmp_path)
    assert len(chain(run.inputs["generator"])) == 1 and len(lines(run.inputs["answers"])) == 6


# ---- presets, list, help --------------------------------------------------------------------------------------------


def test_every_preset_of_a_task_has_a_line_in_the_list():
    used = {name for task in recipes.tasks() for name in preset_of(task).variants}
    assert used - set(recipes.presets()) <= {"d2po"}
    assert set(recipes.presets()) <= used


def test_help_of_a_preset_of_rounds_shows_the_settings_of_rounds():
    said = short_help(recipe("sums/star"), "run")
    for flag in ("count", "n", "start", "reference", "pairs", "rationalize", "samples"):
        assert f"--feed.rounds.{flag} " in said or f"--feed.rounds.{flag}," in said
    assert "--feed.draws.n" not in said and "--feed.size" not in said and "--feed.n " not in said
    assert "--net.weights" in said
    assert "--feed.draws.n" in short_help(recipe("sums/dpo"), "run")
    assert "--candidates.n" in short_help(recipe("sums/v-star"), "run")
    assert "--before" not in short_help(recipe("sums/answers"), "run")


# ---- of graded questions ----------------------------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path) -> question_world.Letters:
    folder = question_world.written(tmp_path / "model")
    return question_world.Letters(language=replace(question_world.Letters().language, model=str(folder)))


def test_rounds_learn_from_stars_own_table_of_answers(letters, tmp_path, capsys):
    """Question 7 has a right and a wrong answer, 5 a right one, 3 and 12 none; 99 is not asked here."""
    table = tmp_path / "generated.csv"
    answers = [(7, "A", True), (7, "B", True), (5, "D", True), (99, "C", True)]
    rows = [Generated(i, 0, "", text, finish_reason="stop" if done else "length") for i, text, done in answers]
    write_generated(table, rows)
    fit = Fit(lr=0.01, steps=4, batch_size=1)
    made = measure(DPO(0.1), fit, task=letters, count=1, samples=str(table), valid_samples=str(table)).learn()
    learnt = ensure(made, tmp_path)
    found = lines(learnt.inputs["answers"])
    assert [(line["index"], line["rewards"], line["answers"]) for line in found] == [
        (7, [1, 0], ["A", "B"]), (3, [], []), (12, [], []), (5, [1], ["D"]),
    ]  # fmt: skip
    told = {row["metric"]: row["value"] for row in read_json(learnt.folder / "report.json")}
    assert told["pairs"] == told["rows"] == 1 and told["train_accuracy"] == pytest.approx(0.75)
    assert told["valid_reward_accuracy"] == 1 if "valid_reward_accuracy" in told else "valid_loss" in told
    assert "1 stored answers belong to none" in " ".join(capsys.readouterr().err.split())


def test_v_star_of_questions_votes_as_well(letters, tmp_path):
    run = ensure(replace(v_star(n=4), task=letters), tmp_path)
    told = {row["metric"]: row["value"] for row in read_json(run.folder / "report.json")}
    assert told["accuracy[maj@1]"] == pytest.approx(told["accuracy[pass@1]"])
    assert told["accuracy[maj@4]"] <= told["accuracy[pass@4]"]
    assert [index for index, _ in read_json(run.folder / "questions.json")] == [7, 3, 12, 5]
