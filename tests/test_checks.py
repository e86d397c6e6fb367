"""What can be known before work is said before work: nothing is built where a later stage would fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from command import tiltlm
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.models.folders import located, model_in
from tiltlm.models.hub import config_of, pretrained
from tiltlm.run import digests
from tiltlm.seeds import stream

OWN = ["--task.model="]
MINE = """
def f(prompts, completions):
    return [0.0] * len(completions)

def rows(lines):
    return [0.0] * len(lines)

def needs(prompts, completions, answer):
    return [0.0] * len(completions)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A function file, a classifier of two classes, a language model, one without weights, and data of each shape."""
    folder = tmp_path_factory.mktemp("checks")
    (folder / "mine.py").write_text(MINE)
    small = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokenizer = train_tokenizer(stories(50, stream(0, "checks")), 300)
    judge = BertForSequenceClassification(BertConfig(**small, num_labels=2, max_position_embeddings=64))
    model = LlamaForCausalLM(LlamaConfig(**small, max_position_embeddings=64))
    for name, each in (("judge", judge), ("model", model), ("bare", model)):
        each.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "bare" / "model.safetensors").unlink()
    rows = [{"prompt": f"{k}", "completion": "a"} for k in range(40)]
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


HEAD = ["--net.policy", "head"]
MINE_F = ["--task.reward", "mine.py:f"]
TEXT = [
    ("mine/ctl", ["--task.reward", "mine.py:gone"], "has no function 'gone'"),
    ("mine/ctl", ["--task.reward", "mine.py:rows"], "takes one argument (lines): a reward is f("),
    ("mine/ctl", ["--task.reward", "mine.py:needs"], "takes the column 'answer'"),
    ("mine/ctl", ["--task.reward", "none.py:f"], "none.py: no such file"),
    ("mine/ctl", ["--task.reward", "mine.py:f + clasifier:judge:1"], "there is no reward 'clasifier"),
    ("mine/ctl", ["--task.reward", "mine.py:f + classifier:judge:happy"], "has no class 'happy'"),
    ("mine/exact", MINE_F, "need an upper bound of the reward"),
    ("mine/sft", ["--ruler.no-absolute", *MINE_F], "need an upper bound"),
    ("mine/dpg", ["--ruler.no-absolute", "--feed.positives", "exact", *MINE_F], "need an upper bound"),
    ("sentiment-small/ctl", ["--task.label", "angry"], "has no class 'angry'; it has negative, positive"),
    ("sentiment-small/ctl", ["--task.label="], "--task.label NAME"),
    ("sentiment-small/ctl", ["--task.classifier", "judge", "--task.label", "x"], "it has LABEL_0, LABEL_1"),
    ("sentiment-small/ctl", ["--task.classifier", "gone", "--task.label", "1"], "'gone' is no folder"),
    ("sentiment-small/ctl", ["--task.classifier", "model", "--task.label", "1"], "no trained classification"),
    ("sentiment-small/ctl", ["--task.model", "gone"], "'gone' is no folder or hub name"),
    ("sentiment-small/ctl", ["--task.model", "bare"], "config.json and no weights"),
    (
        "sentiment-small/ctl",
        ["--task.model", "model", "--task.new-tokens", "64"],
        "holds 64 tokens: lower --task.new-tokens",
    ),
    ("sentiment-small/ctl", ["--task.new-tokens", "600"], "holds 512 tokens"),
    ("sentiment-small/ctl", ["--task.classify.body", "gone"], "'gone' is no folder"),
    (
        "sentiment-small/log-z",
        ["--log-z.by", "bounds", "--exact.n", "10"],
        "20 upper bounds (--log-z.repeats) want as many exact draws",
    ),
    (
        "sentiment-small/ctl",
        ["--log-z.by", "bounds", "--exact.n", "10"],
        "raise --exact.n to 20, or lower --log-z.repeats",
    ),
    ("sentiment-small/bounds", ["--exact.n", "10"], "20 upper bounds (--bounds.repeats)"),
    ("sentiment-small/reach", ["--exact.n", "10"], "20 upper bounds (--reach.repeats)"),
    ("sentiment-small/bounds", ["--bounds.estimators", "smcc"], "bounds want estimators of iwae, smc, smc-ess"),
    ("sentiment-small/bounds", ["--bounds.estimators", "iwae"], "one of them by SMC"),
    ("sentiment-small/ctl", ["--exact.stored", "gone.safetensors"], "gone.safetensors: no such file"),
    ("sentiment-small/ctl", ["--fit.evaluations", "5"], "no held-out prompts to evaluate on while it trains"),
    ("sentiment-small/base", ["--fit.evaluations", "5"], "measures nothing while it trains"),
    ("sentiment-small/ctl", ["--feed.drawn-by", "mixed", "--feed.particles", "7"], "not of 7 particles"),
    (
        "sentiment-small/q-sharp",
        ["--method.value.atoms", "1", "0"],
        "atoms must be two or more increasing numbers",
    ),
    ("sentiment-small/rl", ["--method.target", "linear", "--method.multi-step", "1"], "multi_step must be"),
    ("sentiment-small/rloo", [*HEAD, "--feed.draw.precision", "bfloat16"], "leave --feed.draw.precision out"),
    (
        "sentiment-small/rloo",
        [*HEAD, "--feed.draw.url", "http://h/v1", "--feed.draw.weights", "w"],
        "a head is none: leave --feed.draw.url out",
    ),
    (
        "infill2-small/grpo",
        ["--feed.draw.precision", "bfloat16"],
        "a head is none: leave --feed.draw.precision out",
    ),
    ("sentiment-small/rloo", [*HEAD, "--net.judges", "last", "--fit.shard"], "take --net.judges next"),
]


@pytest.mark.parametrize(("name", "args", "said"), TEXT, ids=[said[:30] for *_, said in TEXT])
def test_stages_of_text_fail_before_they_work(place, name, args, said):
    refused(name, place, args if name.endswith("/base") else [*OWN, *args], said)


@pytest.mark.parametrize("method", ["ppo", "q-sharp"])
def test_a_batch_that_cannot_be_shared_out_is_refused(place, method):
    args = [*OWN, "--fit.batch-size", "4", "--feed.n", "9"]
    refused(f"infill2-small/{method}", place, args, "9 draws of a prompt (--feed.n) do not fit a batch of 4")


PAIRS = [
    (["exo-rw", "--task.reward", "mine.py:gone"], "has no function 'gone'"),
    (["exo-rw", "--task.reward", "mine.py:rows"], "takes one argument (lines)"),
    (["exo-rw", "--task.reward", "mine.py:needs"], "none is kept: name it, --task.keep"),
    (["exo-rw", "--task.reward", "classifier:judge:happy"], "has no class 'happy'"),
    (["exo-rw", "--task.reward", "reward-model:judge"], "a reward model has one output; this one has 2 classes"),
    (["exo-rw", "--task.reward", "reward-model:gone"], "'gone' is no folder"),
    (["exo-rw", "--task.reward", "https://"], "is no URL that can be asked"),
    (["sft-model", "--task.model", "gone"], "'gone' is no folder"),
    (["sft-model", "--task.start", "bare"], "no weights"),
    (
        ["sft-model", "--task.model", "model", "--task.most-tokens", "65", "--task.new-tokens", "8"],
        "model holds 64 tokens",
    ),
    (["sft-model", "--task.most-tokens", "513"], "the project's own model holds 512 tokens"),
    (
        ["base", "--task.model", "model", "--task.most-tokens", "60", "--task.new-tokens", "8"],
        "there is nothing to train",
    ),
    (["reward-model", "--task.judge.body", "gone"], "'gone' is no folder"),
    (
        ["exo-rw", "--task.data", "examples.jsonl"],
        "a reward model learns from pairs (chosen, rejected) or verdicts (prompt, completion, label); the data has prompt",
    ),
    (
        ["dpo", "--task.data", "examples.jsonl", "--feed.source", "own", "--task.reward", "mine.py:f"],
        "it learns from pairs, and the data holds answers",
    ),
    (["exo-rw", "--task.keep", "answer"], "dialogues of our own making have no column 'answer'"),
    (
        ["data", "--task.data", "examples.jsonl", "--task.keep", "answer"],
        "no further column 'answer' to keep; this row has",
    ),
]


@pytest.mark.parametrize(("args", "said"), PAIRS, ids=[said[:30] for _, said in PAIRS])
def test_preference_recipes_fail_before_they_work(place, args, said):
    refused(f"dialogues/{args[0]}", place, args[1:], said)


def refused(name: str, place: Path, args: list[str], said: str) -> None:
    done = tiltlm("run", name, *args, cwd=place, check=False)
    assert done.returncode == 2 and said in " ".join(done.stderr.split()), done.stderr
    assert not list(place.rglob("checkpoint-*")) and not list(place.rglob("DONE"))


# ---- a run's folder as a model's name -----------------------------------------------------------------------


def run_at(folder: Path, model: Path | None = None, done: bool = True) -> Path:
    """A folder as a run leaves it, with `model` as its checkpoint."""
    folder.mkdir()
    (folder / "provenance.json").write_text("{}")
    if model is not None:
        (folder / "checkpoint-4").symlink_to(model, target_is_directory=True)
        (model / "COMPLETE").write_text("")
    if done:
        (folder / "DONE").write_text("")
    return folder


def test_a_run_s_folder_names_its_model_wherever_one_is_loaded(place, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = run_at(tmp_path / "run", place / "judge")
    assert located(run) == str(run / "checkpoint-4") and located("gpt2") == "gpt2" and located("") == ""
    assert config_of(run).num_labels == 2 and pretrained(AutoTokenizer, run).vocab_size
    assert pretrained(AutoModelForSequenceClassification, str(run)).config.num_labels == 2
    (tmp_path / "y.jsonl").write_text('{"prompt": "a", "completion": " dog"}\n')
    for name, out in ((run, "a.jsonl"), (place / "judge", "b.jsonl")):
        tiltlm("score", f"classifier:{name}:1", "y.jsonl", "--out", out, cwd=tmp_path)
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_a_run_that_holds_no_model_says_so(place, tmp_path):
    for made, said in (
        (run_at(tmp_path / "empty"), "is a run without a trained model"),
        (run_at(tmp_path / "half", place / "judge", done=False), "is a run that is not finished"),
    ):
        with pytest.raises(ValueError, match=said):
            located(made)
        done = tiltlm("score", f"classifier:{made}:1", "y.jsonl", "--out", "s.jsonl", cwd=tmp_path, check=False)
        assert done.returncode == 2 and said in done.stderr
    (place / "judge" / "head.json").write_text("{}")
    with pytest.raises(ValueError, match="trained a value or a twist"):
        located(run_at(tmp_path / "twist", place / "judge"))
    (place / "judge" / "head.json").unlink()


def test_a_run_is_known_by_its_model_and_not_by_what_lies_beside_it(place, tmp_path):
    run = run_at(tmp_path / "run", place / "judge")
    before = digests([str(run)])
    (run / "report.html").write_text("made later")
    assert digests([str(run)]) == before == {str(run): digests([str(model_in(run))])[str(model_in(run))]}


# ---- further columns of preference data ---------------------------------------------------------------------

KEPT = """
def right(prompts, completions, answer):
    assert all(len(a) == 3 and x.endswith(a[-1]) for x, a in zip(prompts, answer)), (prompts, answer)
    return [len(y) + int(a[-1]) for y, a in zip(completions, answer)]

def short(prompts, completions):
    return [-len(y) for y in completions]
"""


def test_a_column_of_the_data_reaches_a_reward_in_a_recipe(place):
    """Generated completions are judged with the kept column of their prompt's row; every term of the sum is reported."""
    (place / "kept.py").write_text(KEPT)
    rows = [{"prompt": f"a dog {k}", "chosen": " a", "rejected": " b", "answer": f"no{k % 10}"} for k in range(24)]
    (place / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [
        "--task.data",
        "kept.jsonl",
        "--task.keep",
        "answer",
        "--task.valid-rows",
        "4",
        "--task.test-rows",
        "4",
    ]
    args += [
        "--task.device",
        "cpu",
        "--task.start",
        "model",
        "--task.stop",
        "0",
        "--task.most-tokens",
        "60",
        "--task.new-tokens",
        "4",
    ]
    args += ["--draws.n", "2", "--task.reward", "kept.py:right + kept.py:short"]
    done = tiltlm("run", "pairs/label", *args, cwd=place)
    folder = place / done.stdout.splitlines()[-1]
    labelled = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(labelled) == 16
    for row in labelled:
        right, short = row["reward_terms"]["kept.py:right"], row["reward_terms"]["kept.py:short"]
        assert short == [-len(y) for y in row["completions"]]
        assert (
            row["rewards"] == [a + b for a, b in zip(right, short, strict=True)] == [float(row["prompt"][-1])] * 2
        )
    report = {row["metric"]: row["value"] for row in json.loads((folder / "report.json").read_text())}
    assert report["reward[kept.py:short]"] <= 0 and "reward[kept.py:right]" in report


def test_rows_of_one_prompt_must_agree_in_what_is_kept(place):
    (place / "kept.py").write_text(KEPT)
    rows = [
        {"prompt": f"a dog {k // 2}", "chosen": " a", "rejected": f" b{k}", "answer": f"n{k % 10}o"}
        for k in range(40)
    ]
    (place / "split.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [
        "--task.data",
        "split.jsonl",
        "--task.keep",
        "answer",
        "--task.valid-rows",
        "4",
        "--task.test-rows",
        "4",
    ]
    args += [
        "--task.device",
        "cpu",
        "--task.start",
        "model",
        "--task.stop",
        "0",
        "--task.most-tokens",
        "60",
        "--task.new-tokens",
        "4",
    ]
    done = tiltlm(
        "run", "pairs/label", *args, "--draws.n", "2", "--task.reward", "kept.py:right", cwd=place, check=False
    )
    assert done.returncode == 2 and "rows of one prompt differ in the columns answer" in done.stderr
