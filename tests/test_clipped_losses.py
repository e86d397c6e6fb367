"""Clipped policy-gradient methods by hand, and what happens around their steps: passes, other drawers, tied groups.

Where they end is in tests/laws/test_clipped.py. The table's policy says (4/5, 1/5), the reference (1/2, 1/2).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.world import HORIZON, PROMPTS, world
from tiltlm.clipped import MISMATCH, Graded, beyond, clipped_loss, group_advantage, k3
from tiltlm.engine import Engine, Optim
from tiltlm.experience import Generated, Live
from tiltlm.method import Method
from tiltlm.models.table import TableLM
from tiltlm.policies.cispo import CISPO, cispo_loss
from tiltlm.policies.dapo import DAPO, Redrawn, Untied, overlong_punishment
from tiltlm.policies.dr_grpo import DrGRPO
from tiltlm.policies.grpo import GRPO
from tiltlm.policies.gspo import GSPO
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.target import Target

ALL: list[Any] = [GRPO(1.0), DrGRPO(1.0), DAPO(1.0), GSPO(1.0), CISPO(1.0)]
ROOT = stream(23, "test-clipped")


def tensor(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def close(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got.detach().double(), tensor(*expected).reshape(got.shape), atol=1e-10, rtol=0)


def named(method: Any) -> str:
    return type(method).__name__


# ---- formulas ---------------------------------------------------------------------------------------------------


def test_the_clipped_step_by_hand():
    """Clips at 0.8 and 1.28. ρ 1.5: A = 1 is cut to −1.28, A = −1 is not; ρ ½: A = 1 is not cut, A = −1 is cut to 0.8."""
    ratio, advantage = tensor(1.5, 1.5, 0.5, 0.5).requires_grad_(), tensor(1, -1, 1, -1)
    loss = clipped_loss(ratio, advantage, 0.2, 0.28)
    close(loss, -1.28, 1.5, -0.5, 0.8)
    loss.sum().backward()
    close(ratio.grad, 0, 1, -1, 0)
    assert beyond(ratio, advantage, 0.2, 0.28).tolist() == [True, False, False, True]


def test_k3_by_hand():
    """p = 1/2, ref = 1/4: ½ − 1 + ln 2; ref = 1: 2 − 1 − ln 2; equal: 0. Its slope in log p is 1 − ref/p."""
    log_p = tensor(log(0.5), log(0.5), log(0.5)).requires_grad_()
    found = k3(log_p, tensor(log(0.25), 0.0, log(0.5)))
    close(found, log(2) - 0.5, 1 - log(2), 0)
    found.sum().backward()
    close(log_p.grad, 0.5, -1, 0)


def test_advantages_by_hand():
    """Prompt 3: (1, 2, 6), mean 3, squares 4 + 1 + 9 over 2: std √7. Prompt 0: a tie, 0 exactly."""
    returns, prompts = tensor(1, 0.1, 2, 0.1, 6), torch.tensor([3, 0, 3, 0, 3])
    plain, tied = group_advantage(returns, prompts, std=False)
    close(plain, -2, 0, -1, 0, 3)
    assert tied.tolist() == [False, True, False, True, False] and plain[1] == 0
    divided, _ = group_advantage(returns, prompts, std=True)
    torch.testing.assert_close(divided, plain / 7**0.5, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="at least two samples of every prompt"):
        group_advantage(returns, torch.tensor([0, 0, 1, 1, 2]), std=True)


def test_a_float32_tie_has_no_advantage_at_all():
    """1000.1 thrice: the mean is off by its last bit, which a std as small would make an advantage of 0.8."""
    found, _ = group_advantage(torch.full((3,), 1000.1), torch.zeros(3, dtype=torch.int64), std=True)
    assert (found == 0).all()


# ---- every loss by hand -----------------------------------------------------------------------------------------


class Given(torch.nn.Module):
    """log p 's as they are told; two answers to one prompt, of 2 tokens and of 1."""

    def __init__(self, log_p: Tensor) -> None:
        super().__init__()
        self.log_p = torch.nn.Parameter(log_p)

    def log_prob(self, samples: Samples) -> Tensor:
        return torch.where(samples.mask, self.log_p[samples.tokens[:, 0]], 0.0)


def two_answers(**fields: Tensor) -> Samples:
    """Rewards 1 and 0: without std A = ±½, with it ±1/√2. q = 1/2 for every token, the reference too."""
    done = Tokens.of([[0, 0], [1]])
    half = log(0.5) * done.mask.double()
    known: dict[str, Tensor] = {"log_q": half, "log_ref": half, "reward": tensor(1, 0), **fields}
    return Samples(Tokens.of([[0]]), torch.tensor([0, 0]), done.ids, done.mask, **known)


RATIOS = torch.tensor([[1.5, 1.1], [0.9, 1.0]], dtype=torch.float64)
"""p/q of the two tokens of the first answer, and of the second's only one."""


def outcome(method: Any, **fields: Tensor) -> tuple[Any, Graded]:
    batch = method.prepare(two_answers(**fields))
    return method.loss(Given((RATIOS / 2).log()), batch), batch


BY_HAND = [
    # A = ½ (ρ cut at 1.2, and 1.1), mean of two; A = −½, ρ = 0.9. k3 = 1/ρ − 1 + ln ρ.
    (GRPO(2.0, std=False, truncate=None), "grpo"),
    (DrGRPO(2.0, kl="loss", constant=4.0), "dr-grpo"),
    (DAPO(2.0, std=False), "dapo"),
    (GSPO(2.0, std=False, clip_low=0.2, clip_high=0.25), "gspo"),
    (CISPO(2.0, std=False, clip_high=0.3), "cispo"),
]


def expected(name: str) -> tuple[list[float], list[float]]:
    """(losses, weights) worked out: the first row's step is −½·(…), the second's +½·0.9."""
    pull = [1 / ratio - 1 + log(ratio) for ratio in (1.5, 1.1, 0.9)]
    return {
        "grpo": ([-0.5 * (1.2 + 1.1) / 2 + 2 * (pull[0] + pull[1]) / 2, 0.45 + 2 * pull[2]], [1, 1]),
        "dr-grpo": ([-0.5 * (1.2 + 1.1) + 2 * (pull[0] + pull[1]), 0.45 + 2 * pull[2]], [4, 4]),
        "dapo": ([-0.5 * (1.28 + 1.1), 0.45], [2, 1]),
        "gspo": ([-0.5 * 1.25, 0.45], [1, 1]),  # √(1.5·1.1) = 1.2845 is cut
        "cispo": ([-0.5 * (1.3 * log(0.75) + 1.1 * log(0.55)), 0.5 * 0.9 * log(0.45)], [2, 1]),
    }[name]


@pytest.mark.filterwarnings("ignore:what draws and what is trained differ")
@pytest.mark.parametrize(("method", "name"), BY_HAND, ids=[name for _, name in BY_HAND])
def test_every_loss_by_hand(method, name):
    found, batch = outcome(method)
    losses, weights = expected(name)
    close(found.loss, *losses)
    assert method.weight(batch).tolist() == weights
    clipped = {"gspo": [1.0, 0.0]}.get(name, [0.5, 0.0])
    assert found.metrics["clipped"].tolist() == clipped
    assert found.metrics["length"].tolist() == [2, 1] and found.metrics["tied"].tolist() == [0, 0]
    close(found.metrics["ratio"], 1.65**0.5 if name == "gspo" else 1.3, 0.9)
    close(found.metrics["mismatch"], (log(1.5) + log(1.1)) / 2, -log(0.9))
    assert not any(metric.requires_grad for metric in found.metrics.values())


@pytest.mark.filterwarnings("ignore:what draws and what is trained differ")
def test_the_std_of_two_rewards_makes_them_one_over_root_two():
    """Rewards 1 and 0 or 5 and 0: A = ±1/√2, so the second row pays 0.9/√2."""
    for reward in (tensor(1, 0), tensor(5, 0)):
        found, _ = outcome(DAPO(), reward=reward)
        torch.testing.assert_close(found.loss[1], tensor(0.9 * 2**-0.5)[0], atol=1e-5, rtol=0)


def test_the_pull_in_the_reward_by_hand():
    """beta 2, log q − log ref = (½ + ½, 1): R = (1 − 2, 0 − 2), A = ±½; k3 is left out."""
    log_ref = two_answers().log_q - torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    batch = DrGRPO(2.0, kl="reward").prepare(two_answers(log_ref=log_ref))
    close(batch.advantage, 0.5, -0.5)
    far = two_answers(log_ref=log_ref * torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
    assert (
        DrGRPO(2.0, kl="reward").prepare(far).advantage[0] < 0 < DrGRPO(2.0, kl="none").prepare(far).advantage[0]
    )


def test_cispo_s_weight_carries_no_gradient_and_its_floor_is_a_setting():
    """ρ = ½, cap 1.3, floor 0.8: weights ½ and 0.8; d/d log p = −weight·A."""
    log_p = tensor(log(0.25)).requires_grad_()
    for low, weight in ((None, 0.5), (0.2, 0.8)):
        (slope,) = torch.autograd.grad(cispo_loss(log_p, log_p.exp() * 2, tensor(3), low, 0.3).sum(), log_p)
        close(slope, -3 * weight)


# ---- the first pass, and later ones -------------------------------------------------------------------------------


def live(method: Method, n: int = 4, **settings: Any) -> tuple[TableLM, Live]:
    w = world(eos_ids=(2,))
    policy = TableLM(2, 3, HORIZON, (2,))
    policy.load_state_dict(w.reference.state_dict())
    target = w.target()
    return policy, Live(policy, target.reward, PROMPTS, 2, HORIZON, ROOT, n, w.reference, **settings)


@pytest.mark.parametrize("method", ALL, ids=named)
def test_at_the_first_pass_ratios_are_one_and_nothing_is_clipped(method):
    policy, experience = live(method)
    batch = method.prepare(experience.batch(0))
    found = method.loss(policy, batch)
    assert (found.metrics["ratio"] == 1).all() and (found.metrics["clipped"] == 0).all()
    assert (found.metrics["mismatch"] == 0).all() and (found.metrics["kl"] == 0).all()
    if type(method) in (GRPO, GSPO):  # a mean over tokens of what is the same for all: Σ A = 0, and k3 = 0
        assert abs(float(found.loss.detach().sum())) < 1e-12


@pytest.mark.parametrize("method", ALL, ids=named)
def test_micro_batches_make_the_same_step_in_every_pass(method):
    """The first pass writes what it saw; later passes find it, rows in pieces or not, rows of another drawer or not."""
    found = []
    for micro in (0, 3):
        policy, experience = live(method)
        engine = Engine(policy, Optim(lr=0.05, micro_batch=micro))
        samples = experience.batch(0)
        other = samples.with_(log_q=torch.where(samples.mask, samples.log_q - 0.3, 0.0))
        metrics = engine.update(replace(method, truncate=2.0), other, passes=3)
        found.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
        assert metrics["mismatch"] == pytest.approx(0.3) and metrics["ratio"] != pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(*found, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", ALL, ids=named)
def test_rows_of_another_engine_are_weighed_and_the_weight_is_cut(method):
    """log q is 0.3 below log p: every weight is min(e^0.3, C), ratios are 1, the step that many times the policy's own."""
    policy, experience = live(method)
    samples = experience.batch(0)
    other = samples.with_(log_q=torch.where(samples.mask, samples.log_q - 0.3, 0.0))
    own = method.loss(policy, method.prepare(samples)).loss.detach()
    for cap, weight in ((2.0, math.exp(0.3)), (1.2, 1.2)):
        found = replace(method, truncate=cap).loss(policy, method.prepare(other))
        torch.testing.assert_close(found.loss.detach(), weight * own, atol=1e-10, rtol=0)
        assert (found.metrics["ratio"] == 1).all()


def test_a_mismatch_is_said_at_the_first_pass_alone():
    policy, experience = live(GRPO())
    samples = experience.batch(0)
    other = samples.with_(log_q=torch.where(samples.mask, samples.log_q - 2 * MISMATCH, 0.0))
    batch = GRPO(1.0).prepare(other)
    with pytest.warns(UserWarning, match="what draws and what is trained differ by more than 0.05 nats"):
        found = GRPO(1.0).loss(policy, batch)
    torch.testing.assert_close(found.metrics["mismatch"], torch.full((8,), 0.1, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRPO(1.0).loss(policy, batch)  # a later pass
        GRPO(1.0, truncate=2.0).loss(policy, GRPO(1.0).prepare(other))  # it is taken care of
        GRPO(1.0).loss(policy, GRPO(1.0).prepare(samples))


# ---- DAPO: tied groups ------------------------------------------------------------------------------------------


class Script:
    """Batches as told: rewards of each draw of a step, two rows a group, over `prompts` of five."""

    def __init__(self, *draws: tuple[list[int], list[list[float]]]) -> None:
        self.draws, self.prompts = draws, Tokens.of([[k] for k in range(5)])

    def batch(self, step: int, again: int = 0) -> Samples:
        asked, rewards = self.draws[min(again, len(self.draws) - 1)]
        index = torch.tensor(asked).repeat_interleave(2)
        ids = torch.full((len(index), 1), again)
        zero = torch.zeros(ids.shape)
        reward = torch.tensor(rewards).flatten()
        return Samples(
            self.prompts, index, ids, torch.ones_like(ids).bool(), log_q=zero, log_ref=zero, reward=reward
        )


TIED, TOLD = [1.0, 1.0], [0.0, 1.0]


def test_tied_groups_give_their_place_to_others():
    """Of prompts 0, 1, 2 the last two are tied. Again: 3 is tied, 0 is there already, 1 is taken. Again: 2 is tied, and of
    3 and 4 one is enough."""
    script = Script(
        ([0, 1, 2], [TOLD, TIED, TIED]), ([3, 0, 1], [TIED, TOLD, TOLD]), ([2, 4, 3], [TIED, TOLD, TOLD])
    )
    found = Untied(script, 10).batch(0)
    assert found.samples.prompt_index.tolist() == [0, 0, 1, 1, 3, 3]
    assert found.samples.tokens[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert (found.redraws, found.dropped) == (2, 4)
    metrics = DAPO().loss(zero_model(), DAPO().prepare(found)).metrics
    assert metrics["redraws"].tolist() == [2.0] * 6 and metrics["dropped"].tolist() == [4.0] * 6
    assert (metrics["tied"] == 0).all()


def test_a_batch_never_shrinks():
    """Nothing but ties, three tries: the first draw's groups fill it, and the metric says that they carry nothing."""
    found = Untied(Script(([0, 1, 2], [TOLD, TIED, TIED]), ([3, 4, 1], [TIED, TIED, TIED])), 3).batch(0)
    assert found.samples.prompt_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert (found.redraws, found.dropped) == (3, 9)
    prepared = DAPO().prepare(found)
    assert prepared.tied.tolist() == [False, False, True, True, True, True]
    assert (prepared.advantage[2:] == 0).all()


def test_without_ties_nothing_is_drawn_again():
    first = Script(([0, 1], [TOLD, TOLD]))
    found = Untied(first, 3).batch(0)
    assert found.redraws == found.dropped == 0
    assert torch.equal(found.samples.reward, first.batch(0).reward)


def zero_model() -> Any:
    class Zero(torch.nn.Module):
        def log_prob(self, samples: Samples) -> Tensor:
            return torch.zeros(samples.tokens.shape)

    return Zero()


def test_live_and_generated_rows_can_be_drawn_again_from_sub_streams():
    """again = 0 is the batch as it always was; 1 and 2 are others, each the same every time."""
    w = world()
    experience = Live(w.reference, w.target().reward, Tokens.of([[k % 2] for k in range(2)]), 1, HORIZON, ROOT, 6)
    made = Generated(lambda own: draw(w.reference, PROMPTS, n=6, max_new_tokens=HORIZON, stream=own), ROOT)
    for each in (experience, made):
        rows = [each.batch(3, again).tokens for again in (0, 1, 2)]
        assert torch.equal(rows[0], each.batch(3).tokens) and torch.equal(rows[1], each.batch(3, 1).tokens)
        assert not any(torch.equal(rows[a], rows[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_untied_batches_of_live_draws_on_the_world():
    """Binary rewards, two draws a prompt: many groups tie. After redraws none does, and the step is the same twice."""
    w = world(binary=True)
    prompts = Tokens.of([[0], [1]])
    experience = Live(w.reference, w.target().reward, prompts, 2, HORIZON, ROOT, 2)
    plain = [DAPO().prepare(experience.batch(step)).tied for step in range(20)]
    assert 0.1 < torch.cat(plain).double().mean() < 0.9
    for step in range(20):
        found = Untied(experience, 50).batch(step)
        assert len(found.samples) == 4 and not DAPO().prepare(found).tied.any()
        assert torch.equal(found.samples.tokens, Untied(experience, 50).batch(step).samples.tokens)


# ---- DAPO: overlong answers -------------------------------------------------------------------------------------


def test_the_soft_punishment_by_hand():
    """L = 10, a fifth of it: free up to 8, half at 9, all at 10 and beyond."""
    close(overlong_punishment(torch.tensor([1, 8, 9, 10, 12]), 10, 0.2), 0, 0, -0.5, -1, -1)


def test_overlong_answers_are_kept_masked_or_punished():
    """Answers of 2 and 1 tokens, the longest 2, all of it margin: −1 and −½, so R = (0, −½), A = ±¼ instead of ±½."""
    cut = two_answers(finished=torch.tensor([False, True]))
    base = DAPO(std=False)
    close(replace(base, overlong="punish", longest=2, margin=1.0).prepare(cut).advantage, 0.25, -0.25)
    close(base.prepare(cut).advantage, 0.5, -0.5)
    model = Given(torch.full((2, 2), log(0.5), dtype=torch.float64))
    masked = replace(base, overlong="mask")
    assert masked.loss(model, masked.prepare(cut)).loss.tolist() == [0.0, 0.5]
    assert base.loss(model, base.prepare(cut)).loss.tolist() == [-1.0, 0.5]
    assert masked.weight(masked.prepare(cut)).tolist() == [2, 1]
    with pytest.raises(ValueError, match="set longest, in tokens"):
        replace(base, overlong="punish").prepare(cut)


# ---- learning, and mistakes -------------------------------------------------------------------------------------


def test_dr_grpo_with_the_pull_in_the_reward_learns_pi_star_and_grpo_does_not():
    """Two prompts, one token each, 32 draws a prompt: 300 steps; distances by enumeration."""
    reference = TableLM(2, 3, 1).randomise(torch.Generator().manual_seed(5)).requires_grad_(False)
    reward = torch.tensor([[0.0, 0.3, 1.0], [1.0, 0.5, -0.4]], dtype=torch.float64)
    target = Target(reference, lambda samples: reward[samples.prompt_index, samples.tokens[:, 0]], 0.3)
    p_star = (reference.tables[0][:, 0].log_softmax(1) + reward / 0.3).softmax(1)
    distance = {}
    for method in (DrGRPO(0.3, kl="reward"), GRPO(0.3, std=False)):
        policy = TableLM(2, 3, 1)
        policy.load_state_dict(reference.state_dict())
        engine = Engine(policy, Optim(lr=0.05))
        experience = Live(policy, target.reward, PROMPTS, 2, 1, ROOT, 32, reference)
        for step in range(300):
            engine.update(method, experience.batch(step), lr_factor=1 - step / 300)
        distance[named(method)] = float((policy.tables[0][:, 0].softmax(1) - p_star).abs().max().detach())
    assert distance["DrGRPO"] < 0.02 < 0.05 < distance["GRPO"]


def test_mistakes_are_named():
    for make in (GRPO, DrGRPO, DAPO, GSPO, CISPO):
        for bad, said in (
            ({"beta": 0.0}, "beta must be positive"), ({"kl": "both"}, "kl is where the pull goes"),
            ({"passes": 0}, "passes must be positive"), ({"truncate": 0.0}, "truncate must be positive"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=said):
                make(**bad)
    for bad, said in (
        ({"overlong": "cut"}, "overlong is keep"),
        ({"margin": 0.0}, "margin"),
        ({"redraws": -1}, "redraws"),
    ):
        with pytest.raises(ValueError, match=said):
            DAPO(**bad)
    with pytest.raises(ValueError, match="need reward and log_q"):
        GRPO(1.0).prepare(two_answers().with_(log_q=None))
    with pytest.raises(ValueError, match="needs log_ref of every row"):
        GRPO(1.0).prepare(two_answers().with_(log_ref=None))
    with pytest.raises(ValueError, match="score them first"):
        Untied(Generated(lambda own: two_answers().with_(reward=None), ROOT), 1).batch(0)
    assert isinstance(Untied(Generated(lambda own: two_answers(), ROOT), 1).batch(0), Redrawn)
