"""One value by hand for every loss and every rule: laws cannot see a KL's direction, or signs that cancel.

Two tables of one step and two tokens serve throughout: the policy says (4/5, 1/5), the reference (1/2, 1/2), so
h(0) = ln 8/5 and h(1) = ln 2/5.
"""

from __future__ import annotations

import math
from math import log

import pytest
import torch
from torch import Tensor

from close import NETWORK
from close import close as near
from families import build
from tiltlm.models.causal import copy_of
from tiltlm.models.table import TableLM, TableValues
from tiltlm.policies.dpo import DPO, dpo_loss
from tiltlm.policies.reinforce import Reinforce, leave_one_out, reinforce_loss
from tiltlm.policies.rpo import RPO, rpo_loss
from tiltlm.policies.sft import SFT, sft_loss
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.twists.cd import CD
from tiltlm.twists.fudge import Fudge
from tiltlm.twists.q_sharp import QSharp
from tiltlm.twists.value import ValueLearning, log_pmf, nearest_atom, value_loss

HALF = math.log(0.5)


def tensor(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def close(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got.detach().double(), tensor(*expected).reshape(got.shape), atol=1e-10, rtol=0)


def policy() -> TableLM:
    """One prompt, one step: (4/5, 1/5)."""
    table = TableLM(1, 2, 1)
    table.tables[0].data[0, 0] = tensor(0.8, 0.2).log()
    return table


def said(*tokens: int, **fields: Tensor) -> Samples:
    """One-token completions of the one prompt, the reference's log-probability ln 1/2 on each."""
    ids = torch.tensor(tokens)[:, None]
    known = {"log_ref": torch.full(ids.shape, HALF, dtype=torch.float64), **fields}
    index = torch.zeros(len(tokens), dtype=torch.int64)
    return Samples(Tokens.of([[0]]), index, ids, torch.ones_like(ids, dtype=torch.bool), **known)


# ---- SFT ----------------------------------------------------------------------------------------------------


def test_sft_by_hand():
    """−(ln 1/2 + ln 1/4) = ln 8; −ln 1/10 = ln 10, padding adding nothing."""
    close(sft_loss(torch.stack([tensor(log(0.5), log(0.25)), tensor(log(0.1), 0.0)])), log(8), log(10))


def test_sft_s_objective_by_hand():
    """Tokens 0 and 1 under (4/5, 1/5): ln 5/4 and ln 5; each row counts as many tokens as it has."""
    outcome = SFT(watch_positions=True).loss(policy(), said(0, 1))
    close(outcome.loss, log(1.25), log(5))
    close(outcome.metrics["nll/1"], log(1.25), log(5))
    assert not outcome.metrics["nll/1"].requires_grad
    ragged = Samples(Tokens.of([[0]]), torch.tensor([0, 0]), *_ragged([[1, 1, 0], [0]]))
    assert SFT().weight(ragged).tolist() == [3, 1]


def test_sft_s_loss_per_token_and_per_position():
    """Uniform over two tokens, rows of 3 and 1: ln 8 and ln 2, ln 2 a token; padding is NaN."""
    ragged = Samples(Tokens.of([[0]]), torch.tensor([0, 0]), *_ragged([[1, 1, 0], [0]]))
    outcome = SFT(watch_positions=True).loss(TableLM(1, 2, 3), ragged)
    close(outcome.loss, log(8), log(2))
    close(outcome.metrics["nll_per_token"], log(2), log(2))
    assert outcome.metrics["nll/3"].isnan().tolist() == [False, True]


def _ragged(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    done = Tokens.of(rows)
    return done.ids, done.mask


# ---- DPO, RPO -----------------------------------------------------------------------------------------------


def test_dpo_by_hand():
    """h_c = 3, h_r = 1, beta = 1/2: margin 1, −ln σ(1) = ln(1 + 1/e); the other way round 1 more."""
    close(dpo_loss(tensor(3, 1), tensor(1, 3), 0.5), log(1 + math.exp(-1)), 1 + log(1 + math.exp(-1)))


def test_dpo_s_objective_by_hand():
    """Chosen 0, rejected 1: h_c − h_r = ln 8/5 − ln 2/5 = ln 4; beta = 1/2 makes ln 2; −ln σ(ln 2) = ln 3/2.

    The reference must be subtracted: with log_ref = (ln 4/5, ln 1/5) the margin is 0 and the loss ln 2.
    """
    outcome = DPO(beta=0.5).loss(policy(), Pairs(said(0), said(1)))
    close(outcome.loss, log(1.5))
    close(outcome.metrics["reward_chosen"], 0.5 * log(1.6))
    close(outcome.metrics["reward_rejected"], 0.5 * log(0.4))
    close(outcome.metrics["margin"], log(2))
    assert outcome.metrics["reward_accuracy"].tolist() == [1.0]
    own = Pairs(said(0, log_ref=tensor(0.8).log()[:, None]), said(1, log_ref=tensor(0.2).log()[:, None]))
    close(DPO(beta=0.5).loss(policy(), own).loss, log(2))


def test_dpo_s_gradient_by_hand():
    """d/dh_c = −beta·σ(−margin): beta = 1/2, margin ln 2 → −1/2 · 1/3."""
    h = tensor(log(4)).requires_grad_()
    dpo_loss(h, tensor(0), 0.5).sum().backward()
    close(h.grad, -1 / 6)


@pytest.mark.kernels
@torch.no_grad()
def test_dpo_at_the_reference_is_ln_2_exactly():
    """Same network, ragged rows, any beta; a tie counts as half right."""
    model = build("gpt2", torch.float64)
    pairs = network_pairs(lambda samples: model.log_prob(samples))
    for beta in (0.1, 2.0):
        outcome = DPO(beta).loss(copy_of(model), pairs)
        near(outcome.loss, tensor(log(2)).expand(3), NETWORK)
    still = [x.with_(log_ref=torch.zeros_like(x.log_ref)) for x in (pairs.chosen, pairs.rejected)]
    assert (DPO(0.1).loss(model, Pairs(*still)).loss - log(2)).abs().min() > 1e-3
    table = DPO(0.7).loss(policy(), Pairs(said(0), said(0)))
    assert table.loss.tolist() == [log(2)] and table.metrics["reward_accuracy"].tolist() == [0.5]


def network_pairs(log_prob) -> Pairs:
    """Three ragged pairs for a network of the family tests, with log_ref from `log_prob`."""
    prompts, index = Tokens.of([[3, 5, 7], [2]]), torch.tensor([0, 1, 1])
    done = [Tokens.of([[1, 2, 3, 4], [5, 6], [7]]), Tokens.of([[8], [9, 10, 11], [12, 13]])]
    sides = [Samples(prompts, index, x.ids, x.mask) for x in done]
    return Pairs(*[side.with_(log_ref=log_prob(side).detach()) for side in sides])


def test_dpo_does_not_overflow_where_the_margin_is_huge():
    """−ln σ(∓1000): 1000 and 0, never inf or NaN."""
    close(dpo_loss(tensor(-1000, 1000), tensor(0, 0), 1.0), 1000, 0)


@pytest.mark.kernels
@torch.no_grad()
def test_rpo_is_dpo_minus_the_chosen_answer_s_log_probability():
    """Summed over tokens by default; divided by the answer's own length under `mean`; alpha times it."""
    model, reference = build("gpt2", torch.float64), build("gpt2", torch.float64, seed=1)
    pairs = network_pairs(lambda samples: reference.log_prob(samples))
    dpo, log_p = DPO(0.1).loss(model, pairs).loss, model.log_prob(pairs.chosen)
    gap = RPO(0.1).loss(model, pairs).loss - dpo
    near(gap, -log_p.sum(1), NETWORK)
    mean = RPO(0.1, alpha=0.5, normalise="mean").loss(model, pairs).loss - dpo
    near(mean, -0.5 * log_p.sum(1) / torch.tensor([4, 2, 1]), NETWORK)


def test_rpo_by_hand():
    """ln 3/2 (the DPO above) − 2·ln 4/5."""
    close(RPO(beta=0.5, alpha=2.0).loss(policy(), Pairs(said(0), said(1))).loss, log(1.5) - 2 * log(0.8))
    close(rpo_loss(tensor(0), tensor(0), tensor(-3), 0.5, 2.0), log(2) + 6)


@pytest.mark.parametrize("method", [DPO(0.1), RPO(0.1)])
def test_pairs_without_a_reference_are_refused(method):
    bare = said(0, log_ref=None)
    with pytest.raises(ValueError, match="no log_ref: score them with the reference first"):
        method.loss(policy(), Pairs(bare, said(1)))


# ---- REINFORCE ----------------------------------------------------------------------------------------------


def test_reinforce_by_hand():
    """−A·ln p: A = 2 on p = 1/2 → 2 ln 2; A = −1 on p = 1/4 → −ln 4: better than expected pushes up."""
    close(reinforce_loss(tensor(0.5, 0.25).log(), tensor(2, -1)), 2 * log(2), -log(4))


def test_reinforce_s_objective_by_hand():
    """r = (1, 0), batch mean 1/2: A = ±1/2; losses ½·ln 5/4 and −½·ln 5."""
    batch = said(0, 1, reward=tensor(1, 0))
    objective = Reinforce()
    prepared = objective.prepare(batch)
    close(prepared.advantage, 0.5, -0.5)
    close(objective.loss(policy(), prepared).loss, 0.5 * log(1.25), -0.5 * log(5))


def test_the_pull_towards_the_reference_by_hand():
    """R = r − beta·(log q − log ref), beta = 1/2, q = policy: 1 − ½ ln 8/5 and 0 − ½ ln 2/5 = ½ ln 5/2."""
    batch = said(0, 1, reward=tensor(1, 0), log_q=tensor(0.8, 0.2).log()[:, None])
    close(Reinforce("none", beta=0.5).prepare(batch).advantage, 1 - 0.5 * log(1.6), 0.5 * log(2.5))


def test_baselines_by_hand():
    """R = (4, 1, 7 | 2, 6) over two prompts: mean 4; the others' means are (4, 5.5, 2.5 | 6, 2)."""
    reward, index = tensor(4, 1, 7, 2, 6), torch.tensor([0, 0, 0, 1, 1])
    close(leave_one_out(reward, index), 4, 5.5, 2.5, 6, 2)
    ids = torch.zeros(5, 1, dtype=torch.int64)
    batch = Samples(Tokens.of([[0], [0]]), index, ids, torch.ones(5, 1, dtype=torch.bool), reward=reward)
    close(Reinforce("batch_mean").prepare(batch).advantage, 0, -3, 3, -2, 2)
    close(Reinforce("leave_one_out").prepare(batch).advantage, 0, -4.5, 4.5, -4, 4)
    close(Reinforce("none").prepare(batch).advantage, 4, 1, 7, 2, 6)


def test_leave_one_out_with_one_sample_of_a_prompt_is_refused():
    with pytest.raises(ValueError, match="at least two samples of every prompt"):
        leave_one_out(tensor(1, 2, 3), torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("baseline", ["batch_mean", "leave_one_out"])
def test_equal_rewards_teach_nothing(baseline):
    """Advantage, loss and gradient are exactly zero; unequal ones teach something."""

    def gradient(*rewards: float) -> Tensor:
        model, objective = policy(), Reinforce(baseline)
        objective.loss(model, objective.prepare(said(0, 1, 1, reward=tensor(*rewards)))).loss.sum().backward()
        return model.tables[0].grad

    assert (gradient(0.25, 0.25, 0.25) == 0).all()
    assert gradient(1, 0, 0).abs().max() > 0.1


def test_the_policy_s_gradient_does_not_run_through_the_advantage():
    """With beta > 0 the return holds log q as a number: d loss/d log p = −A exactly."""
    model = policy()
    batch = said(0, 1, reward=tensor(1, 0))
    batch = batch.with_(log_q=model.log_prob(batch).detach())
    objective = Reinforce("none", beta=0.5)
    objective.loss(model, objective.prepare(batch)).loss[0].backward()
    a = 1 - 0.5 * log(1.6)
    close(model.tables[0].grad[0, 0], -a * (1 - 0.8), a * 0.2)


@pytest.mark.kernels
@torch.no_grad()
def test_the_ratio_is_one_when_the_drawer_is_the_policy():
    """p/q of whole answers, drawn with the cache and scored without; another policy's is not 1."""
    model = build("gpt2", torch.float64, eos_ids=(3,))
    samples = draw(model, Tokens.of([[3, 5, 7], [2]]), n=6, max_new_tokens=8, stream=stream(0))
    objective = Reinforce()
    batch = objective.prepare(samples.with_(reward=torch.rand(12, generator=torch.Generator().manual_seed(0))))
    ratio = objective.loss(model, batch).metrics["ratio"]
    near(ratio, torch.ones(12, dtype=ratio.dtype), NETWORK)
    assert (objective.loss(build("gpt2", seed=1), batch).metrics["ratio"] - 1).abs().min() > 0.01


def test_samples_that_lack_what_the_method_needs_are_refused():
    with pytest.raises(ValueError, match="no reward: score them first"):
        Reinforce().prepare(said(0))
    with pytest.raises(ValueError, match="needs log_q and log_ref"):
        Reinforce(beta=0.1).prepare(said(0, reward=tensor(1)))
    with pytest.raises(ValueError, match="no reward: score them first"):
        ValueLearning().prepare(said(0))


# ---- values and rules ---------------------------------------------------------------------------------------


def test_binary_value_loss_by_hand():
    """Logit ln 3 is p = 3/4: a success costs ln 4/3, a failure ln 4; at logit 0 both cost ln 2."""
    values = tensor(log(3), 0).repeat(2, 1)[:, :, None]
    close(value_loss(values, tensor(1, 0)), log(4 / 3), log(2), log(4), log(2))


def test_histogram_value_loss_by_hand():
    """Logits (0, ln 2, ln 5) are 1/8, 2/8, 5/8: rewards 0.4 (nearest atom 1/2) and 1 cost ln 4 and ln 8/5."""
    values = tensor(0, log(2), log(5)).repeat(2, 1)[:, None, :]
    close(value_loss(values, tensor(0.4, 1), (0.0, 0.5, 1.0)), log(4), log(1.6))


def test_value_learning_counts_real_tokens_only():
    """Rows of 3 and 1 tokens at logit 0: 3 ln 2 and ln 2, weights 3 and 1."""
    batch = Samples(Tokens.of([[0]]), torch.tensor([0, 0]), *_ragged([[1, 1, 0], [0]]), reward=tensor(1, 0))
    outcome = ValueLearning().loss(TableValues(1, 2, 3), batch)
    close(outcome.loss, 3 * log(2), log(2))
    close(outcome.metrics["value_loss"], log(2), log(2))
    assert ValueLearning().weight(batch).tolist() == [3, 1]


@pytest.mark.kernels
def test_the_language_modelling_term_by_hand():
    """A fresh value head costs ln 2 a token; lm_weight = 2 adds twice the body's own −log p."""
    from tiltlm.models.heads import ValueHead

    body = build("gpt2", torch.float64)
    batch = network_pairs(body.log_prob).chosen.with_(reward=torch.tensor([1.0, 0.0, 1.0]))
    loss = ValueLearning(lm_weight=2.0).loss(ValueHead(body).double(), batch).loss
    near(loss, tensor(4, 2, 1) * log(2) - 2 * body.log_prob(batch).sum(1), NETWORK)


def test_atoms_are_matched_to_the_nearest():
    assert nearest_atom(tensor(-3, 0.2, 0.3, 0.8, 1), (0.0, 0.5, 1.0)).tolist() == [0, 0, 1, 2, 2]
    assert nearest_atom(tensor(0, 1), (0.0, 1.0)).tolist() == [0, 1]


def test_a_binary_reward_that_is_neither_is_refused():
    with pytest.raises(ValueError, match=r"reward 0.5 is neither 0.0 nor 1.0: give the value model more atoms"):
        nearest_atom(tensor(1, 0.5), (0.0, 1.0))


@pytest.mark.parametrize("atoms", [(0.0, 1.0), (0.0, 0.5, 1.0)])
def test_a_reward_that_is_nan_is_refused(atoms):
    with pytest.raises(ValueError, match="nan"):
        nearest_atom(tensor(1, math.nan), atoms)


def test_values_of_the_wrong_width_are_refused():
    """Two atoms want one logit (or two); three logits trained on two of their bins would be a silent mistake."""
    batch = said(0, 1, reward=tensor(1, 0))
    for width, atoms in ((3, (0.0, 1.0)), (1, (0.0, 0.5, 1.0)), (2, (0.0, 0.5, 1.0))):
        with pytest.raises(ValueError, match=r"atoms|width"):
            ValueLearning(atoms).loss(TableValues(1, 2, 1, width), batch)


def test_a_language_modelling_weight_without_a_language_model_is_refused():
    with pytest.raises((ValueError, TypeError), match="lm_weight"):
        ValueLearning(lm_weight=1.0).loss(TableValues(1, 2, 1), said(0, 1, reward=tensor(1, 0)))


@pytest.mark.parametrize("atoms", [(0.0,), (1.0, 0.0), (0.0, 0.0, 1.0)])
def test_atoms_that_make_no_sense_are_refused(atoms):
    with pytest.raises(ValueError, match="atoms must be two or more increasing numbers"):
        ValueLearning(atoms)
    assert (ValueLearning().width, ValueLearning((0.0, 0.5, 1.0)).width) == (1, 3)


def test_q_sharp_by_hand():
    """p = 1/4, beta = 1/ln 2, so e^{1/beta} = 2: ln(1 + ¼·(2 − 1)) = ln 5/4."""
    law = log_pmf(tensor(log(1 / 3))[:, None])
    close(QSharp(1 / log(2)).log_psi(law, tensor(0, 1)), log(1.25))


def test_q_sharp_of_a_histogram_by_hand():
    """pmf (1/2, 1/4, 1/4) on (0, 1, 2), e^{1/beta} = 3: ln(1/2 + 3/4 + 9/4) = ln 7/2."""
    close(QSharp(1 / log(3)).log_psi(tensor(0.5, 0.25, 0.25).log(), tensor(0, 1, 2)), log(3.5))


def test_cd_by_hand():
    """The same pmf: E[r] = 3/4, over beta = 1/2: 3/2."""
    close(CD(0.5).log_psi(tensor(0.5, 0.25, 0.25).log(), tensor(0, 1, 2)), 1.5)


def test_fudge_by_hand():
    """Logit ln 3: ln 3/4, the second entry being success."""
    close(Fudge().log_psi(log_pmf(tensor(log(3))[:, None]), tensor(0, 1)), log(0.75))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(0.0), "beta must be positive"),
        (lambda: RPO(beta=-1.0), "beta must be positive"),
        (lambda: RPO(alpha=-1.0), "alpha must not be negative"),
        (lambda: Reinforce(beta=-0.1), "beta must not be negative"),
        (lambda: ValueLearning(lm_weight=-1.0), "lm_weight must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
