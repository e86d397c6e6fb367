"""Learning judges: the ledger adds up whatever happens, every allocation buys what it says, nothing is bought twice."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from close import close
from judges import Counting, rows, table_judge, text_body
from tiltlm.judges.base import Conflict
from tiltlm.judges.discriminator import Discriminator, compared, scores_of, trained
from tiltlm.judges.learning import LearningJudge
from tiltlm.judges.ledger import Purchases
from tiltlm.judges.making import network_on_texts
from tiltlm.judges.rows import Pair, Preference
from tiltlm.judges.selection import selected
from tiltlm.judges.settings import Judging
from tiltlm.rewards.bradley_terry import BradleyTerry
from tiltlm.seeds import stream


class Killed(BaseException):
    """The process ends here."""


def bought_at_each(judge: LearningJudge, requests: int, n: int) -> list[int]:
    found = []
    for step in range(requests):
        ledger = judge.label(f"step-{step}", *rows(step, n)).ledger
        found.append(ledger["bought"])
    return [b - a for a, b in zip([0, *found], found, strict=False)]


# ---- how many, and which -----------------------------------------------------------------------------------------------


def test_spread_buys_the_measured_rates(tmp_path):
    """16 pairs in 256 texts: 2 in each request of 32. 5 in 64: 5 in every eight requests of 8 texts, none of them first."""
    assert bought_at_each(table_judge(tmp_path / "a", Counting(), relabels=16), 8, 32) == [2] * 8
    found = bought_at_each(table_judge(tmp_path / "b", Counting(), window=64, relabels=5), 16, 8)
    assert found == [0, 1, 0, 1, 1, 0, 1, 1] * 2


def test_what_is_left_over_is_carried_exactly(tmp_path):
    """A window of 60 texts that requests of 8 do not fill: 5/60 pair a text, to the last digit, over fifteen windows."""
    judge = table_judge(tmp_path, Counting(), window=60, relabels=5)
    found = bought_at_each(judge, 120, 8)
    assert sum(found) == 120 * 8 * 5 // 60 and set(found) == {0, 1}


def test_first_spends_a_windows_quota_on_its_first_requests(tmp_path):
    """The published allocation. 16 of a first request's 16 pairs: a selector has nothing to select (trap 1)."""
    found = bought_at_each(table_judge(tmp_path, Counting(), allocation="first", relabels=16), 16, 32)
    assert found == [16, 0, 0, 0, 0, 0, 0, 0] * 2
    other = bought_at_each(
        table_judge(tmp_path / "b", Counting(), allocation="first", window=64, relabels=5), 9, 8
    )
    assert other == [4, 1, 0, 0, 0, 0, 0, 0, 4]


def test_pool_buys_at_the_end_of_a_window_out_of_all_of_it(tmp_path):
    gold = Counting()
    judge = table_judge(tmp_path, gold, allocation="pool", window=32, relabels=6)
    answers = [judge.label(f"step-{k}", *rows(k)) for k in range(4)]
    assert [answer.ledger["bought"] for answer in answers] == [0, 0, 0, 6]
    assert all(math.isnan(x) for answer in answers for x in answer.preferred)
    mine = {tuple(row) for row in rows(3)[1]}
    assert any(row not in mine for _, row in gold.asked)


def test_min_margin_in_a_pool_takes_the_closest_pairs_of_the_window(tmp_path):
    """With scores given: the six closest of sixteen, whichever request they came with."""
    gold = Counting()
    judge = table_judge(tmp_path, gold, allocation="pool", window=32, relabels=6)
    gaps = [stream(5).uniform([k], 4)[0].tolist() for k in range(4)]
    for k in range(4):
        prompts, completions = rows(k)
        judge.label(f"step-{k}", prompts, completions, scores=[s for gap in gaps[k] for s in (gap, 0.0)])
    closest = sorted((gap, k, j) for k in range(4) for j, gap in enumerate(gaps[k]))[:6]
    wanted = sorted(tuple(rows(k)[1][2 * j]) for _, k, j in closest)
    assert sorted(row for _, row in gold.asked[::2]) == wanted


def pair(gap: float, spread: float = 0.0) -> Pair:
    return Pair("r", 0, "x", "a", "b", gap, spread)


def test_selectors_by_hand():
    pairs = [pair(-3.0, 1.0), pair(0.1, 0.0), pair(-0.2, 5.0), pair(2.0, 4.0)]
    assert selected("min-margin", pairs, 2, stream(0)) == [1, 2]
    assert selected("variance", pairs, 2, stream(0)) == [2, 3]
    assert selected("random", pairs, 9, stream(0)) == [0, 1, 2, 3]
    taken = [k for s in range(400) for k in selected("random", pairs, 1, stream(s))]
    assert all(60 < taken.count(k) < 140 for k in range(4))  # 100 ± 4 · 8.7
    equals = [pair(1.0)] * 4
    assert {selected("min-margin", equals, 1, stream(s))[0] for s in range(40)} == {0, 1, 2, 3}


def test_the_choice_is_of_the_judges_own_stream(tmp_path):
    """Trap 15: another seed chooses other pairs, the same one the same."""
    found = []
    for k, seed in enumerate((0, 0, 1)):
        gold = Counting()
        judge = table_judge(tmp_path / str(k), gold, seed, select="random", window=64, relabels=8)
        bought_at_each(judge, 8, 16)
        found.append(gold.asked)
    assert found[0] == found[1] != found[2]


# ---- the ledger --------------------------------------------------------------------------------------------------------


def adds_up(ledger: dict[str, int], asked: int) -> None:
    assert ledger["bought"] == ledger["trained"] + ledger["tied"] + ledger["pending"] == asked
    assert not ledger["budget"] or ledger["bought"] <= ledger["budget"]


@pytest.mark.parametrize("allocation", ["spread", "first", "pool"])
def test_the_law_of_the_ledger(tmp_path, allocation):
    """bought = trained + tied + pending = what gold was asked, never above the budget; requests of any size."""
    seen = set()
    for seed in range(6):
        own, gold = random.Random(f"{allocation}{seed}"), Counting()
        window = own.choice([16, 30, 64])
        judge = table_judge(
            tmp_path / str(seed), gold, seed, allocation=allocation, window=window, relabels=own.randint(1, window // 2),
            budget=own.choice([0, 7, 23]), replay=own.choice([0, 5]), epochs=1, select=own.choice(["random", "min-margin"]),
        )  # fmt: skip
        for step in range(20):
            prompts, completions = rows(step, 2 * own.randint(1, 10))
            answer = judge.label(f"step-{step}", prompts, completions)
            adds_up(answer.ledger, len(gold.asked) // 2)
        seen |= {name for name, count in answer.ledger.items() if count}
    assert seen >= {"trained", "tied", "budget"}


def steps_of(judge: LearningJudge, begin: int, end: int) -> Iterator[str]:
    for step in range(begin, end):
        yield repr(judge.label(f"step-{step}", *rows(step)))


@pytest.mark.parametrize("allocation", ["spread", "first", "pool"])
def test_killed_anywhere_and_resumed_nothing_is_bought_twice(tmp_path, monkeypatch, allocation):
    """Killed after a purchase and before its request is written down, at random steps; the trainer goes back to its last
    checkpoint (or to the start). Answers, weights and what was paid are those of a run that was never interrupted."""
    how = {"allocation": allocation, "window": 24, "relabels": 5, "budget": 18, "replay": 4, "epochs": 2}
    gold = Counting()
    whole = list(steps_of(table_judge(tmp_path / "whole", gold, **how), 0, 16))
    paid, own = Counting(), random.Random(allocation)
    answers, saved, folder = {}, None, tmp_path / "killed"
    record = type(table_judge(tmp_path / "other", gold).calls).record
    for attempt in range(60):
        judge, begin = table_judge(folder, paid, **how), 0
        if saved is not None:
            judge.restore(tmp_path / f"save-{saved}")
            begin = saved
        left = own.randint(1, 5)

        def dying(self, call, answer, left=[left]):  # noqa: B006
            left[0] -= 1
            if not left[0]:
                raise Killed
            record(self, call, answer)

        monkeypatch.setattr("tiltlm.judges.calls.Calls.record", dying)
        try:
            for step, answer in enumerate(steps_of(judge, begin, 16), begin):
                assert answers.setdefault(step, answer) == answer
                if own.random() < 0.4 and step + 1 != saved:
                    saved = step + 1
                    judge.save(tmp_path / f"save-{saved}-{attempt}")
                    (tmp_path / f"save-{saved}").unlink(missing_ok=True)
                    (tmp_path / f"save-{saved}").symlink_to(tmp_path / f"save-{saved}-{attempt}")
            break
        except Killed:
            continue
    assert attempt > 2 and [answers[k] for k in range(16)] == whole
    assert len(paid.asked) == len(gold.asked) == 2 * judge.now.ledger.bought == 2 * len(judge.purchases)


def test_a_request_that_comes_again_gets_the_answer_it_got(tmp_path):
    gold = Counting()
    judge = table_judge(tmp_path, gold, window=8, relabels=4)
    first = judge.label("a", *rows(0))
    bought, version = len(gold.asked), judge.now.version
    assert version == 1 and repr(judge.label("a", *rows(0))) == repr(first)
    assert len(gold.asked) == bought and judge.now.version == version and judge.now.calls == 1
    with pytest.raises(Conflict, match="'a' was asked before with other rows"):
        judge.label("a", *rows(1))
    with pytest.raises(Conflict):
        judge.label("a", *rows(0), scores=[0.0] * 8)


def test_half_a_line_at_the_end_of_the_journal_is_no_purchase(tmp_path):
    path = tmp_path / "purchases.jsonl"
    Purchases(path).record([("a", 0, "x"), ("a", 1, "y")], [(1.0, 0.1), (0.0, 2.0)])
    path.write_bytes(path.read_bytes()[:-9])
    found = Purchases(path)
    assert len(found) == 1 and found.find(("a", 0, "x")) == (1.0, 0.1) and found.find(("a", 1, "y")) is None
    found.record([("a", 1, "y")], [(0.0, 2.0)])
    assert Purchases(path).find(("a", 1, "y")) == (0.0, 2.0)


def test_gold_that_fails_leaves_no_trace(tmp_path):
    """A failing or senseless gold reward is an error; the same request then goes through as if nothing had been."""
    told = []

    def gold(prompts, completions):
        told.append(len(completions))
        if len(told) == 1:
            raise ValueError("away")
        return [math.nan if len(told) == 2 else float(sum(ids)) for ids in completions]

    judge = table_judge(tmp_path / "a", gold, window=8, relabels=2)
    for said in ("away", "finite"):
        with pytest.raises(ValueError, match=said):
            judge.label("a", *rows(0))
    assert repr(judge.label("a", *rows(0))) == repr(
        table_judge(tmp_path / "b", Counting(), window=8, relabels=2).label("a", *rows(0))
    )


def test_a_training_that_fails_leaves_the_judge_for_good(tmp_path, monkeypatch):
    """Whatever the error was (memory, say): it buys no more, counts nothing twice, and is not written down as it is."""
    from tiltlm.judges.service import Served

    gold = Counting()
    judge = table_judge(tmp_path, gold, window=8, relabels=2)
    judge.label("good", *rows(0))
    served = Served(judge, tmp_path, 100)
    served.keep()
    kept, before = sorted(tmp_path.glob("checkpoint-*")), len(gold.asked)

    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(judge.discriminator, "train", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        judge.label("bad", *rows(1))
    paid, counts = len(judge.purchases), judge.now.ledger.counts()
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="failed before: RuntimeError: out of memory"):
            judge.label("bad", *rows(1))
    assert len(judge.purchases) == paid and judge.now.ledger.counts() == counts and len(gold.asked) == before + 4
    served.keep()
    assert sorted(tmp_path.glob("checkpoint-*")) == kept


def test_a_journal_of_another_run_is_not_paid_on_top_of(tmp_path):
    how = {"window": 8, "relabels": 4, "budget": 6}
    bought_at_each(table_judge(tmp_path, Counting(), **how), 3, 8)
    judge = table_judge(tmp_path, Counting(), 7, **how)
    with pytest.raises(ValueError, match="6 of 6 verdicts are paid for"):
        judge.label("another", *rows(9))


# ---- learning ----------------------------------------------------------------------------------------------------------


def test_after_a_window_of_ties_the_next_ones_verdicts_are_learnt(tmp_path):
    """Trap 3: the original buys the next window's verdicts and does not train on them. Trap 9: ties are only counted."""
    gold = Counting(ties=True)
    judge = table_judge(tmp_path, gold, window=8, relabels=4)
    answer = judge.label("a", *rows(0))
    assert answer.ledger["tied"] == 4 and judge.now.version == 0 and all(map(math.isnan, answer.preferred))
    gold.ties = False
    ledger = judge.label("b", *rows(1)).ledger
    assert ledger["bought"] == 8 and ledger["trained"] > 0 == ledger["pending"] and judge.now.version == 1


def test_with_every_pair_bought_the_labels_are_golds(tmp_path):
    """D2PO with all pairs relabelled is OPO with gold, ties apart."""
    judge = table_judge(tmp_path, Counting(), window=8, relabels=4)
    for step in range(5):
        prompts, completions = rows(step)
        sums = [sum(ids) for ids in completions]
        wanted = [math.nan if a == b else float(a > b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        assert repr(judge.label(f"step-{step}", prompts, completions).preferred) == repr(wanted)


def test_with_none_bought_the_judge_stays_as_it_is(tmp_path):
    """D2PO without relabels is OPO on a fixed reward model; after a warm start, on the one that was learnt then."""
    gold = Counting()
    judge = table_judge(tmp_path, gold, relabels=0, warm=8, warm_epochs=20)
    judge.warm("warm", *rows(0, 16))
    adds_up(judge.now.ledger.counts(), 8)
    first = judge.score(*rows(0, 16))
    assert any(first) and judge.now.version == 1
    for step in range(4):
        answer = judge.label(f"step-{step}", *rows(0, 16))
        assert answer.scores == first and answer.version == 1 and all(map(math.isnan, answer.preferred))
    assert len(gold.asked) == 16


def test_with_no_passes_verdicts_are_labels_and_teach_nothing(tmp_path):
    """After the warm start the judge stays as it is; what it buys then still labels pairs, and stays pending."""
    judge = table_judge(tmp_path, Counting(), window=16, relabels=8, epochs=0, warm=4, warm_epochs=5, budget=15)
    judge.warm("warm", *rows(0))
    learnt, first = judge.now.ledger.counts(), judge.score(*rows(0))
    for step in range(1, 4):
        prompts, completions = rows(step)
        answer = judge.label(f"step-{step}", prompts, completions)
        sums = [sum(ids) for ids in completions]
        wanted = [math.nan if a == b else float(a > b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        bought = [said for said in answer.preferred if not math.isnan(said)]
        assert answer.version == 1 and judge.score(*rows(0)) == first and bought
        assert step == 3 or repr(answer.preferred) == repr(wanted)
    adds_up(judge.now.ledger.counts(), 15)
    assert judge.now.ledger.trained == learnt["trained"] > 0 and judge.now.ledger.pending > 0


def test_scores_are_of_before_the_training_of_their_request(tmp_path):
    judge = table_judge(tmp_path, Counting(), window=8, relabels=4)
    before = judge.score(*rows(0))
    answer = judge.label("a", *rows(0))
    assert answer.scores == before != judge.score(*rows(0)) and answer.version == 0


def test_what_it_learns_is_golds_order(tmp_path):
    """On rows it has been taught for a while, it orders pairs as gold does; knowing nothing, half of them."""
    judge = table_judge(tmp_path, Counting(), window=32, relabels=16, epochs=8, lr=0.3)
    bought_at_each(judge, 20, 32)
    prompts, completions = rows(3, 32)
    gold = torch.tensor([float(sum(ids)) for ids in completions]).reshape(-1, 2).diff(dim=1)[:, 0]
    silver = torch.tensor(judge.score(prompts, completions)).reshape(-1, 2).diff(dim=1)[:, 0]
    assert bool((silver[gold != 0].sign() == gold[gold != 0].sign()).all())


def test_the_policys_own_scores_are_taken_and_verdicts_stand_on_them(tmp_path):
    gold = Counting()
    judge = LearningJudge(None, gold, Judging("self", window=8, relabels=2), stream(0), tmp_path)
    scores = [3.0, 0.0, 0.1, 0.0, 2.0, 0.0, 0.2, 0.0]
    answer = judge.label("a", *rows(0), scores=scores)
    assert answer.scores == scores and {row for _, row in gold.asked} == {
        tuple(rows(0)[1][k]) for k in (2, 3, 6, 7)
    }
    adds_up(answer.ledger, 2)
    with pytest.raises(ValueError, match="no network of its own"):
        judge.label("b", *rows(1))


def test_replay_takes_earlier_verdicts_along(tmp_path, monkeypatch):
    sizes = []
    train = Discriminator.train

    def seen(self, preferences, epochs, own):
        sizes.append(len(preferences))
        train(self, preferences, epochs, own)

    monkeypatch.setattr(Discriminator, "train", seen)
    judge = table_judge(tmp_path, Counting(), window=16, relabels=8, replay=5)
    trained_pairs = [judge.label(f"step-{k}", *rows(k, 16)).ledger["trained"] for k in range(4)]
    new = [b - a for a, b in zip([0, *trained_pairs], trained_pairs, strict=False)]
    assert sizes == [new[0], *(n + 5 for n in new[1:])]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"relabels": 129}, "holds 128 pairs"), ({"select": "variance"}, "ensemble of one"), ({"lr": 0.0}, "positive"),
        ({"budget": 3, "warm": 4}, "more than the budget"), ({"window": 0}, "window"), ({"replay": -1}, "replay"),
        ({"epochs": -1}, "epochs"),
        ({"kind": "self", "members": 2}, "judges itself"), ({"kind": "none", "url": "http://x"}, "kind named"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Judging(**{"kind": "reward-model"} | settings)


def test_settings_that_do_nothing_are_said():
    """A budget beside a url bounds nothing, and the policy as its own judge learns by no rate."""
    served = Judging("reward-model", url="http://x", warm=4, monitor=True, budget=100, lr=1e-3, batch_size=8)
    assert (
        "settings and a budget of its own: here --feed.judge's budget 100, batch-size 8, lr 0.001 do"
        in served.caution
    )
    own = Judging("self", budget=100, relabels=4, select="random", monitor=True, epochs=2, warm_epochs=3)
    assert "nothing learns to: here --feed.judge's warm-epochs 3, epochs 2 do nothing" in own.caution
    for heeded in (
        Judging("reward-model", budget=100, lr=1e-3, warm=8), Judging("self", budget=9, allocation="first"),
        Judging("reward-model", url="http://x", warm=4, monitor=True),
    ):  # fmt: skip
        assert heeded.caution == ""


def test_rows_that_are_no_pairs_are_refused(tmp_path):
    judge = table_judge(tmp_path, Counting())
    with pytest.raises(ValueError, match="an even number; got 1 and 1"):
        judge.label("a", [[0]], [[1]])
    with pytest.raises(ValueError, match="must answer one prompt"):
        judge.label("a", [[0], [1]], [[1], [2]])
    with pytest.raises(ValueError, match="one score for each of the 2 rows"):
        judge.label("a", [[0], [0]], [[1], [2]], scores=[0.0])


# ---- networks ----------------------------------------------------------------------------------------------------------

PROMPTS = ["Once there was", "Once there was", "A dog", "A dog"]
TEXTS = [" a cat.", " a very big and happy dog in the park.", "", " no!"]


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """A GPT-2 with dropout and a tokenizer, as a folder."""
    return text_body(tmp_path_factory.mktemp("body"))


def loud(network: nn.Module) -> None:
    """A head large enough to tell texts apart."""
    for name, x in trained(network).items():
        if name.endswith(("score.weight", "wte.weight")):
            nn.init.normal_(x, 0.0, 1.0, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["reward-model", "dpo"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_text_judge_learns_scores_steadily_and_comes_back(body, tmp_path, kind, rank):
    """Trap 6: no dropout while scoring, before training and after; padding and neighbours do not matter; restored bit by
    bit, optimizer included."""
    how = Judging(kind, lora_rank=rank, most_tokens=48)
    judge = Discriminator([network_on_texts(how, body, stream(1))], lr=3e-3, batch_size=2)
    if kind == "reward-model":
        loud(judge.networks[0])
    before = judge.score(PROMPTS, TEXTS).mean
    assert before == judge.score(PROMPTS, TEXTS).mean
    verdicts = [Preference("A dog", " no!", ""), Preference("Once there was", TEXTS[0], TEXTS[1])]
    judge.train(verdicts, 10, stream(2))
    after = judge.score(PROMPTS, TEXTS).mean
    assert after[3] - after[2] > before[3] - before[2] and after[0] - after[1] > before[0] - before[1]
    assert after == judge.score(PROMPTS, TEXTS).mean
    alone = [judge.score([x], [y]).mean[0] for x, y in zip(PROMPTS, TEXTS, strict=True)]
    close(torch.tensor(alone), torch.tensor(after), 1e-5)
    judge.save(tmp_path / "saved")
    other = Discriminator([network_on_texts(how, body, stream(1))], lr=3e-3, batch_size=2)
    other.restore(tmp_path / "saved")
    assert other.score(PROMPTS, TEXTS).mean == after
    for each in (judge, other):
        each.train(verdicts, 2, stream(3))
    assert other.score(PROMPTS, TEXTS).mean == judge.score(PROMPTS, TEXTS).mean != after


def test_pairs_of_a_judge_learnt_one_by_one_and_recomputed_are_learnt_as_together(body, monkeypatch):
    found = []
    for micro_batch in (0, 1):
        how = Judging("reward-model", most_tokens=48, checkpointing=micro_batch > 0)
        network = network_on_texts(how, body, stream(1))
        judge = Discriminator([network], lr=3e-3, batch_size=2, micro_batch=micro_batch)
        asked: list[int] = []
        score = network.score
        monkeypatch.setattr(
            network, "score", lambda rows, asked=asked, score=score: asked.append(len(rows)) or score(rows)
        )
        verdicts = [Preference("A dog", " no!", ""), Preference("Once there was", TEXTS[0], TEXTS[1])]
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        judge.train(verdicts, 1, stream(2))
        found.append((asked, judge.score(PROMPTS, TEXTS).mean))
    assert [rows[:2] for rows, _ in found] == [[4, 4], [2, 2]]
    close(torch.tensor(found[1][1]), torch.tensor(found[0][1]), 1e-4)


def test_a_second_policy_without_an_end_token_reads_completions_as_they_are(tmp_path):
    network = network_on_texts(Judging("dpo"), text_body(tmp_path, eos_token_id=None), stream(1))
    rows = network.encode(["A dog"], [" no!"])
    assert rows.completions.lists() == [network.policy.tokenizer(" no!", add_special_tokens=False)["input_ids"]]
    assert network.score(rows).tolist() == [0.0]


def test_adapters_leave_the_body_as_it_is(body):
    found = trained(network_on_texts(Judging("reward-model", lora_rank=2), body, stream(1)))
    assert {"lora_A", "lora_B"} <= {part for name in found for part in name.split(".")}
    assert all("lora" in name or name.endswith("score.weight") for name in found)
    assert sum(name.endswith("score.weight") for name in found) == 1


def test_the_second_policys_loss_by_hand(body):
    """A fresh one has h = 0: ln 2. Moved, −log σ(0.05·Δh) of h summed over the tokens, the end's included."""
    network = network_on_texts(Judging("dpo"), body, stream(1))
    verdict = [Preference("A dog", " no!", " yes, it was.")]
    batch = compared(network, verdict, torch.device("cpu"))
    close(BradleyTerry().loss(network, batch).loss.detach(), torch.tensor([math.log(2)]), 1e-6)
    with torch.no_grad():
        for x in network.policy.parameters():
            x.add_(0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))

    def log_p(model, text):
        tokenizer = network.policy.tokenizer
        asked = tokenizer("A dog")["input_ids"]
        ids = torch.tensor([asked + tokenizer(text, add_special_tokens=False)["input_ids"] + [0]])
        log_probs = torch.log_softmax(model.model(ids).logits, -1)[0]
        return sum(log_probs[t - 1, ids[0, t]] for t in range(len(asked), ids.shape[1]))

    base = network._base[0]
    h = [log_p(network.policy, text) - log_p(base, text) for text in verdict[0][1:]]
    wanted = -torch.nn.functional.logsigmoid(0.05 * (h[0] - h[1]))
    close(BradleyTerry().loss(network, batch).loss, wanted[None], 1e-5)
    close(torch.tensor(scores_of([network], ["A dog"], [" no!"]).mean), 0.05 * h[0][None], 1e-5)


def test_members_differ_and_their_mean_scores(body):
    how = Judging("reward-model", members=3, select="variance")
    judge = Discriminator([network_on_texts(how, body, stream(1, k)) for k in range(3)])
    found = judge.score(PROMPTS, TEXTS)
    assert len({each[0] for each in found.members}) == 3
    close(torch.tensor(found.mean), torch.tensor(found.members).mean(0), 1e-6)


def test_a_trained_reward_model_begins_with_its_head(body, tmp_path):
    first = network_on_texts(Judging("reward-model"), body, stream(1))
    loud(first)
    first.save(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 1
    again = network_on_texts(Judging("reward-model"), tmp_path, stream(9))
    assert scores_of([again], PROMPTS, TEXTS).mean == scores_of([first], PROMPTS, TEXTS).mean


def test_another_judges_checkpoint_is_refused(body, tmp_path):
    Discriminator([network_on_texts(Judging("reward-model"), body, stream(1))]).save(tmp_path / "full")
    other = Discriminator([network_on_texts(Judging("reward-model", lora_rank=2), body, stream(1))])
    with pytest.raises(ValueError, match="holds another judge"):
        other.restore(tmp_path / "full")
