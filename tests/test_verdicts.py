"""Verdicts on single answers, end to end: KTO learns from them as they are, the other stages as far as they make sense."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from command import tiltlm
from families import build
from tiltlm.data.encoding import Encoder
from tiltlm.data.preference_rows import Tally
from tiltlm.feeds import Draws, Feed, Stores, fixed, rows_of, why_not
from tiltlm.groups import Groups
from tiltlm.method import Learner
from tiltlm.models.reward_model import RewardModel
from tiltlm.policies.dpo import DPO
from tiltlm.policies.exo_rw import ExoRw
from tiltlm.policies.kto import balance, reference_point
from tiltlm.problem import Facts, Problem
from tiltlm.recipes import recipe
from tiltlm.rewards.verdicts import VerdictRegression, Verdicts, verdict_loss
from tiltlm.ruler.measure import Measurement
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages.data import Dataset, are_verdicts, wanted
from tiltlm.stages.measure import where_it_counts
from tiltlm.target import Target
from tiltlm.tasks.pairs_problem import responses_of
from tiltlm.train import checkpoints

ROWS = [
    {
        "prompt": f"\n\nHuman: say {k % 50}\n\nAssistant:",
        "completion": f" yes please {k}" if k % 3 else f" no never {k}",
        "label": bool(k % 3),
    }
    for k in range(75)
]


def options(text: str) -> list[str]:
    return text.split()


FRONT = options(
    "--task.data verdicts.jsonl --task.valid-rows 8 --task.test-rows 8 --task.model= --task.stop 0 "
    "--task.most-tokens 80 --task.new-tokens 6 --task.base.steps 6 --task.base.warmup 1 --task.device cpu "
    "--task.sft.batch-size 24 --task.sft.evaluations 2 --task.judge.batch-size 24 --task.judge.evaluations 2"
)
LEARN = options(
    "--fit.batch-size 6 --fit.checkpoints 1 --fit.evaluations 1 --fit.lr 3e-3 --feed.size 2 --feed.draws.n 2 "
    "--feed.draws.prompts 12"
)
TEST = options("--ruler.prompts 6 --ruler.n 2 --ruler.checkpoints 1")
ARGS = [*FRONT, *LEARN, *TEST]
POLICIES = options("exo-rw dpo-rw exo-pref dpo cdpo robust-dpo ipo hinge apo rpo simpo orpo")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """The folder in which KTO was trained and measured on verdicts, by a model of the data's own."""
    folder = tmp_path_factory.mktemp("verdicts")
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tiltlm("run", "pairs/kto", *ARGS, cwd=folder)
    return folder


def only(work: Path, stage: str) -> Path:
    (found,) = (work / "runs" / "pairs" / stage).iterdir()
    return found


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(folder: Path) -> dict[tuple[str, str], dict]:
    return {(row["method"], row["metric"]): row for row in json.loads((folder / "report.json").read_text())}


# ---- end to end ----


def test_kto_trains_on_wanted_and_unwanted_answers_of_the_data(work):
    """No draws, no labels; at the start loss is one half; later wanted answers gain on unwanted ones, held-out ones too."""
    assert not (work / "runs" / "pairs" / "generate").exists()
    run = only(work, "kto-policy")
    metrics, evals = lines(run / "metrics.jsonl"), lines(run / "evals.jsonl")
    rows = lines(only(work, "data") / "train.jsonl")
    assert len(metrics) == round(len(rows) / 6) and abs(metrics[0]["loss"] - 0.5) < 1e-6
    assert all(abs(metrics[0][name]) < 1e-5 for name in ("reward_good", "reward_bad", "z0"))
    assert metrics[-1]["reward_good"] > metrics[-1]["reward_bad"] + 0.05
    assert {"valid_loss", "valid_z0", "valid_reward_good", "valid_reward_bad", "objective"} <= set(evals[0])
    assert "valid_gap" not in evals[0] and evals[-1]["valid_reward_good"] > evals[-1]["valid_reward_bad"] + 0.05
    config = json.loads((run / "config.json").read_text())["settings"]
    assert config["feed"]["source"] == "own"


def test_the_data_s_report_counts_both_kinds_and_no_row_is_lost(work):
    rows = report(only(work, "data"))
    parts = {name: lines(only(work, "data") / f"{name}.jsonl") for name in ("train", "valid", "test")}
    good = sum(row["label"] for row in parts["train"])
    assert rows["data", "wanted answers to train on"]["value"] == good > 0
    assert rows["data", "unwanted answers"]["value"] == len(parts["train"]) - good > 0
    left = rows["data", "left out: more rows of a held-out prompt"]["value"]
    assert sum(map(len, parts.values())) + left == len(ROWS)


def test_sft_imitates_wanted_answers_only(work):
    """Its held-out rows are the wanted ones, and so are its steps: an epoch of them."""
    train, valid = (wanted(lines(only(work, "data") / f"{name}.jsonl")) for name in ("train", "valid"))
    assert report(only(work, "sft-model"))["after SFT", "nll_per_token"]["n"] == len(valid) < 8
    assert len(lines(only(work, "sft-model") / "metrics.jsonl")) == max(1, round(len(train) / min(24, len(train))))


def test_wins_are_counted_against_wanted_answers_only(work):
    good = wanted(lines(only(work, "data") / "test.jsonl")[:6])
    rows = report(only(work, "kto"))
    assert rows["kto", "win_rate"]["n"] == len(good) < rows["kto", "reward"]["n"] == 6
    shown = lines(only(work, "kto") / "samples.jsonl")
    assert {"prompt", "completion", "label", "generated", "reward"} == set(shown[0])


def test_the_reward_model_classifies_verdicts_beside_the_commoner_one(work):
    rows = report(only(work, "reward-model"))
    model, common, apart = (
        rows[name, "accuracy"]["value"]
        for name in ("reward model", "the commoner verdict", "reward model − commoner verdict")
    )
    test = lines(only(work, "data") / "test.jsonl")
    assert abs(apart - (model - common)) < 1e-12 and common == sum(row["label"] for row in test) / len(test)
    done = tiltlm("run", "pairs/reward-model", *FRONT, "--task.judge.center", "1", cwd=work, check=False)
    assert done.returncode == 2 and "judge.margin and judge.center are about pairs" in done.stderr


def test_the_reference_is_measured_beside_both_kinds_of_answers(work):
    (work / "own.py").write_text(
        "def count(prompts, completions):\n    return [float(len(y)) for y in completions]\n"
    )
    args = [*FRONT, *TEST, "--task.reward", "own.py:count"]
    rows = report(work / tiltlm("run", "pairs/reference", *args, cwd=work).stdout.splitlines()[-1])
    assert ("completion responses", "reward") not in rows
    test = lines(only(work, "data") / "test.jsonl")[:6]
    for name, good in (("wanted", True), ("unwanted", False)):
        lengths = [len(row["completion"]) for row in test if row["label"] is good]
        found = rows[f"{name} responses", "reward"]
        assert found["value"] == pytest.approx(sum(lengths) / len(lengths)) and found["n"] == len(lengths)


@pytest.mark.parametrize("name", POLICIES)
def test_methods_that_need_pairs_say_before_any_work_what_does_not(name, work, tmp_path):
    (tmp_path / "verdicts.jsonl").write_text((work / "verdicts.jsonl").read_text())
    done = tiltlm("run", f"pairs/{name}", *ARGS, "--feed.source", "own", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "the data holds answers, judged: take --feed.source stored" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_methods_on_pairs_learn_from_draws_labelled_by_the_verdicts_reward(work):
    done = tiltlm("run", "pairs/dpo", *ARGS, cwd=work)
    assert ("dpo", "gap") in report(work / done.stdout.splitlines()[-1])


def test_labels_that_are_all_false_leave_nothing_to_imitate(work, tmp_path):
    bad = [row | {"label": False} for row in ROWS]
    (tmp_path / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    base = checkpoints(only(work, "base"))[-1].resolve()
    done = tiltlm("run", "pairs/sft-model", *FRONT, "--task.model", str(base), cwd=tmp_path, check=False)
    assert done.returncode == 2 and "SFT imitates wanted answers" in done.stderr


def test_columns_encoding_and_weights_reach_the_recipes(work, tmp_path):
    other = [{"q": row["prompt"], "said": row["completion"], "liked": row["label"]} for row in ROWS]
    text = "".join(json.dumps(row) + "\n" for row in other)
    (tmp_path / "other.jsonl").write_bytes(text.encode("cp037"))
    args = ["--task.valid-rows", "8", "--task.test-rows", "8", "--task.model=", "--task.encoding", "cp037"]
    args += ["--task.columns", "prompt=q", "completion=said", "label=liked"]
    done = tiltlm("run", "pairs/data", "--task.data", "other.jsonl:2", *args, cwd=tmp_path)
    folder = tmp_path / done.stdout.splitlines()[-1]
    once = lines(only(work, "data") / "train.jsonl")
    twice = lines(folder / "train.jsonl")
    assert sorted(map(json.dumps, twice)) == sorted(map(json.dumps, once * 2))
    assert report(folder)["data", "copies by the source's weight"]["value"] == len(ROWS)
    done = tiltlm("run", "pairs/data", "--task.data", "other.jsonl", "--task.test-data", "other.jsonl:2", *args,
                  cwd=tmp_path, check=False)  # fmt: skip
    assert done.returncode == 2 and "test data has no weights" in done.stderr


# ---- pieces ----


def test_the_seed_decides_which_rows_a_fraction_of_a_weight_takes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    how = Dataset((f"{path}:0.5",))
    one, again, other = (list(how.read("train", "", stream(seed, "x"), Tally())) for seed in (0, 0, 1))
    assert one == again != other and len(one) == len(other) == round(len(ROWS) / 2)


def test_groups_of_the_data_s_own_meet_as_they_are():
    """Two rated answers a prompt are learnt from whatever `feed.size` is; of draws, too few are refused."""
    done, asked = Tokens.of([[1], [2]]), Tokens.of([[5]])
    both = Samples(asked, torch.tensor([0, 0]), done.ids, done.mask, reward=torch.tensor([0.0, 1.0]))
    groups = Groups(both.with_(log_ref=torch.zeros(2, 1, dtype=torch.float64)), 2)
    target = Target(build("gpt2"), lambda samples: torch.zeros(len(samples)), 1.0)
    own = {"groups": lambda split: groups}
    facts = Facts(1.0, "several", frozenset({"groups"}), source="stored")
    problem = Problem(target, {"train": asked, "test": asked}, 2, stream(0, "x"), facts, own=own)
    feed = Feed(source="own", size=4)
    pairs = rows_of(problem, DPO(), feed, Stores(), "train")
    assert pairs.chosen.tokens.tolist() == [[2]] and pairs.rejected.tokens.tolist() == [[1]]
    held = rows_of(problem, ExoRw(), feed, Stores(), "train")
    batch = fixed(problem, ExoRw(), Learner(None), feed, held, 1, "exo-rw").batch(0)
    assert (len(batch), batch.size) == (1, 2) and why_not(facts, ExoRw(), feed) is None
    few = Feed(source="stored", size=4, draws=Draws(2))
    assert "groups of 4 (--feed.size) want as many draws of a prompt, and 2 are stored" in why_not(
        facts, DPO(), few
    )


def test_a_user_s_own_data_trains_kto_where_nothing_else_is_said():
    names = ("pairs/kto", "pairs/kto-policy", "pairs/ipo", "hh/kto")
    assert [recipe(name).feed.source for name in names] == ["own", "own", "task", "task"]
    assert recipe("hh/kto").task.facts().source == "stored"


def test_names_of_columns_are_looked_at():
    with pytest.raises(ValueError, match="Did you mean prompt"):
        Dataset(columns=("promt=q",))


def test_verdict_regression_by_hand():
    """r = ln 3: σ = 3/4; wanted costs ln 4/3, unwanted ln 4; gradient σ − 1 and σ."""
    reward = torch.full((2,), math.log(3), dtype=torch.float64, requires_grad=True)
    loss = verdict_loss(reward, torch.tensor([True, False]))
    torch.testing.assert_close(loss, torch.tensor([math.log(4 / 3), math.log(4)], dtype=torch.float64))
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), reward)[0], torch.tensor([-0.25, 0.75], dtype=torch.float64)
    )


def test_the_expected_verdict_loss_is_least_at_the_log_odds():
    """Wanted with probability p: the gradient σ(r) − p vanishes at ln p/(1 − p), and nowhere else."""
    p, both = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), torch.tensor([True, False])

    def gradient(shift: float) -> torch.Tensor:
        r = (p.logit() + shift).requires_grad_(True)
        loss = sum(w * verdict_loss(r, good.expand(3)) for w, good in zip((p, 1 - p), both, strict=True))
        return torch.autograd.grad(loss.sum(), r)[0]

    assert float(gradient(0.0).abs().max()) < 1e-12 < 1e-2 < float(gradient(0.3).abs().min())


def test_the_objective_reports_what_the_model_says():
    """The loss of a batch is that of its rewards, row by row; accuracy by their signs."""
    done = Tokens.of([[1, 2], [3]])
    samples = Samples(Tokens.of([[5]]), torch.tensor([0, 0]), done.ids, done.mask)

    class Fixed(RewardModel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def score(self, samples: Samples) -> torch.Tensor:
            return torch.tensor([2.0, 1.0])[: len(samples)]

    out = VerdictRegression().loss(Fixed(), Verdicts(samples, torch.tensor([True, False])))
    torch.testing.assert_close(out.loss, torch.tensor([math.log1p(math.exp(-2)), math.log1p(math.exp(1))]))
    assert out.metrics["accuracy"].tolist() == [1.0, 0.0]


class Letters:
    """A tokenizer of letters."""

    bos_token_id = None

    def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert isinstance(text, str)
        return {"input_ids": [1 + ord(x) % 7 for x in text]}


def test_answers_to_one_prompt_share_it_so_that_z0_takes_another_prompt_s_answer():
    """Rows 0 and 2 answer one prompt. Each prompt with the answer to the next other one: rows 0 and 1 change places, and
    row 2, whose turn is its own prompt, is left out. By hand: the mean of h over those two."""
    rows = [
        {"prompt": p, "completion": y, "label": k}
        for p, y, k in (("a", "bc", True), ("d", "e", False), ("a", "f", False))
    ]
    samples = Encoder(Letters(), (0,), 10, 4).judged(rows)
    assert samples.prompt_index.tolist() == [0, 1, 0] and samples.reward.tolist() == [1, 0, 0]
    assert len(samples.prompts) == 2
    policy, reference = build("gpt2"), build("gpt2", seed=1)
    foreign = samples.with_(prompt_index=1 - samples.prompt_index)
    with torch.no_grad():
        h = float((policy.log_prob(foreign) - reference.log_prob(foreign)).sum(1)[:2].mean())
    both = (policy, reference) if h > 0 else (reference, policy)  # whichever way z0 is not cut at 0
    assert abs(h) > 1e-3 and abs(float(reference_point(*both, samples)) - abs(h)) < 1e-5


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        (6, 5, "6 wanted answers, 5 unwanted"),
        (8, 2, "is 4, the paper wants 1 to 4/3: --method.w-bad 4 makes it 1"),
        (2, 8, "is 0.25, the paper wants 1 to 4/3: --method.w-good 4 makes it 1"),
        (3, 0, "KTO learns from both kinds"),
    ],
)
def test_unbalanced_verdicts_are_said_with_the_weight_that_balances_them(good, bad, said):
    rows = [{"label": True}] * good + [{"label": False}] * bad
    assert are_verdicts(rows) and said in balance(len(wanted(rows)), bad, 1.0, 1.0)


def test_wins_of_unwanted_answers_are_left_out_of_a_measurement():
    found = Measurement({"win_rate": torch.tensor([1.0, 0.0, 0.5]), "reward": torch.ones(3)})

    def fair(**counts: torch.Tensor) -> Measurement:
        table, asked = build("gpt2"), Tokens.of([[5]])
        target = Target(table, lambda samples: torch.zeros(len(samples)), 1.0)
        prompts = {"train": asked, "test": asked}
        return where_it_counts(found, Problem(target, prompts, 2, stream(0, "x"), Facts(1.0), counts=counts), 3)

    some = fair(win_rate=torch.tensor([True, False, True, True]))
    assert some.values["win_rate"].tolist() == [1.0, 0.5] and len(some.values["reward"]) == 3
    assert set(fair(win_rate=torch.tensor([False] * 4)).values) == {"reward"}
    assert set(fair().values) == {"win_rate", "reward"}


def test_kinds_of_responses():
    rows = [{"completion": "a", "label": True}, {"completion": "b", "label": False}]
    assert [(n, c, len(x)) for n, c, x in responses_of(rows)] == [
        ("wanted", "completion", 1),
        ("unwanted", "completion", 1),
    ]
    assert [n for n, _, _ in responses_of([{"chosen": "a", "rejected": "b"}])] == ["chosen", "rejected"]
