"""Online methods on groups: one value by hand each, gradients, labels, coins, and what is filled in around a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import build
from laws.test_fixed_points import PromptValues
from tiltlm.api.learning import learn
from tiltlm.experience import Keeps, Offline
from tiltlm.feeds import Feed, Stores, course_of, source_of, why_not
from tiltlm.fit import Fit
from tiltlm.groups import Groups, extremes
from tiltlm.judges.settings import Judging
from tiltlm.methods import method
from tiltlm.models.table import TableLM
from tiltlm.nets import Net, learner
from tiltlm.policies.a_star_po import AStarPO, OptimalValues, Valued, a_star_po_loss, optimal_value
from tiltlm.policies.dpo_rw import DpoRw
from tiltlm.policies.exo_rw import ExoRw
from tiltlm.policies.log_variance import LogVariance, distance_metrics, log_variance_loss
from tiltlm.policies.online_exo import OnlineDpoRw, OnlineExo
from tiltlm.policies.online_ipo import OnlineIPO, online_ipo_loss
from tiltlm.policies.opo import OPO, Coins, labels_of, opo_loss, pair_metrics
from tiltlm.policies.ppo import ActorCritic
from tiltlm.policies.rebel import REBEL, LastPolicy, rebel_loss
from tiltlm.policies.trajectory_balance import (
    LearntTrajectoryBalance,
    TrajectoryBalance,
    trajectory_balance_loss,
)
from tiltlm.problem import Problem
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream


def tensor(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def close(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got.detach().double(), tensor(*expected).reshape(got.shape), atol=1e-10, rtol=0)


def policy() -> TableLM:
    """One prompt, one step: (4/5, 1/5)."""
    table = TableLM(1, 2, 1)
    table.tables[0].data[0, 0] = tensor(0.8, 0.2).log()
    return table


def groups(*reward: float, size: int = 2, **more: Any) -> Groups:
    """Tokens 0, 1, 0, 1, …, one for each reward; pi_ref (1/2, 1/2): h(0) = ln 8/5, h(1) = ln 2/5."""
    ids = torch.arange(len(reward))[:, None] % 2
    samples = Samples(
        Tokens.of([[0]]), torch.zeros(len(reward), dtype=torch.int64), ids, torch.ones_like(ids, dtype=torch.bool),
        reward=tensor(*reward), log_ref=torch.full(ids.shape, log(0.5), dtype=torch.float64),
    )  # fmt: skip
    return Groups(samples, size, **more)


# ---- by hand ------------------------------------------------------------------------------------------------------


def test_opo_by_hand():
    """z = ½·(2 ln 3 − 0) = ln 3, σ(z) = ¾: −½ ln ¾ − ½ ln ¼ = 2 ln 2 − ½ ln 3; label 1: ln 4/3, label 0: ln 4."""
    h = tensor(2 * log(3), 0).expand(3, 2)
    close(opo_loss(h, tensor(0.5, 1, 0), 0.5), 2 * log(2) - log(3) / 2, log(4 / 3), log(4))


def test_online_ipo_by_hand():
    """beta 0.1 asks for ±5; Δh = 2: (2 − 5)² = 9, (2 + 5)² = 49, and halfway between."""
    close(online_ipo_loss(tensor(3, 1).expand(3, 2), tensor(1, 0, 0.5), 0.1), 9, 49, 29)


def test_log_variance_by_hand():
    """h − r/½ = (1, 3, 5): variance 4 with K − 1 = 2 below: 2."""
    close(log_variance_loss(tensor(1, 5, 5)[None], tensor(0, 1, 0)[None], 0.5), 2)


def test_trajectory_balance_by_hand():
    """h + log Ẑ − r/½ = (0, 2, 4) with log Ẑ = −1: ½·20/3; with the group's mean −3: ½·8/3."""
    h, reward = tensor(1, 5, 5)[None], tensor(0, 1, 0)[None]
    close(trajectory_balance_loss(h, tensor(-1)[None], reward, 0.5), 10 / 3)
    close(trajectory_balance_loss(h, tensor(-3)[None], reward, 0.5), 4 / 3)


def test_rebel_by_hand():
    """((3 − 1)/½ − (1 − ½·2))² = 16 for Δ(log p/p_t) = 2, Δr = 1, Δh_t = 2, beta ½, eta ½; the same turned over."""
    h, h_old, reward = tensor(4, 0), tensor(2, 0), tensor(1, 0)
    close(rebel_loss(h[None], h_old[None], reward[None], 0.5, 0.5), 16)
    close(rebel_loss(h.flip(0)[None], h_old.flip(0)[None], reward.flip(0)[None], 0.5, 0.5), 16)


def test_a_star_po_by_hand():
    """(½·2 − (1 − ¼))² = 1/16 and (½·0 − (0 − ¼))² = 1/16; V̂* of rewards 0 and ½ ln 3 at beta ½: ½ ln 2."""
    close(a_star_po_loss(tensor(2, 0)[None], tensor(1, 0)[None], tensor(0.25), 0.5), 1 / 16)
    close(optimal_value(tensor(0, 0.5 * log(3))[None], 0.5), 0.5 * log(2))


def test_objectives_by_hand():
    """Tokens 0 and 1, rewards ½ ln 2 and 0, beta ½: Δh = ln 4, Δr/beta = ln 2; d = h − r/beta differs by ln 2 in a pair."""
    pair = groups(0.5 * log(2), 0)
    close(LogVariance(0.5).loss(policy(), pair).loss, log(2) ** 2 / 4)
    close(TrajectoryBalance(0.5).loss(policy(), pair).loss, log(2) ** 2 / 8)
    learnt = LearntTrajectoryBalance(0.5).loss(ActorCritic(policy(), PromptValues(tensor(0.0))), pair)
    close(learnt.loss, (log(0.8) ** 2 + log(0.4) ** 2) / 4)
    close(learnt.metrics["log_z"], 0)
    close(ExoRw(1.0, 0.5).loss(policy(), pair).loss, *OnlineExo(1.0, 0.5).loss(policy(), pair).loss.tolist())
    close(DpoRw(1.0, 0.5).loss(policy(), pair).loss, *OPO("soft", 1.0, 0.5).loss(policy(), pair).loss.tolist())
    close(OPO("hard", 1.0, 0.5).loss(policy(), pair).loss, log(1.5))
    close(OnlineIPO("hard", 0.5).loss(policy(), pair).loss, (log(4) - 1) ** 2)
    old = Groups(pair.samples.with_(log_q=tensor(0.5, 0.5).log()[:, None]), 2)
    close(REBEL(0.5, 1.0).loss(policy(), old).loss, (log(4) - 0.5 * log(2)) ** 2)
    close(AStarPO(0.5).loss(policy(), Valued(pair, tensor(0.0))).loss, (log(0.8) ** 2 + log(0.4) ** 2) / 8)


def gradient(loss: Any, *h: float) -> list[float]:
    x = tensor(*h)[None].requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0][0].tolist()


def test_gradients_are_those_of_the_formulas():
    """OPO: ±beta_pi·(σ(z) − p), hard −beta_pi·σ(−z); online IPO: ±2·(Δh − (2p − 1)/(2·beta)); log-variance."""
    s = 1 / (1 + math.exp(-0.3 * 2))
    assert gradient(lambda h: opo_loss(h, tensor(0.7), 0.3), 3, 1) == pytest.approx(
        [0.3 * (s - 0.7), -0.3 * (s - 0.7)]
    )
    assert gradient(lambda h: opo_loss(h, tensor(1), 0.3), 3, 1) == pytest.approx([-0.3 * (1 - s), 0.3 * (1 - s)])
    gap = 2 * (2 - (2 * 0.7 - 1) / (2 * 0.1))
    assert gradient(lambda h: online_ipo_loss(h, tensor(0.7), 0.1), 3, 1) == pytest.approx([gap, -gap])
    d = (1.0, 3.0, 5.0)
    own = [(x - (sum(d) - x) / 2) / 3 for x in d]
    assert gradient(lambda h: log_variance_loss(h, tensor(0, 1, 0)[None], 0.5), 1, 5, 5) == pytest.approx(own)


def test_online_ipo_is_at_rest_in_a_pair_at_a_bounded_margin():
    """Δh = (2p − 1)/(2·beta) = 2 at p = 0.7, beta 0.1."""
    assert gradient(lambda h: online_ipo_loss(h, tensor(0.7), 0.1), 2, 0) == pytest.approx([0, 0], abs=1e-12)


def test_losses_where_the_policy_is_the_reference():
    """OPO: ln 2, whatever the labels. Log-variance: that of r/beta, nothing to learn from equal rewards. REBEL: as it."""
    same, pairs, tied = TableLM(1, 2, 1), groups(0.4, 0, 1, 2), groups(1, 1)
    for labels in ("soft", "hard"):
        close(OPO(labels, 0.2).loss(same, pairs).loss, log(2), log(2))
    found = LogVariance(0.5).loss(same, pairs)
    close(found.loss, 0.8**2 / 4, 2**2 / 4)
    close(found.metrics["h"], 0, 0)
    loss = LogVariance(0.5).loss(same, tied).loss
    loss.sum().backward()
    assert loss.item() == 0 and same.tables[0].grad.abs().max() == 0


def test_distance_metrics_by_hand():
    found = distance_metrics(tensor(1, 5, 5)[None], tensor(0, 1, 0)[None], 0.5)
    close(found["variance"], 4)
    close(found["log_z"], -3)
    close(found["h"], 11 / 3)
    close(found["reward"], 1 / 3)


# ---- labels -------------------------------------------------------------------------------------------------------


def test_labels_by_hand():
    """σ(½ ln 3/½) = ¾; the larger reward; nothing for a tie."""
    pairs = groups(0.5 * log(3), 0, 0, 1, 2, 2)
    close(labels_of(pairs, "soft", 0.5), 0.75, 1 / (1 + math.exp(2)), 0.5)
    assert labels_of(pairs, "hard", 0.5).nan_to_num(-1).tolist() == [1, 0, -1]


def test_a_verdict_overrides_what_the_rewards_say():
    preferred = tensor(0, math.nan, 1)
    pairs = groups(3, 0, 0, 1, 2, 2, preferred=preferred)
    assert labels_of(pairs, "hard", 1.0).tolist() == [0, 0, 1]
    soft = labels_of(pairs, "soft", 1.0)
    assert soft[0] == 0 and 0 < soft[1] < 0.5 and soft[2] == 1
    metrics = OPO("hard", 1.0).loss(policy(), pairs).metrics
    assert metrics["tied"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_a_prompt_s_own_shift_of_the_reward_changes_no_label(labels):
    plain, shifted = groups(0.3, 0, -1, 2), groups(5.3, 5, -8, -5)
    torch.testing.assert_close(labels_of(shifted, labels, 0.5), labels_of(plain, labels, 0.5))


def test_hard_labels_know_the_order_alone_and_soft_ones_more():
    plain, bent = groups(0.3, 0, -1, 2), groups(math.exp(0.3), 1, math.exp(-1), math.exp(2))
    assert torch.equal(labels_of(bent, "hard", 0.5), labels_of(plain, "hard", 0.5))
    assert (labels_of(bent, "soft", 0.5) - labels_of(plain, "soft", 0.5)).abs().min() > 1e-3


def test_hard_ties_are_dropped_from_the_step_and_counted():
    """A tie weighs nothing and pulls at nothing; without it the step is the same. All tied: an empty step, not a crash."""
    for objective in (OPO("hard", 1.0), OnlineIPO("hard", 0.5)):
        some, alone, none = groups(1, 0, 2, 2), groups(1, 0), groups(2, 2, 0, 0)
        assert objective.weight(some).tolist() == [1, 0] and objective.weight(none).tolist() == [1, 1]
        found = objective.loss(policy(), some)
        assert found.metrics["tied"].tolist() == [0, 1] and found.loss[1] == 0
        close(found.loss.sum() / objective.weight(some).sum(), objective.loss(policy(), alone).loss.item())
        table = policy()
        objective.loss(table, none).loss.sum().backward()
        assert table.tables[0].grad.abs().max() == 0
    assert OPO("soft", 1.0).weight(groups(1, 0, 2, 2)).tolist() == [1, 1]


def test_pair_metrics_by_hand():
    """h = (ln 8/5, ln 2/5), beta ½: margin ln 2 for the first, −ln 2 for the second row; entropy of ¾: 2 ln 2 − ¾ ln 3."""
    pairs = groups(0.5 * log(3), 0, 0, 1, 2, 2)
    h = tensor(log(1.6), log(0.4)).expand(3, 2)
    found = pair_metrics(h, pairs, tensor(0.75, 0, math.nan), 0.5)
    assert found["margin"].isnan().tolist() == [False, False, True]
    close(found["margin"][:2], log(2), -log(2))
    assert found["accuracy"][:2].tolist() == [1, 0] and found["accuracy"][2].isnan()
    close(found["label_entropy"][:2], 2 * log(2) - 0.75 * log(3), 0)
    assert found["tied"].tolist() == [0, 0, 1]
    close(found["reward"], 0.25 * log(3), 0.5, 2)


def test_of_larger_groups_the_best_and_the_worst_row_meet():
    whole = groups(0.5, 2, 0.1, 1, 1, 1, 1, 1, size=4)
    pairs = extremes(whole)
    assert pairs.reward.tolist() == [[2, 0.1], [1, 1]]
    assert pairs.samples.tokens[:, 0].tolist() == [
        1,
        0,
        0,
        1,
    ]  # rows 1 and 2; then two rows of the tie, not one twice
    assert extremes(pairs) is pairs
    assert len(OPO().prepare(whole)) == 2


# ---- what is filled in around a batch -------------------------------------------------------------------------------


def test_coins_fall_as_often_as_they_say_and_the_same_in_the_same_step():
    """P = ¾ at beta_r ½: 2000 pairs a step, 5 steps."""
    many = groups(*[0.5 * log(3), 0] * 2000)
    coins = Coins(Offline(many, 2000, stream(0)), 0.5, stream(1))
    tossed = [coins.batch(step).preferred for step in range(5)]
    assert abs(torch.cat(tossed).mean() - 0.75) < 0.02
    assert torch.equal(coins.batch(3).preferred, tossed[3]) and not torch.equal(tossed[3], tossed[4])
    assert set(torch.cat(tossed).tolist()) == {0.0, 1.0}


def test_a_coin_leaves_verdicts_alone():
    judged = groups(*[0, 5] * 50, preferred=torch.ones(50, dtype=torch.float64))
    assert Coins(Offline(judged, 50, stream(0)), 1.0, stream(1)).batch(0).preferred.tolist() == [1] * 50


def test_sampled_labels_without_a_coin_are_refused():
    with pytest.raises(ValueError, match="sampled labels are tossed where the pairs come from"):
        OPO("sampled", 1.0).loss(policy(), groups(1, 0))


def test_the_last_policy_is_the_one_before_the_step_whoever_drew():
    pair = groups(1, 0)
    batch = LastPolicy(Offline(pair, 1, stream(0)), policy()).batch(0)
    close(batch.samples.log_q[:, 0], log(0.8), log(0.2))
    assert not batch.samples.log_q.requires_grad
    with pytest.raises(ValueError, match="REBEL needs the last policy's log-probabilities"):
        REBEL(0.5).loss(policy(), pair)


def few_prompts() -> Problem:
    """Four prompts of one token, two tokens to say, paid for a 2 at the end."""
    reference = TableLM(4, 3, 2).randomise(torch.Generator().manual_seed(0))
    reward = lambda samples: (samples.tokens[:, 1] == 2).double()  # noqa: E731
    return Problem.of(
        reference, reward=reward, prompts=Tokens.of([[k] for k in range(4)]), beta=0.5, max_new_tokens=2
    )


def test_optimal_values_are_of_the_prompt_alone_and_near_beta_log_z():
    """The same in whatever batch a prompt comes; 4000 draws are within 0.02 of V*."""
    problem = few_prompts()
    drawn = learnt_from(problem, "a-star-po", Feed(n=1))

    def values(order: list[int], n: int) -> dict[int, float]:
        rows = torch.tensor(order).repeat_interleave(2)
        some = drawn.samples.select(torch.zeros(len(rows), dtype=torch.int64))
        batch = Groups(Samples(problem.prompts["train"], rows, some.tokens, some.mask), 2)
        found = OptimalValues(Fixed(batch), problem.target, 0.5, n, 2, stream(3)).batch(0)
        return dict(zip(order, found.value.tolist(), strict=True))

    assert values([0, 1, 2, 3], 16) == values([3, 1, 0, 2], 16)
    assert values([2], 16)[2] == values([0, 1, 2, 3], 16)[2]
    many = values([0, 1, 2, 3], 4000)
    for k in range(4):
        every = [[a, b] for a in range(3) for b in range(3)]
        rows = Tokens.of(every)
        samples = Samples(Tokens.of([[k]]), torch.zeros(9, dtype=torch.int64), rows.ids, rows.mask)
        p = problem.reference.log_prob(samples).sum(1).exp()
        v_star = 0.5 * float((p * (problem.target.reward(samples) / 0.5).exp()).sum().log())
        assert abs(many[k] - v_star) < 0.02


@dataclass(frozen=True)
class Fixed:
    """The same batch at every step."""

    one: Any

    def batch(self, step: int) -> Any:
        return self.one


def learnt_from(problem: Problem, name: str, feed: Feed) -> Any:
    """The first batch that a method is fed, as groups."""
    chosen: Any = method(name)
    problem, who = learner(problem, chosen, Net(), stream(0))
    course = course_of(problem, chosen, who, feed, Fit(batch_size=8), "test", Stores())
    batch = course.experience.batch(0)
    return batch.groups if isinstance(batch, Valued) else batch


@pytest.mark.parametrize("source", ["live", "fresh"])
def test_rebel_asks_the_policy_of_others_draws_and_not_of_its_own(source, monkeypatch):
    """Of its own draws log_q comes from drawing, and is what the policy would answer."""
    asked, log_prob = [], TableLM.log_prob

    def spied(self: TableLM, samples: Samples) -> Tensor:
        asked.append(self)
        return log_prob(self, samples)

    monkeypatch.setattr(TableLM, "log_prob", spied)
    chosen: Any = method("rebel")
    problem, who = learner(few_prompts(), chosen, Net(), stream(0))
    who.policy.randomise(torch.Generator().manual_seed(1))
    batch = course_of(
        problem, chosen, who, Feed(source, n=1), Fit(batch_size=8), "test", Stores()
    ).experience.batch(0)
    assert sum(model is who.policy for model in asked) == (source == "fresh")
    torch.testing.assert_close(
        batch.samples.log_q, log_prob(who.policy, batch.samples).detach(), atol=1e-12, rtol=0
    )
    assert (batch.samples.log_q - batch.samples.log_ref).abs().max() > 0.1


@dataclass
class Learning:
    """The same batch at every step, and a number that is kept."""

    one: Any
    kept: int = 7

    def batch(self, step: int) -> Any:
        return self.one

    def numbers(self) -> dict[str, float]:
        return {"kept": float(self.kept)}

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "kept").write_text(str(self.kept))

    def restore(self, folder: Path) -> None:
        self.kept = int((folder / "kept").read_text())


ONLINE = (
    "opo", "online-ipo", "online-exo", "online-dpo-rw", "log-variance", "trajectory-balance",
    "trajectory-balance-learnt", "rebel", "a-star-po",
)  # fmt: skip


@pytest.mark.parametrize("name", ONLINE)
def test_online_methods_are_fed_the_policy_s_own_groups_unless_the_feed_says_otherwise(name):
    problem = few_prompts()
    assert source_of(problem.facts, method(name), Feed()) == "live"
    assert source_of(problem.facts, method(name), Feed(source="fresh")) == "fresh"
    assert method(name).bound(0.3).optimum


@pytest.mark.parametrize("source", ["live", "fresh", "stored"])
@pytest.mark.parametrize("name", ONLINE)
def test_every_one_learns_on_each_feed(name, source):
    """Three steps in memory, groups of four: the loss is finite, and the policy has moved."""
    problem = few_prompts()
    fit = Fit(lr=0.03, steps=3, batch_size=8)
    learnt = learn(problem, name, fit=fit, feed=Feed(source=source, n=2, size=4), progress=False)
    assert all(math.isfinite(row["loss"]) for row in learnt.metrics)
    pairs = zip(learnt.model.tables, problem.reference.tables, strict=True)
    assert any((new != old).any() for new, old in pairs)


def test_hard_labels_say_once_that_they_have_no_finite_optimum():
    said: list[str] = []
    problem = few_prompts()
    for labels in ("hard", "soft"):
        chosen = OPO(labels)
        _, who = learner(problem, chosen, Net(), stream(0))
        course_of(problem, chosen, who, Feed(n=1), Fit(batch_size=4), "test", Stores(), said.append)
    assert len(said) == 1 and "no finite optimum" in said[0]


@pytest.mark.parametrize("make", [
    lambda: OPO(beta_pi=0.0), lambda: OPO(beta_r=-1), lambda: OnlineIPO(beta_r=0.0), lambda: LogVariance(0.0),
    lambda: TrajectoryBalance(-1.0), lambda: LearntTrajectoryBalance(0.0), lambda: REBEL(eta=0.0), lambda: AStarPO(n=0),
    lambda: OPO(passes=0),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="must be positive"):
        make()


@pytest.mark.kernels
@pytest.mark.parametrize(
    "objective", [OPO("soft", 0.5), OPO("hard", 0.5), OnlineIPO(beta=0.5), LogVariance(0.5), TrajectoryBalance(0.5)],
    ids=lambda x: repr(x),
)  # fmt: skip
def test_a_group_s_loss_depends_on_itself_alone(objective):
    """Batch mates and padding: group by group and all at once give the same."""
    generator = torch.Generator().manual_seed(0)
    done = Tokens.of([torch.randint(1, 11, (n,), generator=generator).tolist() for n in (4, 1, 2, 3, 3, 1)])
    samples = Samples(
        Tokens.of([[3, 5, 7], [2]]), torch.tensor([0, 0, 0, 0, 1, 1]), done.ids, done.mask,
        reward=torch.tensor([0.5, -1.0, 2.0, 0.0, 0.0, 1.0]).double(),
    )  # fmt: skip
    with torch.no_grad():
        whole = Groups(samples.with_(log_ref=build("gpt2", torch.float64, seed=1).log_prob(samples)), 2)
        model = build("gpt2", torch.float64)
        found = objective.loss(model, whole)
        ones = [objective.loss(model, whole.select(torch.tensor([k]))).loss for k in range(3)]
    torch.testing.assert_close(torch.cat(ones), found.loss, atol=1e-6, rtol=1e-6)
    assert all(x.shape == (3,) and not x.requires_grad for x in found.metrics.values())


def test_what_wraps_a_learning_experience_hands_on_what_it_keeps(tmp_path):
    inner = Learning(groups(1, 0))
    coins = Coins(inner, 1.0, stream(0))
    assert isinstance(coins, Keeps) and coins.numbers() == {"kept": 7.0}
    coins.save(tmp_path / "kept")
    inner.kept = 0
    coins.restore(tmp_path / "kept")
    assert inner.kept == 7
    plain = Coins(Fixed(groups(1, 0)), 1.0, stream(0))
    plain.save(tmp_path / "nothing")
    plain.restore(tmp_path / "nothing")
    assert plain.numbers() == {} and not (tmp_path / "nothing").exists()


def test_a_judge_in_the_reward_s_place_is_refused_where_the_reward_is_asked_beside():
    """V̂* would come from the gold reward, and in no ledger."""
    feed, facts = Feed(n=2, judge=Judging(kind="reward-model")), few_prompts().facts
    assert "asks the reward of draws of its own" in str(why_not(facts, method("a-star-po"), feed))
    assert why_not(facts, method("log-variance"), feed) is None


def test_groups_without_a_reference_are_refused():
    bare = Groups(groups(1, 0).samples.with_(log_ref=None), 2)
    for objective in (OPO("soft", 1.0), OnlineIPO(beta=1.0), LogVariance(1.0), TrajectoryBalance(1.0), REBEL(1.0)):
        with pytest.raises(ValueError, match="no log_ref: score them with the reference first"):
            objective.loss(policy(), bare)


def test_the_online_forms_of_exo_differ_in_who_draws_alone():
    assert OnlineExo.source == OnlineDpoRw.source == "live" and ExoRw.source is DpoRw.source is None
    assert OnlineExo(0.4, 0.5).bound(1.0).beta_r == 0.4 and OnlineExo().bound(1.0).beta_r == 2.0


def test_a_target_without_its_beta_says_so():
    with pytest.raises(ValueError, match="this method's beta is the target's"):
        LogVariance().loss(policy(), groups(1, 0))
