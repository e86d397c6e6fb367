"""PPO: every piece by hand, and the whole of it on its way to pi*. Its law is in tests/laws/test_fixed_points.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from close import close
from families import build
from laws.world import HORIZON, PROMPTS, world
from tiltlm.engine import Engine, Optim
from tiltlm.exact import kl
from tiltlm.experience import Live
from tiltlm.methods import method, names
from tiltlm.models.causal import copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.models.table import TableLM
from tiltlm.policies.ppo import PPO, ActorCritic, Rollout, Valued, gae, policy_loss, value_loss, whitened
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream, stream
from tiltlm.target import Target
from tiltlm.train import Pace, Training, checkpoints
from tiltlm.twists.learned import TiltedPolicy

ROOT = stream(17, "test-ppo")


def live_of(policy, critic, target: Target, prompts: Tokens, n: int, width: int, own: Stream) -> Valued:
    """n draws of every prompt a step, scored, with the critic's values."""
    return Valued(Live(policy, target.reward, prompts, len(prompts), width, own, n, target.reference), critic)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_gae_by_hand():
    """Rewards (1, 0, 2), values (½, 1, −1), λ = ½. δ = (1.5, −2, 3); A = (1.5 − ¼, −½, 3) = (1.25, −0.5, 3)."""
    mask = torch.ones(1, 3).bool()
    advantage, returns = gae(row(1, 0, 2), row(0.5, 1, -1), mask, 0.5)
    assert advantage.tolist() == [[1.25, -0.5, 3.0]] and returns.tolist() == [[1.75, 0.5, 2.0]]
    padded, _ = gae(row(1, 0, 2, 9), row(0.5, 1, -1, 7), torch.tensor([[True, True, True, False]]), 0.5)
    assert padded.tolist() == [[1.25, -0.5, 3.0, 0.0]]


def test_lambda_one_is_the_return_less_the_value_and_zero_is_one_step():
    reward, value, mask = row(1, 2, 3), row(0.1, 0.2, 0.3), torch.ones(1, 3).bool()
    assert gae(reward, value, mask, 1.0)[0].tolist()[0] == pytest.approx([5.9, 4.8, 2.7])
    assert gae(reward, value, mask, 0.0)[0].tolist()[0] == pytest.approx([1.1, 2.1, 2.7])


def test_the_clipped_step_by_hand():
    """Ratio 1.5: A = 1 is cut at 1.2, A = −1 is not; ratio ½: A = 1 is not cut, A = −1 is cut at 0.8."""
    log_p = row(math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)).requires_grad_()
    loss = policy_loss(log_p, row(0, 0, 0, 0), row(1, -1, 1, -1), 0.2)
    assert loss.tolist()[0] == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    loss.sum().backward()
    assert log_p.grad.tolist()[0] == pytest.approx([0.0, 1.5, -0.5, 0.0])


def test_the_clipped_critic_by_hand():
    """V 2, V_old 1, R 3: ½·max(1, (1.2 − 3)²) = 1.62; V 1.1: ½·(1.9)² = 1.805."""
    found = value_loss(row(2, 1.1), row(1, 1), row(3, 3), 0.2)
    assert found.tolist()[0] == pytest.approx([1.62, 1.805])


def test_whitening_counts_real_tokens_only():
    found = whitened(row(1, 3, 100), torch.tensor([[True, True, False]]))
    assert found.tolist()[0] == pytest.approx([-1, 1, 0])


def samples_by_hand() -> Samples:
    """Two tokens, then one; log q and log p_ref of each."""
    mask = torch.tensor([[True, True], [True, False]])
    log_q, log_ref = torch.tensor([[-1.0, -2.0], [-1.0, 0]]), torch.tensor([[-1.5, -1.0], [-3.0, 0]])
    rows = Samples(Tokens.of([[0]]), torch.tensor([0, 0]), torch.zeros(2, 2).long(), mask)
    return rows.with_(log_q=log_q, log_ref=log_ref, reward=torch.tensor([4.0, 5.0]))


def test_rewards_are_the_pull_and_r_at_the_last_token():
    """beta ½: −½·(log q − log p_ref) = (−0.25, 0.5), r = 4 at the second; the short row −1 + 5 at its only one."""
    found = PPO(beta=0.5).rewards(samples_by_hand())
    assert found.tolist() == [[-0.25, 4.5], [4.0, 0.0]]


class Constant(nn.Module):
    """log p 0.1 above log q everywhere; a critic that says 1 in front of every token."""

    def log_prob(self, samples: Samples) -> Tensor:
        return torch.where(samples.mask, samples.log_q + 0.1, 0.0)

    def values_before(self, samples: Samples) -> Tensor:
        return torch.where(samples.mask, 1.0, 0.0)[..., None]


def test_the_whole_loss_by_hand():
    """λ 1, no whitening: A = (3.25, 3.5), (3); ρ = e^0.1 within the clip; V = V_old = 1, R = A + 1."""
    objective = PPO(beta=0.5, lam=1.0, whiten=False)
    samples = samples_by_hand()
    both = ActorCritic(Constant(), Constant())
    judged = objective.prepare(Rollout(samples, both.critic.values_before(samples)[..., 0]))
    assert judged.advantage.tolist() == [[3.25, 3.5], [3.0, 0.0]]
    outcome = objective.loss(both, judged)
    rho = math.exp(0.1)
    want = [-rho * 6.75 + 0.05 * (3.25**2 + 3.5**2), -rho * 3 + 0.05 * 9]
    assert outcome.loss.tolist() == pytest.approx(want, rel=1e-5)
    assert outcome.metrics["kl"].tolist() == [-0.5, 2.0] and outcome.metrics["clipped"].tolist() == [0, 0]
    assert objective.weight(judged).tolist() == [2, 1]


def test_mistakes_are_named():
    for bad in ({"beta": 0.0}, {"lam": 1.5}, {"clip": 0.0}):
        with pytest.raises(ValueError, match=r"must be positive|must lie within \[0, 1\]"):
            PPO(**bad)
    with pytest.raises(ValueError, match="PPO needs reward, log_q and log_ref"):
        PPO(1.0).rewards(samples_by_hand().with_(log_ref=None))


# ---- the whole of it ----------------------------------------------------------------------------------------


class TableCritic(nn.Module):
    """V of every prefix of the small worlds, as a table."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterList(torch.zeros(2, 3**t, dtype=torch.float64) for t in range(HORIZON))

    def values_before(self, samples: Samples) -> Tensor:
        code, columns = torch.zeros_like(samples.prompt_index), []
        for t in range(samples.tokens.shape[1]):
            columns.append(self.tables[t][samples.prompt_index, code])
            code = code * 3 + samples.tokens[:, t]
        return torch.where(samples.mask, torch.stack(columns, 1), 0.0)[..., None]


@pytest.mark.parametrize("eos_ids", [(), (2,)])
def test_ppo_comes_close_to_pi_star_of_its_beta(eos_ids):
    w = world(eos_ids=eos_ids, beta=0.4)
    policy = TableLM(2, 3, HORIZON, eos_ids)
    policy.load_state_dict(w.reference.state_dict())
    critic = TableCritic()
    both = ActorCritic(policy, critic)
    live = live_of(policy, critic, w.target(), PROMPTS, 200, HORIZON, ROOT.child("learn"))
    engine, objective = Engine(both, Optim(lr=0.03, clip=0.0)), PPO(w.beta)
    p_star = w.p_star().log()

    def distance() -> float:
        return float(kl(w.density(policy).log(), p_star).mean())

    before = distance()
    for step in range(120):
        engine.update(objective, live.batch(step), passes=2)
    assert before > 0.3 and distance() < 0.02


def test_more_passes_are_more_optimizer_steps_on_the_same_draws():
    w = world()
    found = []
    for passes, calls in ((1, 3), (3, 1)):
        policy = TableLM(2, 3, HORIZON).randomise(ROOT.child("passes").generator())
        both = ActorCritic(policy, TableCritic())
        batch = live_of(policy, both.critic, w.target(), PROMPTS, 50, HORIZON, ROOT).batch(0)
        engine, objective = Engine(both, Optim(lr=0.01, clip=0.0)), PPO(w.beta)
        for _ in range(calls):
            engine.update(objective, batch, passes=passes)
        found.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_every_method_says_how_many_updates_it_makes_of_a_batch():
    assert PPO().passes == 4 and PPO(passes=2).passes == 2
    assert all(method(name).passes >= 1 for name in names()) and method("dpo").passes == method("ctl").passes == 1


def actor(folder: Path, stop: int | None = None) -> tuple[Training, ActorCritic]:
    """PPO of a head on a network, its critic on another."""
    reference = build("gpt2").requires_grad_(False)
    values = ValueHead(copy_of(reference), per_token=True)
    critic = ValueHead(copy_of(reference))
    tilted = TiltedPolicy(reference, values)
    target = Target(reference, lambda s: (s.tokens == 3).any(1).float(), 0.5)
    live = live_of(tilted.decoder(), critic, target, Tokens.of([[1, 2]]), 8, 3, ROOT.child("net"))

    def on_step(step: int, limit: int, metrics: dict[str, float]) -> None:
        if step == stop:
            raise KeyboardInterrupt

    both = ActorCritic(tilted, critic)
    engine = Engine(both, Optim(lr=1e-3, clip=0.0))
    pace = Pace(steps=6, decay="none")
    return Training(both, engine, PPO(0.5), live, pace, ROOT, folder, 2, on_step, passes=2, keep=(2,)), both


@pytest.mark.kernels
def test_ppo_on_networks_resumes_bit_for_bit_and_keeps_what_it_should(tmp_path):
    whole, one = actor(tmp_path / "whole")
    whole.run()
    cut, _ = actor(tmp_path / "cut", stop=5)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    again, other = actor(tmp_path / "cut")
    again.run()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["checkpoint-2", "checkpoint-6"]
    assert (tmp_path / "cut" / "checkpoint-6" / "critic" / "head.json").is_file()


@pytest.mark.kernels
def test_at_the_start_the_decoder_draws_what_the_policy_scores():
    _, both = actor(Path("unused"))
    samples = draw(both.policy.decoder(), Tokens.of([[1, 2]]), n=20, max_new_tokens=3, stream=ROOT)
    close(samples.log_q, both.policy.log_prob(samples).detach())
