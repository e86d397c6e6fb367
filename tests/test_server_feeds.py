"""Feeds, decoders and stages whose rows a server draws: what it is told, what is measured of it, what is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

import tiltlm as tl
from close import close
from command import tiltlm
from completions import Completions, shaken
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.experience import Generated
from tiltlm.feeds.available import why_not
from tiltlm.feeds.served import Followed, Following
from tiltlm.models.causal import CausalLM
from tiltlm.models.teacherless import Teacherless
from tiltlm.problem import Facts
from tiltlm.recipes import recipe
from tiltlm.run import ensure
from tiltlm.samplers.reloading import reload, told
from tiltlm.samplers.server import Server
from tiltlm.samplers.serving import Serving
from tiltlm.seeds import stream
from tiltlm.stages.draws import Draws, Labels
from tiltlm.tasks.language import Language
from tiltlm.tasks.mine import Mine

PROMPTS = [[1, 2], [3], [1, 1, 3]]


@pytest.fixture
def model() -> CausalLM:
    size = GPT2Config(vocab_size=5, n_layer=1, n_head=2, n_embd=8, n_positions=16, bos_token_id=0, eos_token_id=0)
    return shaken(CausalLM.from_config(size, eos_ids=(0,)))


def problem(model: CausalLM) -> tl.Problem:
    return tl.Problem.of(
        model, reward=lambda samples: ((samples.tokens == 2) & samples.mask).sum(1).double(), prompts=PROMPTS,
        beta=0.5, max_new_tokens=3,
    )  # fmt: skip


def live(at: Completions, folder: Path, **settings) -> tl.Feed:
    return tl.Feed(n=2, draw=Serving(at.url, weights=str(folder), **settings))


def test_a_server_follows_the_policy_and_is_as_old_as_it_is(model, tmp_path):
    """Every second step the weights go there: log q is then the policy's own; a step later it is not, and that is said."""
    with Completions(copy.deepcopy(model)) as at:
        fit = tl.Fit(steps=4, batch_size=6, lr=1e-2, decay="none")
        with pytest.warns(UserWarning, match=r"differ by 0\.\d+ nats a token \(metric `mismatch`; 1 steps old\)"):
            found = tl.learn(
                problem(model), "rloo", fit=replace(fit, lr=0.1), feed=live(at, tmp_path, every=2), progress=False
            )
        orders = [path for path, _ in at.followed]
    assert orders == ["collective_rpc", "reset_prefix_cache"] * 2
    assert [row["age"] for row in found.metrics] == [0, 1, 0, 1]
    gaps = [row["mismatch"] for row in found.metrics]
    assert max(gaps[::2]) < 1e-5 and min(gaps[1::2]) > 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("method", ["grpo", "online-ipo"])
def test_any_live_method_learns_from_a_server(model, tmp_path, method):
    """One that clips and one on pairs: the weights move, and mismatch is logged."""
    with Completions(copy.deepcopy(model)) as at:
        found = tl.learn(problem(model), method, steps=2, feed=live(at, tmp_path), progress=False)
        assert len(at.followed) == 4
    assert all(row["mismatch"] < 1e-5 and row["age"] == 0 for row in found.metrics)
    assert any(not torch.equal(a, b) for a, b in zip(found.model.parameters(), model.parameters(), strict=True))


def test_weights_are_sent_once_a_block_and_at_once_after_an_interruption(model, tmp_path):
    """Steps 4, 5 (drawn twice), 6, 7 of blocks of three: sent at 4, where it begins, and at 6."""
    sent = []
    drawer = Following(Server(Serving("http://localhost:1/v1", every=3), (), 5), model, tmp_path, sent.append)
    experience = Followed(Generated(lambda own: own, stream(0)), drawer)
    ages = []
    for step, again in ((4, 0), (5, 0), (5, 1), (6, 0), (7, 0)):
        experience.batch(step, again)
        ages.append(experience.numbers()["age"])
    assert ages == [0, 1, 1, 0, 1] and sent == [tmp_path / "weights"] * 2
    close(CausalLM.load(tmp_path / "weights").head.weight, model.head.weight, 0)


def test_adapters_go_under_a_name_of_their_own(model, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("tiltlm.samplers.reloading.told", lambda server, path, body: told.append((path, body)))
    model.with_lora(rank=2).save(tmp_path)
    reload(Server(Serving("http://localhost:1/v1", model="policy"), (), 5), tmp_path)
    assert told == [
        ("/v1/load_lora_adapter", {"lora_name": "policy", "lora_path": str(tmp_path), "load_inplace": True})
    ]
    with pytest.raises(ValueError, match=r"name it \(draw.model\)"):
        reload(Server(Serving("http://localhost:1/v1"), (), 5), tmp_path)


def test_a_server_that_refuses_the_weights_is_not_drawn_from(model, tmp_path):
    model.save(tmp_path / "new")
    with (
        Completions(copy.deepcopy(model), held=True) as at,
        pytest.raises(ValueError, match="did not empty its cache of prefixes"),
    ):
        reload(Server(Serving(at.url), (), 5), tmp_path / "new")
    with Completions(model) as at, pytest.raises(ValueError, match=r"/nowhere answered 404"):
        told(Server(Serving(at.url), (), 5), "/nowhere", {})


def test_stored_fresh_and_best_draws_come_from_a_server(model):
    """Each asks for its rows there: 3 prompts of 2 stored draws, 2 steps of 3 prompts of 4 fresh ones, groups of 3."""
    world = problem(model)
    with Completions(copy.deepcopy(model)) as at:
        served = Serving(at.url)
        stored = tl.Feed("stored", tl.Draws(2), draw=served)
        tl.learn(world, tl.ExoRw(), fit=tl.Fit(steps=1, batch_size=2), feed=stored, progress=False)
        assert len(at.asked) == 6
        fresh = tl.Feed("fresh", n=4, draw=served)
        tl.learn(world, "q-sharp", fit=tl.Fit(steps=2, batch_size=12), feed=fresh, progress=False)
        assert len(at.asked) == 30
        best = tl.BestOf(3, draw_at=served)
        drawn = best.draw(
            world, tl.Learnt(world, best, tl.Net(), None).learner, world.prompts["test"], 2, stream(0)
        )
        assert len(at.asked) == 48 and len(drawn) == 6 and not at.followed


@pytest.mark.parametrize(
    ("method", "feed", "words"),
    [
        ("rloo", tl.Feed(draw=Serving("http://h/v1")), "--feed.draw.weights FOLDER"),
        ("rloo", tl.Feed(draw=Serving("http://h/v1", text=True, weights="w")), "leave --feed.draw.text out"),
        (
            "dpo",
            tl.Feed("own", draw=Serving("http://h/v1")),
            "the data's own rows are not drawn: leave --feed.draw.url",
        ),
        (
            "dpo",
            tl.Feed("own", draw=Serving(precision="bfloat16")),
            "rows are not drawn: leave --feed.draw.precision out",
        ),
        ("sft", tl.Feed(draw=Serving("http://h/v1")), "it imitates exact draws .*leave --feed.draw.url out"),
        (
            "sft",
            tl.Feed(draw=Serving(precision="bfloat16")),
            "it imitates exact draws .*leave --feed.draw.precision out",
        ),
    ],
)
def test_what_is_not_drawn_so_is_refused(model, method, feed, words):
    with pytest.raises(ValueError, match=words):
        tl.learn(problem(model), method, feed=feed)


def test_a_table_is_not_served():
    table = tl.TableLM(2, 3, 2)
    world = tl.Problem.of(
        table, reward=lambda samples: samples.tokens.sum(1), prompts=[[0], [1]], beta=1, max_new_tokens=2
    )
    with pytest.raises(ValueError, match="a server draws from a transformer"):
        tl.learn(world, "rloo", feed=tl.Feed(draw=Serving("http://h/v1", weights="w")))
    with pytest.raises(ValueError, match="a transformer alone draws in bfloat16"):
        tl.learn(world, "rloo", feed=tl.Feed(draw=Serving(precision="bfloat16")))


def test_models_that_no_server_has_are_refused_before_anything_is_built(model):
    """Read at another temperature, or predicting all tokens at once: a server would draw from another distribution."""
    feed = tl.Feed("stored", draw=Serving("http://h/v1"))
    warm = Facts(1.0, "several", temperature=0.8)
    assert "--task.temperature 1" in str(why_not(warm, tl.ExoRw(), feed))
    assert why_not(replace(warm, temperature=1.0), tl.ExoRw(), feed) is None
    assert "leave --feed.draw.url out" in str(why_not(Facts(1.0, "several", teacherless=True), tl.ExoRw(), feed))
    assert recipe("hh/exo-rw").task.facts().temperature == 0.8
    with pytest.raises(ValueError, match="this is a Teacherless"):
        Server.of(feed.draw, Teacherless(model.model, 4))


# ---- stages and commands ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny GPT-2 with a tokenizer."""
    folder = tmp_path_factory.mktemp("served") / "base"
    tokenizer = train_tokenizer(stories(200, stream(0, "text")), 300)
    size = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=16, n_positions=96, bos_token_id=0, eos_token_id=0
    )
    model = CausalLM.from_config(size, seed=0)
    model.tokenizer = tokenizer
    model.save(folder)
    return folder


def loaded(base: Path) -> CausalLM:
    from transformers import AutoTokenizer

    model = CausalLM.load(base)
    model.tokenizer = AutoTokenizer.from_pretrained(base)
    return model


def test_sample_draws_on_a_server_and_says_with_what(base, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "One day, Tom"}\n{"prompt": "She saw"}\n')
    options = ["--n", "2", "--max-new-tokens", "4"]
    with Completions(loaded(base)) as at:
        place = at.url.replace("http://", "http://me:hush@")
        args = ["sample", str(base), "--prompts", "p.jsonl", *options, "--draw.url"]
        done = tiltlm(*args, place, "--out", "y.jsonl", cwd=tmp_path)
        assert "log q and log p here differ by" in done.stderr and "nats a token" in done.stderr
        rows = [json.loads(line) for line in (tmp_path / "y.jsonl").read_text().splitlines()]
        assert len(rows) == 4 == len(at.asked) and {len(row["completion_ids"]) for row in rows} <= {1, 2, 3, 4}
        written = (tmp_path / "y.jsonl.settings.json").read_text()
        assert "draw.url" in written and "hush" not in written
        assert (
            "complete" in tiltlm(*args, place, "--out", "y.jsonl", "--draw.concurrent", "1", cwd=tmp_path).stderr
        )
        at.ids = at.logprobs = False
        refused = tiltlm(*args, at.url, "--out", "z.jsonl", cwd=tmp_path, check=False)
        assert refused.returncode == 2 and "without token ids" in refused.stderr
        tiltlm(*args, at.url, "--draw.text", "--out", "t.jsonl", cwd=tmp_path)
        texts = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert all(row["retokenised"] and "log_q" not in row and row["log_p"] < 0 for row in texts)
    warm = tiltlm(
        *args, "http://localhost:1/v1", "--temperature", "0.7", "--out", "w.jsonl", cwd=tmp_path, check=False
    )
    assert warm.returncode == 2 and "leave --temperature, --top-k and --top-p" in warm.stderr


def test_the_stages_of_stored_draws_come_from_a_server(base, tmp_path):
    """generate and label: rows of the server, under a key of their own; without one, the key that they always had."""
    (tmp_path / "p.jsonl").write_text(
        "".join(f'{{"prompt": "{text}"}}\n' for text in ("One day", "She saw", "Tom"))
    )
    (tmp_path / "r.py").write_text("def f(prompts, completions):\n    return [len(y) for y in completions]\n")
    task = Mine(
        Language(str(base), new_tokens=4), prompts=str(tmp_path / "p.jsonl"), reward=f"{tmp_path / 'r.py'}:f",
        name="mine",
    )  # fmt: skip
    plain = recipe("mine/label")
    with Completions(loaded(base)) as at:
        made = replace(plain, task=task, draws=tl.Draws(2), draw=Serving(at.url))
        assert isinstance(made, Labels) and made.key != replace(made, draw=Serving()).key
        run = ensure(made, tmp_path / "runs")
        asked = len(at.asked)
    drawn = run.inputs["generate"]
    assert isinstance(drawn.recipe, Draws) and drawn.recipe.draw.url == at.url
    rows = [json.loads(line) for line in (run.folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(len(row["log_q"]) == len(row["rewards"]) == 2 for row in rows)
    assert asked == 2 * (3 + len((run.folder / "test.jsonl").read_text().splitlines()))
    assert "--draw.url" in tiltlm("run", "mine/generate", "--help-all", cwd=tmp_path).stdout
