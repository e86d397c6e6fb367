"""Losses on groups and pairs: one value by hand each, the EXO paper's gradients and links, and what must not matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor

from close import NETWORK
from close import close as near
from families import build
from tiltlm.experience import Offline
from tiltlm.groups import Groups, all_pairs, as_groups, best_and_worst
from tiltlm.models.table import TableLM
from tiltlm.policies.apo import APO, apo_loss
from tiltlm.policies.cdpo import CDPO, cdpo_loss
from tiltlm.policies.dpo import dpo_loss
from tiltlm.policies.dpo_rw import DpoRw, dpo_rw_loss
from tiltlm.policies.exo_pref import ExoPref, exo_pref_loss
from tiltlm.policies.exo_rw import ExoRw, exo_rw_loss, group_metrics
from tiltlm.policies.hinge import Hinge, hinge_loss
from tiltlm.policies.ipo import IPO, ipo_loss
from tiltlm.policies.kto import KTO, Judged, JudgedAnswers, kto_loss, reference_point
from tiltlm.policies.orpo import ORPO, orpo_loss
from tiltlm.policies.robust_dpo import RobustDPO, robust_dpo_loss
from tiltlm.policies.simpo import SimPO, simpo_loss
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream


def tensor(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def close(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got.detach().double(), tensor(*expected).reshape(got.shape), atol=1e-10, rtol=0)


# ---- by hand ------------------------------------------------------------------------------------------------


def test_exo_rw_by_hand():
    """q = softmax(½·(2 ln 3, 0)) = (3/4, 1/4); p = softmax((0, ½ ln 3)/½) = (1/4, 3/4): ¾ ln 3 − ¼ ln 3 = ½ ln 3."""
    close(exo_rw_loss(tensor(2 * log(3), 0)[None], tensor(0, 0.5 * log(3))[None], 0.5, 0.5), 0.5 * log(3))


def test_exo_rw_is_the_reverse_kl_not_the_forward_one():
    """q = (3/4, 1/4), p = (1/2, 1/2): KL(q‖p) = ¾ ln 3/2 + ¼ ln 1/2; KL(p‖q) = ½ ln 2/3 + ½ ln 2 = ½ ln 4/3."""
    h, r = tensor(log(3), 0)[None], tensor(0, 0)[None]
    close(exo_rw_loss(h, r, 1.0, 1.0), 0.75 * log(1.5) + 0.25 * log(0.5))
    close(dpo_rw_loss(h, r, 1.0, 1.0) - log(2), 0.5 * log(4 / 3))


def test_dpo_rw_by_hand():
    """The same q and p: −¼ ln 3/4 − ¾ ln 1/4 = 2 ln 2 − ¼ ln 3."""
    close(
        dpo_rw_loss(tensor(2 * log(3), 0)[None], tensor(0, 0.5 * log(3))[None], 0.5, 0.5), 2 * log(2) - log(3) / 4
    )


def test_exo_pref_by_hand():
    """beta 2, h = (½ ln 3, 0): q = 3/4; eps = 1/4: KL((3/4, 1/4)‖(3/4, 1/4)) = 0; the pair turned over: ½ ln 3."""
    close(exo_pref_loss(tensor(0.5 * log(3), 0), tensor(0, 0.5 * log(3)), 2.0, 0.25), 0, 0.5 * log(3))


def test_cdpo_by_hand():
    """σ(z) = 3/4, eps = 1/4: −¾ ln 3/4 − ¼ ln 1/4 = 2 ln 2 − ¾ ln 3."""
    close(cdpo_loss(tensor(log(3)), tensor(0), 1.0, 0.25), 2 * log(2) - 0.75 * log(3))


def test_robust_dpo_by_hand():
    """σ(z) = 3/4, eps = 1/4: (−¾ ln 3/4 + ¼ ln 1/4)·2 = 2 ln 2 − 3/2 ln 3; it is negative."""
    close(robust_dpo_loss(tensor(log(3)), tensor(0), 1.0, 0.25), 2 * log(2) - 1.5 * log(3))


def test_ipo_by_hand():
    """beta 0.1 asks for a margin of 5: (2 − 5)² = 9, and the pair turned over (−2 − 5)² = 49."""
    close(ipo_loss(tensor(3, 1), tensor(1, 3), 0.1), 9, 49)


def test_hinge_by_hand():
    """beta 1/2: margins 1, −1 and 3: 0.5 and 1.5 short of one, and past it."""
    close(hinge_loss(tensor(1, 0, 3), tensor(0, 1, 0), 0.5), 0.5, 1.5, 0)


def test_apo_by_hand():
    """σ(ln 3) = 3/4, σ(0) = 1/2. zero: 1 − 3/4 + 1/2; down: 3/4 + 1 − 3/4. Both sides moved by hand once more."""
    close(apo_loss(tensor(log(3)), tensor(0), 1.0, "zero"), 0.75)
    close(apo_loss(tensor(log(3)), tensor(0), 1.0, "down"), 1.0)
    close(apo_loss(tensor(0), tensor(log(3)), 1.0, "zero"), 1.25)
    close(apo_loss(tensor(0), tensor(log(3)), 1.0, "down"), 0.5 + 1 - 0.25)


def test_simpo_by_hand():
    """2·(−1 + 2) − 1 = 1: −ln σ(1) = ln(1 + 1/e)."""
    close(simpo_loss(tensor(-1), tensor(-2), 2.0, 1.0), math.log1p(math.exp(-1)))


def test_orpo_by_hand():
    """Mean probabilities 3/4 and 1/2: odds 3 and 1; ln 4/3 − 2·ln 3/4 = 3·ln 4/3."""
    close(orpo_loss(tensor(log(0.75)), tensor(log(0.5)), 2.0), 3 * log(4 / 3))


def test_kto_by_hand():
    """h − z0 = ±ln 3: good and ahead 1·¼, bad and ahead 2·¾; good and behind 1·¾, bad and behind 2·¼."""
    h, good = tensor(log(3), log(3), -log(3), -log(3)) + 1, torch.tensor([True, False, True, False])
    close(kto_loss(h, good, tensor(1, 1, 1, 1), 1.0, 1.0, 2.0), 0.25, 1.5, 0.75, 0.5)


def test_losses_where_the_policy_is_the_reference():
    """h = 0: the values of the paper's appendix by its own formulas, eps = 1e-3 and σ(−10)."""
    zero, r = torch.zeros(1, 4, dtype=torch.float64), tensor(0.3, -1.0, 2.0, 0.0)[None]
    close(exo_rw_loss(zero, r, 0.5, 0.5), -log(4) - (r / 0.5).log_softmax(1).mean().item())
    close(dpo_rw_loss(zero, r, 0.5, 0.5), log(4))
    close(cdpo_loss(tensor(0), tensor(0), 0.1, 0.3), log(2))
    for epsilon, rounded in ((1e-3, 2.761), (1 / (1 + math.exp(10)), 4.307)):
        got = exo_pref_loss(tensor(0), tensor(0), 0.5, epsilon)
        close(got, -log(2) - 0.5 * math.log1p(-epsilon) - 0.5 * log(epsilon))
        assert round(got.item(), 3) == rounded


# ---- gradients and links ------------------------------------------------------------------------------------


def random_group(k: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    return tuple(torch.randn(3, k, dtype=torch.float64, generator=generator) for _ in range(2))


def gradient(loss: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    h = h.clone().requires_grad_(True)
    return torch.autograd.grad(loss(h).sum(), h)[0]


def test_gradients_are_those_of_the_paper():
    """∂L/∂z: q_i[(log q_i − log p_i) − L] and q_i − p_i, summing to 0; of exo-pref q(1 − q)(z − c); of DPO −σ(−z)."""
    h, r = random_group()
    q, p = (0.7 * h).softmax(1), (r / 0.3).softmax(1)
    reverse = gradient(lambda x: exo_rw_loss(x, r, 0.3, 0.7), h) / 0.7
    forward = gradient(lambda x: dpo_rw_loss(x, r, 0.3, 0.7), h) / 0.7
    by_hand = q * ((q.log() - p.log()) - exo_rw_loss(h, r, 0.3, 0.7)[:, None])
    torch.testing.assert_close(reverse, by_hand, atol=1e-12, rtol=0)
    torch.testing.assert_close(forward, q - p, atol=1e-12, rtol=0)
    for each in (reverse, forward):
        assert each.sum(1).abs().max() < 1e-12
    z, nothing = tensor(-2, 0.5, 9), tensor(0, 0, 0)
    s = z.sigmoid()
    got = gradient(lambda x: exo_pref_loss(x, nothing, 1.0, 0.01), z)
    torch.testing.assert_close(got, s * (1 - s) * (z - log(99)), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient(lambda x: dpo_loss(x, nothing, 1.0), z), -(-z).sigmoid())


def test_links_between_the_losses():
    """exo-rw on the rewards beta_r·(log(1 − eps), log eps) is exo-pref; dpo-rw on a one-hot p is DPO, on (1 − eps, eps)
    cDPO."""
    h = random_group(2)[0]
    labels = 0.3 * tensor(log(0.9), log(0.1)).expand(3, 2)
    both = h[:, 0], h[:, 1]
    torch.testing.assert_close(exo_rw_loss(h, labels, 0.3, 0.7), exo_pref_loss(*both, 0.7, 0.1))
    torch.testing.assert_close(dpo_rw_loss(h, labels, 0.3, 0.7), cdpo_loss(*both, 0.7, 0.1))
    hard = tensor(1e6, 0).expand(3, 2)
    torch.testing.assert_close(dpo_rw_loss(h, hard, 0.3, 0.7), dpo_loss(*both, 0.7))


@pytest.mark.parametrize("loss", [exo_rw_loss, dpo_rw_loss])
def test_what_does_not_matter_in_a_group(loss):
    """A shift of all rewards, or of all log-ratios; the order of rows; r and beta_r scaled together. beta_r alone does."""
    h, r = random_group()
    plain, order = loss(h, r, 0.5, 0.7), torch.tensor([3, 1, 4, 0, 2])
    for same in (
        loss(h + 3, r, 0.5, 0.7), loss(h, r - 7, 0.5, 0.7), loss(h[:, order], r[:, order], 0.5, 0.7),
        loss(h, 10 * r, 5.0, 0.7),
    ):  # fmt: skip
        torch.testing.assert_close(same, plain, atol=1e-12, rtol=0)
    assert (loss(h, r, 1.0, 0.7) - plain).abs().min() > 1e-3


def test_huge_rewards_and_ratios_give_finite_losses():
    h, r = tensor(1e4, -1e4, 0)[None], tensor(-1e4, 1e4, 0)[None]
    for loss in (exo_rw_loss(h, r, 0.5, 0.5), dpo_rw_loss(h, r, 0.5, 0.5)):
        assert torch.isfinite(loss).all() and loss > 1e3
    close(exo_rw_loss(h, -r, 0.5, 0.5), 0)


def test_group_metrics_by_hand():
    """h = (2 ln 3, 0), beta_pi = ½: q = (3/4, 1/4), entropy 2 ln 2 − ¾ ln 3; the second row is the better one."""
    found = group_metrics(tensor(2 * log(3), 0)[None], tensor(0, 0.5 * log(3))[None], 0.5, 0.5)
    close(found["gap"], 0.5 * log(3))
    close(found["h"], log(3))
    close(found["entropy"], 2 * log(2) - 0.75 * log(3))
    close(found["ranking"], 0)
    close(found["peaked"], 0)
    tied = group_metrics(torch.zeros(1, 4), torch.tensor([[1.0, 0, 0, 1]]), 0.5, 0.5)
    close(tied["ranking"], 0.5)
    peaked = group_metrics(torch.tensor([[20.0, 0]]), torch.tensor([[1.0, 0]]), 0.5, 0.5)
    close(peaked["peaked"], 1)


# ---- with models --------------------------------------------------------------------------------------------


def drawn_groups(seed: int = 0) -> Groups:
    """Two prompts, three ragged answers each, under a small GPT-2's log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [4, 1, 2, 3, 3, 1]
    rows = [torch.randint(1, 11, (n,), generator=generator).tolist() for n in lengths]
    done = Tokens.of(rows)
    reward = torch.tensor([0.5, -1.0, 2.0, 0.0, 0.0, 1.0])
    samples = Samples(
        Tokens.of([[3, 5, 7], [2]]), torch.tensor([0, 0, 0, 1, 1, 1]), done.ids, done.mask, reward=reward
    )
    with torch.no_grad():
        return Groups(samples.with_(log_ref=build("gpt2", torch.float64, seed=1).log_prob(samples)), 3)


def token_by_token(model, groups: Groups) -> Tensor:
    """h of every row, one forward pass per token and no padding."""
    found = []
    for prompt, row in zip(groups.samples.row_prompts.lists(), groups.samples.completions.lists(), strict=True):
        total = 0.0
        for t in range(len(row)):
            state = model.start(Tokens.of([prompt + row[:t]]), 1)
            total += state.log_next()[0, row[t]].item()
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.kernels
@torch.no_grad()
def test_log_ratios_equal_a_loop_over_tokens_and_vanish_for_the_reference():
    groups = drawn_groups()
    policy, reference = (build("gpt2", torch.float64, seed=seed) for seed in (0, 1))
    h = ExoRw(0.5).loss(policy, groups).metrics["h"]
    loop = (token_by_token(policy, groups) - token_by_token(reference, groups)).reshape(2, 3).mean(1)
    near(h.double(), loop, NETWORK)
    assert ExoRw(0.5).loss(reference, groups).metrics["h"].abs().max() < NETWORK
    assert h.abs().min() > 1e-3


PAIR_METHODS = [
    ExoPref(0.5), CDPO(0.1), RobustDPO(0.1), IPO(0.1), IPO(0.1, normalise="mean"), Hinge(0.1), APO(0.1),
    APO(0.1, anchor="down"), SimPO(), ORPO(),
]  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize("objective", [ExoRw(0.5), DpoRw(0.5), *PAIR_METHODS], ids=lambda x: repr(x))
def test_a_row_s_loss_depends_on_its_group_alone(objective):
    """Batch mates, padding and micro-batches: row by row, in parts, and all at once give the same losses."""
    groups, policy = drawn_groups(), build("gpt2", torch.float64)
    batch = groups if isinstance(objective, ExoRw | DpoRw) else all_pairs(groups)[0]
    with torch.no_grad():
        whole = objective.loss(policy, batch)
        ones = [objective.loss(policy, batch.select(torch.tensor([k]))).loss for k in range(len(batch))]
    near(torch.cat(ones), whole.loss, NETWORK)
    assert whole.loss.std() > 1e-3
    assert all(x.shape == whole.loss.shape and not x.requires_grad for x in whole.metrics.values())


@pytest.mark.parametrize("objective", PAIR_METHODS, ids=lambda x: repr(x))
def test_turning_a_pair_over_changes_its_loss(objective):
    pairs = best_and_worst(drawn_groups())[0]
    policy = build("gpt2")
    with torch.no_grad():
        plain, turned = (
            objective.loss(policy, each).loss for each in (pairs, Pairs(pairs.rejected, pairs.chosen))
        )
    assert (plain - turned).abs().min() > 1e-4


@pytest.mark.kernels
def test_micro_batches_of_a_group_method_give_the_same_update():
    """16 groups as 1 × 16, 4 × 4 and 16 × 1: the same loss and gradient."""
    from tiltlm.engine import Engine, Optim

    groups = drawn_groups()
    sixteen = groups.select(torch.tensor([0, 1] * 8))
    found = []
    for size in (0, 4, 1):
        model = build("gpt2", torch.float64)
        metrics = Engine(model, Optim(micro_batch=size)).update(ExoRw(0.5), sixteen)
        found.append((metrics["loss"], torch.cat([p.grad.flatten() for p in model.parameters()])))
    for loss, slope in found[1:]:
        assert abs(loss - found[0][0]) < NETWORK
        near(slope, found[0][1], NETWORK)
    assert found[0][1].norm() > 0.05


# ---- KTO ----------------------------------------------------------------------------------------------------


def one_token(*rows: tuple[int, int], reward: Tensor | None = None) -> Samples:
    """(prompt, token) rows over two prompts and two tokens, the reference uniform."""
    ids = torch.tensor([token for _, token in rows])[:, None]
    index = torch.tensor([prompt for prompt, _ in rows])
    log_ref = torch.full(ids.shape, log(0.5), dtype=torch.float64)
    prompts = Tokens.of([[0], [1]])
    return Samples(prompts, index, ids, torch.ones_like(ids, dtype=torch.bool), log_ref=log_ref, reward=reward)


def two_prompts() -> TableLM:
    """(4/5, 1/5) after prompt 0 and (1/2, 1/2) after prompt 1."""
    table = TableLM(2, 2, 1)
    table.tables[0].data[:, 0] = torch.tensor([[0.8, 0.2], [0.5, 0.5]], dtype=torch.float64).log()
    return table


def test_the_reference_point_by_hand():
    """Prompt 0 with prompt 1's answers (0, 0): ln 8/5 each; prompt 1 with prompt 0's: 0. Mean over four: ½ ln 8/5."""
    samples = one_token((0, 1), (1, 0), (0, 1), (1, 0))
    close(reference_point(two_prompts(), TableLM(2, 2, 1), samples), 0.5 * log(1.6))


def test_the_reference_point_is_not_negative():
    """With answers (1, 1) instead: ½ ln 2/5 < 0, cut at 0."""
    assert reference_point(two_prompts(), TableLM(2, 2, 1), one_token((0, 1), (1, 1))).item() == 0


def test_kto_s_experience_fills_in_verdicts_and_the_reference_point():
    samples = one_token((0, 1), (1, 0), reward=tensor(1, 0))
    batch = JudgedAnswers(Offline(samples, 2, stream(0)), two_prompts(), TableLM(2, 2, 1)).batch(0)
    assert sorted(batch.good.tolist()) == [False, True]
    close(batch.z0, *[0.5 * log(1.6)] * 2)
    outcome = KTO(beta=1.0).loss(two_prompts(), batch)
    assert batch.select(slice(0, 1)).z0.shape == (1,)
    h = log(0.4) * (batch.samples.prompt_index == 0).double()
    close(outcome.loss, *kto_loss(h, batch.good, batch.z0, 1.0, 1.0, 1.0).tolist())


def test_kto_refuses_answers_to_one_prompt_and_answers_without_a_verdict():
    with pytest.raises(ValueError, match="two prompts or more"):
        reference_point(two_prompts(), TableLM(2, 2, 1), one_token((0, 0), (0, 1)))
    with pytest.raises(ValueError, match="no reward"):
        JudgedAnswers(Offline(one_token((0, 0), (1, 1)), 2, stream(0)), two_prompts(), TableLM(2, 2, 1)).batch(0)
    bare = one_token((0, 0), (1, 1)).with_(log_ref=None)
    with pytest.raises(ValueError, match="no log_ref"):
        KTO(0.1).loss(two_prompts(), Judged(bare, torch.tensor([True, False]), tensor(0, 0)))


# ---- groups -------------------------------------------------------------------------------------------------


def test_groups_keep_their_rows_together():
    groups = drawn_groups()
    assert len(groups) == 2 and groups.reward.tolist() == [[0.5, -1.0, 2.0], [0.0, 0.0, 1.0]]
    second = groups.select(torch.tensor([1]))
    assert second.samples.tokens.tolist() == groups.samples.tokens[3:].tolist()
    with pytest.raises(ValueError, match="group 1 answers"):
        Groups(groups.samples, 2)
    with pytest.raises(ValueError, match="groups of 4"):
        Groups(groups.samples, 4)


def test_subsets_are_drawn_anew_without_repeats_and_evenly():
    """Each of 3 rows is left out a third of the time (600 drawings: within 4 standard errors); the same from one
    stream."""
    groups = drawn_groups()
    counts = torch.zeros(3)
    for step in range(600):
        subset = groups.subsets(2, stream(0, step))
        rows = [groups.samples.reward[:3].tolist().index(r) for r in subset.reward[0].tolist()]
        assert len(set(rows)) == 2
        counts[rows] += 1
    assert (counts / 600 - 2 / 3).abs().max() < 4 * math.sqrt(2 / 9 / 600)
    again = [groups.subsets(2, stream(0, 5)).samples.tokens for _ in range(2)]
    assert torch.equal(*again)
    assert groups.subsets(3, stream(0)) is groups
    with pytest.raises(ValueError, match="2 to 3 rows"):
        groups.subsets(4, stream(0))


def test_pairs_of_groups_by_hand():
    """Rewards (0.5, −1, 2 | 0, 0, 1): best over worst; of all six pairs one ties."""
    groups = drawn_groups()
    pairs, ties = best_and_worst(groups)
    assert ties == 0
    assert (pairs.chosen.reward.tolist(), pairs.rejected.reward.tolist()) == ([2, 1], [-1, 0])
    pairs, ties = all_pairs(groups)
    assert ties == 1
    assert pairs.chosen.reward.tolist() == [0.5, 2, 2, 1, 1]
    assert pairs.rejected.reward.tolist() == [-1, 0.5, -1, 0, 0]
    even = Groups(groups.samples.with_(reward=torch.zeros(6)), 3)
    assert [len(best_and_worst(even)[0]), best_and_worst(even)[1], all_pairs(even)[1]] == [0, 2, 6]


def test_pairs_become_groups_of_rewards_one_and_zero():
    pairs = best_and_worst(drawn_groups())[0]
    groups = as_groups(pairs)
    assert groups.reward.tolist() == [[1, 0], [1, 0]]
    assert groups.samples.completions.lists()[::2] == pairs.chosen.completions.lists()
    again = all_pairs(groups)[0]
    assert again.rejected.completions.lists() == pairs.rejected.completions.lists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExoRw(beta_r=0.0), "beta_r must be positive"),
        (lambda: DpoRw(beta_pi=-1.0), "beta_pi must be positive"),
        (lambda: ExoPref(epsilon=0.0), "epsilon must lie between"),
        (lambda: ExoPref(epsilon=0.5), "epsilon must lie between"),
        (lambda: RobustDPO(epsilon=0.5), "epsilon must lie between"),
        (lambda: CDPO(beta=math.nan), "beta must be positive"),
        (lambda: SimPO(gamma=-1.0), "gamma must not be negative"),
        (lambda: ORPO(alpha=-1.0), "alpha must not be negative"),
        (lambda: KTO(w_bad=0.0), "w_bad must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("objective", [ExoRw(0.5), DpoRw(0.5)])
def test_groups_without_reference_or_reward_are_refused(objective):
    groups = drawn_groups()
    with pytest.raises(ValueError, match="no log_ref"):
        objective.loss(build("gpt2"), Groups(groups.samples.with_(log_ref=None), 3))
    with pytest.raises(ValueError, match="no reward"):
        objective.loss(build("gpt2"), Groups(groups.samples.with_(reward=None), 3))
