"""Keys and prompts of the stages: what a result depends on, and nothing else, decides where its run lives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiltlm as tl
import tiltlm.stages.training as training
from tiltlm.commands.compared import comparable
from tiltlm.commands.options import by_flag
from tiltlm.commands.run import parse
from tiltlm.feeds import Draws, Feed, TwistFeed
from tiltlm.fit import Fit
from tiltlm.jsonl import read_json
from tiltlm.methods import method
from tiltlm.problem import Facts
from tiltlm.recipes import preset_of, recipe
from tiltlm.recipes.preset import Preset
from tiltlm.recipes.stages import measured
from tiltlm.ruler.measure import Measurement
from tiltlm.run import ensure
from tiltlm.samples import Tokens
from tiltlm.seeds import Stream
from tiltlm.stages.cells import default_cell
from tiltlm.stages.exact import Exact, ExactSettings
from tiltlm.stages.learn import Learn
from tiltlm.stages.log_z import CommonLogZ, LogZSettings
from tiltlm.stages.measure import RulerSettings, where_it_counts
from toy import Toy

# ---- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rloo-policy", "ctl-twist", "value", "sft-policy"])
def test_a_training_asked_for_by_itself_is_the_one_that_is_measured(name):
    alone = recipe(f"animals/{name}")
    whole = recipe("animals/q-sharp" if name == "value" else f"animals/{name.rpartition('-')[0]}")
    assert whole.learn().key == alone.key
    assert replace(alone, exact=ExactSettings(n=7, stored="x")).key == alone.key, "exact draws play no part"


def test_log_z_asked_for_by_itself_is_the_one_of_a_comparison():
    measured = next(iter(recipe("animals/evaluate").inputs().values()))
    assert measured.common_log_z().key == recipe("animals/log-z").key


def test_stored_exact_draws_that_are_trained_on_count_without_a_log_z():
    made = recipe("animals/ctl")
    feed = replace(made.feed, positives="exact", supply="stored")
    made = replace(made, feed=feed, ruler=replace(made.ruler, absolute=False))
    assert made.key != replace(made, exact=ExactSettings(n=50)).key


def test_the_content_of_stored_exact_draws_counts(tmp_path):
    path = tmp_path / "exact.safetensors"
    settings = ExactSettings(stored=str(path))
    made = [replace(recipe(f"animals/{name}"), exact=settings) for name in ("ctl", "log-z", "bounds", "evaluate")]
    path.write_bytes(b"one")
    before = [each.key for each in made]
    path.write_bytes(b"another")
    assert all(each.key != key for each, key in zip(made, before, strict=True))


def test_the_content_of_a_classifiers_data_counts(tmp_path):
    path = tmp_path / "rows.csv"
    made = recipe("toxicity-small/ctl")
    classify = replace(made.task.classify, data=(str(path),))
    made = replace(made, task=replace(made.task, classifier="", classify=classify))
    path.write_text("text,label\na,toxic\n")
    before = made.key, made.learn().key
    path.write_text("text,label\nb,toxic\n")
    assert made.key != before[0] and made.learn().key != before[1]


@pytest.mark.parametrize(
    ("name", "counts"),
    [("words-small/rloo", True), ("words-small/rloo-policy", True), ("pairs/exo-rw", False), ("pairs/exo-rw-policy", False),
     ("pairs/generate", False), ("pairs/label", False), ("sums/star", False), ("sums/star-round-2", False),
     ("sums/answers", False), ("sums/v-star", False), ("sums/dpo@greedy", False)],
)  # fmt: skip
def test_how_often_a_server_follows_counts_where_it_follows_a_training(name, counts):
    at = "generator.feed.draw" if name == "sums/v-star" else "draw"
    at = "feed.draw" if "feed.draw.every" in by_flag(recipe(name)) else at
    once, seldom = (
        parse([name, f"--{at}.url", "http://h/v1", f"--{at}.every", every], "run").recipe.key for every in "14"
    )
    assert (once != seldom) == counts


def test_batches_that_decide_what_is_drawn_count():
    """Each batch of log Z's draws has random numbers of its own; those of the ruler do not depend on batches."""
    made = recipe("animals/log-z")
    assert replace(made, log_z=replace(made.log_z, batch_size=100)).key != made.key
    measured = recipe("animals/ctl")
    assert replace(measured, ruler=replace(measured.ruler, batch_size=7)).key == measured.key


# ---- prompts ------------------------------------------------------------------------------------------------------


class Unlike(Toy):
    """One prompt to train on, several others to measure on; or the other way round."""

    def facts(self) -> Facts:
        return replace(super().facts(), test_prompts="several" if self.one else "one")

    def problem(self, runs, seed):
        problem = super().problem(runs, seed)
        test = Tokens.of([[k] for k in ((3, 4, 5) if self.one else (4,))])
        return replace(problem, prompts=dict(problem.prompts) | {"test": test}, facts=self.facts(), solve=None)


def test_log_z_is_of_every_test_prompt_however_many_are_trained_on(tmp_path):
    truth = Toy(one=False).problem({}, 0)
    known = truth.solve(truth.prompts["test"]).log_z
    for one, which in ((True, [3, 4, 5]), (False, [4])):
        task = Unlike(name=f"unlike-{one}", one=one)
        run = ensure(CommonLogZ(task, LogZSettings(draws=20_000), ExactSettings(n=50)), tmp_path)
        found = read_json(run.folder / "log_z.json")
        assert found["value"] == pytest.approx(float(known[which].mean()), abs=0.02)


def test_exact_draws_to_train_on_are_of_the_training_prompt(tmp_path):
    task = Unlike(name="unlike", one=True)
    for purpose, prompts in (("training", [[0]]), ("measuring", [[3], [4], [5]])):
        run = ensure(Exact(task, ExactSettings(n=20), purpose), tmp_path)
        assert tl.Samples.load(run.folder / "exact.safetensors").prompts.lists() == prompts


def test_a_check_counts_by_the_prompt_where_there_is_one():
    """Of one prompt, observations are its draws: whether they count does not depend on other prompts."""
    problem = replace(Toy().problem({}, 0), counts={"win": torch.tensor([True, False, True, False, True, False])})
    draws = Measurement({"win": torch.arange(4.0)})
    assert where_it_counts(draws, problem, 1).values["win"].tolist() == [0, 1, 2, 3]
    assert where_it_counts(draws, problem, 4).values["win"].tolist() == [0, 2]


def test_the_log_z_of_one_prompt_of_several_has_no_error_to_show():
    made = measured(Preset(Toy(), ruler=RulerSettings(prompts=1)), "smc")
    with pytest.raises(ValueError, match=r"--ruler\.prompts 2 or more"):
        made.check()
    replace(made, ruler=RulerSettings(prompts=1, absolute=False)).check()
    replace(made, task=Toy(one=True)).check()


def test_prompts_left_out_for_their_log_z_are_other_prompts(tmp_path):
    """Runs that measured fewer prompts because log Z is known of fewer are not paired with those that measured all."""
    ruler, runs = RulerSettings(n=20), {}
    for known in (2, 6):
        settings = LogZSettings(draws=50, prompts=known)
        runs[known] = ensure(measured(Preset(Toy(), ruler=ruler, log_z=settings), "reference"), tmp_path)
    free = ensure(measured(Preset(Toy(), ruler=ruler, log_z=LogZSettings(by="none")), "reference"), tmp_path)
    assert comparable(runs[2], runs[6]) is None and comparable(runs[2], free) is None
    assert comparable(runs[6], runs[6]) is not None


def test_a_log_z_of_other_prompts_is_refused():
    problem = Toy().problem({}, 0)
    with pytest.raises(ValueError, match="6 prompts are measured"):
        tl.measure(problem, problem.reference, n=5, log_z=torch.zeros(2))


def test_another_temperature_has_another_solution():
    problem = Toy().problem({}, 0)
    prompts, colder = problem.prompts["test"], problem.at(0.25)
    assert torch.allclose(colder.solve(prompts).log_z, Toy(beta=0.25).problem({}, 0).solve(prompts).log_z)
    given = replace(problem, exact=lambda some, n, own: None)
    assert given.at(0.5).exact is not None and given.at(0.25).exact is None
    drawn = colder.exact_draws(prompts.select(slice(0, 1)), 5, Stream(1))
    assert float(drawn.exact_at[0]) == 0.25
    with pytest.raises(ValueError, match=r"at beta 0\.5 alone"):
        replace(problem, fresh=lambda n, own: None).at(0.25)


def test_stored_draws_are_refused_where_nothing_would_learn_from_them():
    for name in ("continuation/generate", "infill2-small/label", "toxicity-small/generate", "tree/label"):
        with pytest.raises(ValueError, match="stored draws are for many prompts"):
            recipe(name).check()


def test_a_prompt_that_does_not_fit_is_refused():
    language = preset_of("animals").task.language
    model = tl.CausalLM.from_config(_config(), eos_ids=())
    for ids, tokens, words in (((99,), 2, "has token 99"), ((1,) * 511, 2, "more than the 512")):
        with pytest.raises(ValueError, match=words):
            replace(language, model="", prompt_ids=ids, new_tokens=tokens).asked(model)


def _config():
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=20, n_positions=32, n_layer=1, n_embd=8, n_head=2, bos_token_id=None, eos_token_id=None
    )


def test_in_memory_too_a_copy_is_trained_without_dropout():
    model = tl.CausalLM.from_config(_config(), eos_ids=())
    problem = tl.Problem.of(
        model, reward=lambda some: some.tokens[:, 0].double(), prompts=[[1]], beta=1.0, max_new_tokens=2
    )
    kept = [m.p for m in problem.copy().modules() if isinstance(m, torch.nn.Dropout)]
    assert kept and not any(kept)
    assert any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)), (
        "the reference itself is left alone"
    )


def test_stored_exact_draws_in_memory():
    learnt = tl.learn(
        Toy(one=True).problem({}, 0), tl.CTL(), steps=2, feed=TwistFeed(particles=8, positives="exact", supply="stored"),
        progress=False,
    )  # fmt: skip
    assert len(learnt.metrics) == 2


def test_prefixes_of_a_table_are_refused():
    feed = TwistFeed(8, 2, "exact", prefixes=True)
    assert "leave --feed.prefixes out" in replace(default_cell(method("fudge"), Toy().facts()), feed=feed).why_not(
        Toy().facts()
    )


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("animals/rloo", "--fit.epochs 2", "--fit.epochs 0"),
        ("animals/ctl", "--net.start untrained", "--net.start reference"),
        ("animals/dpo", "--feed.n 5", "--fit.batch-size"),
        ("animals/ctl", "--fit.epochs 2", "--fit.epochs 0"),
        ("animals/rloo", "--fit.batch-size 1", "--fit.batch-size 2"),
        ("tree/q-sharp", "--method.value.lm-weight 1", "models no language"),
        ("animals/ctl", "--task.r-max nan", "--task.r-max"),
        ("animals/ctl", "--feed.tempered nan", "tempered is a power"),
        ("animals/ctl", "--net.mlp-layers -1", "0 or more"),
        ("animals/ctl", "--exact.max-tries nan", "max_tries"),
        ("toxicity-small/ctl", "--task.threshold nan", "threshold"),
        ("toxicity-small/ctl", "--task.classify.held-out 1", "held_out"),
        ("dialogues/dpo", "--task.test-rows 0", "nothing to measure on"),
        ("dialogues/dpo", "--task.limit -1", "not negative"),
        ("dialogues/dpo", "--feed.draws.prompts -1", "0 for all"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(name, args, words):
    with pytest.raises(ValueError, match=words):
        parse([name, *args.split()], "run").recipe.check()


def test_the_methods_of_a_file_are_names(tmp_path):
    path = tmp_path / "c.yaml"
    for text, names in (("ctl dpo", ["ctl", "dpo"]), ("[ctl, dpo]", ["ctl", "dpo"]), ("3", None), ("[]", None)):
        path.write_text(f"recipe: animals/evaluate\nmethods: {text}\n")
        if names is None:
            with pytest.raises(ValueError, match="line 2: methods are names"):
                parse(["--config", str(path)], "run")
        else:
            assert list(parse(["--config", str(path)], "run").recipe.methods) == names


def test_methods_on_the_command_line_win_over_those_of_a_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "recipe: animals/evaluate\nmethods: [ctl, rloo]\nctl: {fit: {lr: 2.0e-3}}\nrloo: {fit: {lr: 3.0e-3}}\n"
    )
    made = parse(["--config", str(path), "--methods", "sft", "ctl"], "run").recipe
    assert (
        made.methods == ("sft", "ctl")
        and set(made.inputs()) == {"sft", "ctl"}
        and made.cells["ctl"].fit.lr == 2e-3
    )


# ---- going on -----------------------------------------------------------------------------------------------------

STORED = Feed(source="stored", draws=Draws(4), size=2)
FEEDS = {
    "dpo": [Feed(source="fresh"), Feed(source="own"), STORED], "exo-rw": [STORED, Feed(source="fresh")],
    "sft": [Feed(source="fresh", n=2), Feed(source="own")], "kto": [STORED, Feed(source="fresh")], "rloo": [Feed(n=2)],
    "ppo": [Feed(n=2)], "q-sharp": [Feed(source="fresh"), STORED],
    "ctl": [TwistFeed(8, 2), TwistFeed(8, 2, "csmc"), TwistFeed(8, 2, drawn_by="mixed")],
    "fudge": [TwistFeed(8, 2)],
}  # fmt: skip


def learning(name: str, feed: Feed | TwistFeed) -> Learn:
    task, cell = Toy(), default_cell(method(name), Toy().facts())
    size = cell.fit.batch_size if isinstance(feed, TwistFeed) else 8
    cell = replace(cell, feed=feed, fit=Fit(lr=0.05, steps=6, checkpoint_every=2, batch_size=size))
    return Learn.of(task, cell, name, ExactSettings(), 0)


@pytest.mark.parametrize(("name", "feed"), [(name, feed) for name, feeds in FEEDS.items() for feed in feeds])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(name, feed, tmp_path, monkeypatch):
    made = learning(name, feed)
    whole = ensure(made, tmp_path / "whole").folder
    usual = training._both

    def broken(show, send):
        def on_step(step, limit, metrics):
            usual(show, send)(step, limit, metrics)
            if step == 5:
                raise KeyboardInterrupt

        return on_step

    with monkeypatch.context() as patch:
        patch.setattr(training, "_both", broken)
        with pytest.raises(KeyboardInterrupt):
            ensure(made, tmp_path / "parts")
    parts = ensure(made, tmp_path / "parts").folder
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert weights(parts) == weights(whole) != {}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("checkpoint-6/*.safetensors")}
