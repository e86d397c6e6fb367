"""A judge that learns, on several processes: it says, buys and learns what it does on one."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from close import NETWORK, alike, close
from families import build
from judges import LENGTH, VOCABULARY, Counting, rows, table_judge, text_body
from side_by_side import side_by_side
from tiltlm import parts, ranks
from tiltlm.engine import Engine, Optim
from tiltlm.feeds import Feed, Stores, course_of
from tiltlm.fit import Fit
from tiltlm.jsonl import read_rows
from tiltlm.judges.client import RemoteJudge
from tiltlm.judges.discriminator import Discriminator, trained
from tiltlm.judges.making import network_on_texts
from tiltlm.judges.networks import LastValue
from tiltlm.judges.rows import Preference
from tiltlm.judges.settings import Judging
from tiltlm.models.heads import ValueHead
from tiltlm.models.table import TableValues
from tiltlm.nets import Net, judge_of, learner
from tiltlm.policies.d2po import D2PO
from tiltlm.problem import Problem
from tiltlm.rewards.posting import Posting
from tiltlm.samples import Samples
from tiltlm.seeds import stream
from tiltlm.sharded import all_of
from tiltlm.tensors import load_tensors
from tiltlm.train import Pace, Training, checkpoints
from toy import Toy

ENSEMBLE = Judging(
    "reward-model", budget=60, warm=6, window=48, relabels=9, batch_size=5, lr=0.01, select="variance", replay=4,
    members=2, monitor=True,
)  # fmt: skip
"""Nine pairs of a window, updates of five and four rows: unequal shares."""


class Killed(Exception):
    pass


def problem(network: bool) -> Problem:
    """On tables, or on a small GPT-2: in float64 throughout, which a Llama is not."""
    if not network:
        return Toy().problem({}, 0)
    model, prompts = build("gpt2", torch.float64, eos_ids=(3,)), [[k, k + 1][: 1 + k % 2] for k in range(6)]
    return Problem.of(model, reward=total, prompts=prompts, beta=0.5, max_new_tokens=4)


def total(samples: Samples) -> Tensor:
    """Hardly ever a tie: what a member learns depends on the order, so that members differ by more than rounding."""
    return (samples.tokens * samples.mask).sum(1).double() / 23


def train(folder: Path, network: bool, until: int | None = None, shard: bool = False) -> None:
    """Eight steps of a policy on the labels of an ensemble, checkpoints at 3 and 6; until: killed after so many steps.
    shard: policy and ensemble in parts."""
    made = problem(network)

    def gold(samples: Samples) -> Tensor:
        with (folder / f"asked-{ranks.is_first()}").open("a") as file:
            file.write(f"{len(samples)}\n")
        return made.target.reward(samples)

    folder.mkdir(exist_ok=True)
    watched, method = replace(made, target=replace(made.target, reward=gold)), D2PO()
    _, who = learner(watched, method, Net(), stream(1, "init"))
    judge = judge_of(watched, ENSEMBLE, stream(2, "judge"), folder / "judge", shard)
    feed = Feed("live", size=2, n=2, judge=ENSEMBLE)
    course = course_of(watched, method, who, feed, Fit(steps=8, batch_size=12), "d2po", Stores(judge=judge))

    def on_step(step: int, limit: int, metrics: dict[str, float]) -> None:
        if step == until:
            raise Killed

    engine = Engine(who.module, Optim(lr=0.01, shard=shard))
    training = Training(
        who.module, engine, method.objective(watched), course.experience, Pace(8), stream(3, "train"), folder, 3,
        on_step,
    )  # fmt: skip
    if until is None:
        training.run()
        return
    with pytest.raises(Killed):
        training.run()


def result(folder: Path) -> tuple[list[Any], list[Any], Tensor]:
    """The log; the answers given, scores of the ensemble among them; weights of the policy at the end."""
    tensors = load_tensors(next(checkpoints(folder)[-1].glob("*.safetensors")))
    answered = [row["answer"] for row in read_rows(folder / "judge" / "calls.jsonl")]
    weights = torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])
    return list(read_rows(folder / "metrics.jsonl")), answered, weights


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[bool, Path]:
    """What one process makes of it, on tables and on a network."""
    folders = {network: tmp_path_factory.mktemp("alone") / "run" for network in (False, True)}
    for network, folder in folders.items():
        train(folder, network)
    return folders


@pytest.mark.parametrize(
    ("network", "courses"), [(False, (2,)), (False, (1, 2)), (False, (2, 1)), (True, (1, 2)), (True, (2, 1))]
)
def test_two_processes_buy_and_learn_what_one_does(network, courses, alone, tmp_path):
    """Killed after step 5 and gone on with from step 3 by another number of processes, those of a network in parts; to the
    byte what is bought, which the first process alone asks for and writes."""
    folder = tmp_path / "run"
    for k, count in enumerate(courses):
        work = partial(train, folder, network, None if k + 1 == len(courses) else 5, shard=network)
        assert side_by_side(work, count) == [0] * count
    log, answers, weights = result(folder)
    wanted = result(alone[network])
    for steps in (log, wanted[0]):
        steps[0].pop("accuracy")  # the policy is the reference yet: all pairs tie, to rounding
    alike(log, wanted[0])
    alike(answers, wanted[1])
    close(weights, wanted[2])
    bought = [(each / "judge" / "purchases.jsonl").read_bytes() for each in (folder, alone[network])]
    assert bought[0] == bought[1] and bought[0].count(b"\n") == log[-1]["labels_bought"] > 20
    if courses == (2,):
        asked = [sum(map(int, (folder / f"asked-{who}").read_text().split())) for who in (True, False)]
        assert asked == [8 * 12 + 2 * log[-1]["labels_bought"], 8 * 12]


# ---- networks, whole and in parts ------------------------------------------------------------------------------------

KINDS = {
    "reward-model": Judging("reward-model", members=2, most_tokens=48),
    "reward-model-lora": Judging("reward-model", lora_rank=2, most_tokens=48),
    "dpo": Judging("dpo", most_tokens=48),
    "dpo-lora": Judging("dpo", lora_rank=2, most_tokens=48),
    "ids": Judging("reward-model", members=2),
}
PROMPTS = ["Once there was"] * 3 + ["A dog"] * 4
TEXTS = [" a cat.", " a very big and happy dog in the park.", " no", "", " no!", " sat", " was very sad."]


def rows_of(kind: str) -> tuple[Any, Any]:
    """Seven rows: prompts and completions, texts or ids."""
    if kind != "ids":
        return PROMPTS, TEXTS
    return [[1, 2]] * 3 + [[5]] * 4, [[7], [8, 9, 10, 11], [12], [], [13, 14], [15, 9], [16] * 6]


def discriminator(kind: str, body: Path, shard: bool = False) -> Discriminator:
    """In float64."""
    how = KINDS[kind]
    networks: list[Any] = (
        [LastValue(ValueHead(build("llama", torch.float64, seed=k))) for k in range(how.members)]
        if kind == "ids"
        else [network_on_texts(how, body, stream(1, k)).double() for k in range(how.members)]
    )
    return Discriminator(networks, 3e-3, 4, shard)


def learnt(kind: str, body: Path, folder: Path, shard: bool = False) -> dict[str, Any]:
    """What a judge says before and after it has learnt five verdicts, twice; saved on the way."""
    judge, (prompts, texts) = discriminator(kind, body, shard), rows_of(kind)
    verdicts = [Preference(prompts[k], texts[k], texts[k + 1]) for k in (0, 1, 3, 4, 5)]
    said = [judge.score(prompts, texts).members]
    judge.train(verdicts, 2, stream(5))
    said.append(judge.score(prompts, texts).members)
    judge.save(folder)
    ranks.wait()
    other = discriminator(kind, body, shard)
    other.restore(folder)
    assert other.score(prompts, texts).members == said[-1]
    for each in (judge, other):
        each.train(verdicts, 1, stream(6))
        said.append(each.score(prompts, texts).members)
    assert said[-1] == said[-2] != said[1] != said[0]
    weights = torch.cat([all_of(x.detach()).flatten() for each in judge.networks for x in trained(each).values()])
    return {"said": said, "weights": weights}


@pytest.fixture(scope="module")
def body(tmp_path_factory) -> Path:
    """Without dropout, of which every process draws its own."""
    return text_body(tmp_path_factory.mktemp("body"), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_networks_score_and_learn_as_on_one_process_whole_and_in_parts(kind, body, tmp_path):
    """What one wrote two take up, in parts or not, and what two wrote in parts one."""
    wanted = learnt(kind, body, tmp_path / "one")

    def work() -> None:
        for shard in (False, True):
            folder = tmp_path / f"two-{shard}"
            found = learnt(kind, body, folder, shard)
            taken = discriminator(kind, body, shard)
            taken.restore(tmp_path / "one")
            found["taken"] = taken.score(*rows_of(kind)).members
            assert all(engine.divided == shard == parts.are_in(folder / "member-0") for engine in taken.engines)
            torch.save(found, tmp_path / f"{shard}-{ranks.number()}.pt")

    assert side_by_side(work) == [0, 0]
    for shard in (False, True):
        found, second = (torch.load(tmp_path / f"{shard}-{k}.pt") for k in range(2))
        assert found["said"] == second["said"] and torch.equal(found["weights"], second["weights"])
        close(torch.tensor(found["said"]), torch.tensor(wanted["said"]), NETWORK)
        close(torch.tensor(found["taken"]), torch.tensor(wanted["said"][1]), NETWORK)
        close(found["weights"], wanted["weights"], NETWORK)
        here = discriminator(kind, body)
        here.restore(tmp_path / f"two-{shard}")
        close(torch.tensor(here.score(*rows_of(kind)).members), torch.tensor(found["said"][1]), NETWORK)


def test_each_process_reads_its_share_of_the_rows():
    """Of seven rows to score three and four, of three verdicts one and two, each of two rows."""
    read: list[int] = []

    class Counted(LastValue):
        def score(self, samples: Samples) -> Tensor:
            read.append(len(samples))
            return super().score(samples)

    def work() -> None:
        judge = Discriminator([Counted(TableValues(2, VOCABULARY, LENGTH))])
        judge.score(*(each[:7] for each in rows(0)))
        judge.train([Preference([0], [k], [3]) for k in range(3)], 1, stream(0))
        assert read == [[3, 2], [4, 4]][ranks.number()]

    assert side_by_side(work) == [0, 0]


# ---- what goes wrong, and a judge elsewhere --------------------------------------------------------------------------


def ended(work: Any, folder: Path) -> None:
    """Two processes at it, each of which writes down why it ended."""

    def attempt() -> None:
        try:
            work()
        except Exception as error:
            (folder / f"why-{ranks.number()}").write_text(f"{type(error).__name__}: {error}")
            raise

    begun = time.time()
    assert side_by_side(attempt) == [1, 1] and time.time() - begun < 60


def test_what_goes_wrong_ends_both_processes_with_its_reason(tmp_path, capfd):
    """Rows that are no pairs, gold that is no number: both say it. Gold that fails, which the first alone asks, and one
    share of an update whose loss is no number: the other one says that it lost it."""

    def nan(prompts: Any, completions: Any) -> list[float]:
        return [float("nan")] * len(prompts)

    def fails(prompts: Any, completions: Any) -> list[float]:
        raise OSError("planted")

    def why(work: Any) -> list[str]:
        ended(work, tmp_path)
        capfd.readouterr()
        return [(tmp_path / f"why-{k}").read_text() for k in range(2)]

    def asking(gold: Any, name: str) -> Any:
        return lambda: table_judge(tmp_path / name, gold, relabels=4, window=8).label("a", *rows(0, 8))

    def diverging() -> None:
        judge = discriminator_of_tables()
        if ranks.number() == 1:
            torch.nn.init.constant_(next(judge.networks[0].parameters()), float("nan"))
        judge.train([Preference([0], [k], [3]) for k in range(3)], 1, stream(0))

    found = why(lambda: table_judge(tmp_path / "rows", Counting()).label("a", [[0]], [[1]]))
    assert found[0] == found[1] and "an even number; got 1 and 1" in found[0]
    found = why(asking(nan, "nan"))
    assert found[0] == found[1] and "gold must give every row a finite reward" in found[0]
    found = why(asking(fails, "fails"))
    assert found[0] == "OSError: planted" and "have lost each other" in found[1]
    found = why(diverging)
    assert "have lost each other" in found[0] and "nothing was updated" in found[1]


def discriminator_of_tables() -> Discriminator:
    return Discriminator([LastValue(TableValues(2, VOCABULARY, LENGTH))], lr=0.1)


def test_the_first_process_alone_asks_a_judge_elsewhere(tmp_path, monkeypatch):
    answer = {"scores": [1.0, 2.0], "preferred": [None], "version": 3, "ledger": {"bought": 0}}

    def ask(self: Posting, client: Any, question: Any) -> Any:
        (tmp_path / f"asked-{ranks.is_first()}").touch()
        return answer

    monkeypatch.setattr(Posting, "ask", ask)

    def work() -> None:
        found = RemoteJudge("http://127.0.0.1:1").label("a", ["x", "x"], ["y", "z"])
        assert (found.scores, found.version) == ([1.0, 2.0], 3)

    assert side_by_side(work) == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["asked-True"]
