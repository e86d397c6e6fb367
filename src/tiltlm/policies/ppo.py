"""PPO: the policy's own draws, a learned critic, and a clipped step (Schulman et al. 2017, arXiv:1707.06347).

    reward of token t   −beta·(log q − log pi_ref)(y_t), and r(x, y) more at the last token
    advantage           GAE: A_t = Σ_l λ^l δ_{t+l},  δ_t = reward_t + V(y_≤t) − V(y_<t)   (arXiv:1506.02438; γ = 1)
    L = max(−A·ρ, −A·clip(ρ, 1 ± c)) + w·½ max((V − R)², (clip(V, V_old ± c_v) − R)²),   ρ = p/q,  R = A + V_old

q is the policy when it drew. On policy and with λ = 1 the first term's expected gradient is that of −J(p),
whatever the critic says: zero at pi* of the same beta. Clipping and λ < 1 bias. So does whitening (the default) in
small batches: it divides by a spread that the batch itself drew, so that the mean gradient at pi* is of order 1/B
instead of zero (a seventh of one batch's spread at B = 4, a twentieth at 32, in the world of
tests/laws/test_finite_batches.py); so does dividing by the batch's tokens where completions are of unequal length.
The policy is any module with a differentiable `log_prob`: a language model, or a reference tilted by a twist's head
(`twists.learned.TiltedPolicy`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tiltlm.experience import Around
from tiltlm.method import Lesson, Method, Policy
from tiltlm.objective import Outcome, positive, stated
from tiltlm.problem import Fed
from tiltlm.samples import Samples


class Critic(Protocol):
    """V(y_<t): the value of the prefix in front of every token."""

    def values_before(self, samples: Samples) -> Tensor:
        """[N, T, 1], with gradient; 0 at padding."""


class ActorCritic(nn.Module):
    """A policy (anything with `log_prob`, `save`, `restore`) and its critic, trained together."""

    def __init__(self, policy: Any, critic: Any) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def save(self, folder: Path) -> None:
        """The policy as its own folder, the critic in the sub-folder `critic`."""
        self.policy.save(folder)
        (Path(folder) / "critic").mkdir()
        self.critic.save(Path(folder) / "critic")

    def restore(self, folder: Path) -> None:
        self.policy.restore(folder)
        self.critic.restore(Path(folder) / "critic")


@dataclass(frozen=True)
class Rollout:
    """Draws of the policy, with log_q, log_ref and reward, and the critic's value in front of every token [N,
    T]."""

    samples: Samples
    value: Tensor


@dataclass(frozen=True)
class Judged:
    """A rollout with its advantages and the critic's goals, [N, T]."""

    samples: Samples
    value: Tensor
    advantage: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, index: Tensor | slice) -> Judged:
        parts = (x[index] for x in (self.value, self.advantage, self.returns))
        return Judged(self.samples.select(index), *parts)


def gae(reward: Tensor, value: Tensor, mask: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns from per-token rewards and values before each token; all [n, T], 0 at padding."""
    value = torch.where(mask, value, 0.0)
    after = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)  # 0 behind a row's last token
    delta = torch.where(mask, reward + after - value, 0.0)
    advantage, running = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = torch.where(mask[:, t], delta[:, t] + lam * running, 0.0)
        advantage[:, t] = running
    return advantage, advantage + value


def policy_loss(log_p: Tensor, log_q: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """max(−A·ρ, −A·clip(ρ, 1 ± clip)), elementwise."""
    ratio = (log_p - log_q).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def value_loss(value: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V − R)², (clip(V, V_old ± clip) − R)²), elementwise."""
    held = old + (value - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns).square(), (held - returns).square())


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    """x with mean 0 and variance 1 over the real tokens."""
    some = x[mask]
    return torch.where(mask, (x - some.mean()) / (some.std(unbiased=False) + 1e-8), 0.0)


@dataclass(frozen=True)
class PPO(Policy):
    """The published settings."""

    beta: float | None = None
    """Strength of the pull towards the reference (None: the target's temperature)."""

    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    lam: float = 0.95
    whiten: bool = True
    passes: int = 4
    """Updates per batch of draws."""

    fed: ClassVar[Fed] = "live"
    critic: ClassVar[bool] = True
    optimum: ClassVar[str] = (
        "pi* of the same beta as B grows, on policy, with lam = 1 and no clipping; else near it (at any B: without "
        "whitening, completions equally long)"
    )

    def __post_init__(self) -> None:
        positive(beta=self.beta, clip=self.clip, value_clip=self.value_clip, passes=self.passes)
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam must lie within [0, 1]; got {self.lam}")

    def experience(self, experience: Any, lesson: Lesson) -> Valued:
        """Draws of the policy with the critic's values in front of every token."""
        return Valued(experience, lesson.learner.critic)

    def prepare(self, batch: Rollout) -> Judged:
        samples = batch.samples
        advantage, returns = gae(self.rewards(samples), batch.value, samples.mask, self.lam)
        if self.whiten:
            advantage = whitened(advantage, samples.mask)
        return Judged(samples, batch.value, advantage, returns)

    def rewards(self, samples: Samples) -> Tensor:
        """Per-token rewards [n, T], in units of the reward."""
        if samples.reward is None or samples.log_q is None or samples.log_ref is None:
            raise ValueError("PPO needs reward, log_q and log_ref of every row")
        pull = -stated(self.beta) * (samples.log_q - samples.log_ref)
        last = torch.arange(pull.shape[1], device=pull.device) == samples.mask.sum(1, keepdim=True) - 1
        return torch.where(samples.mask, pull + last * samples.reward.to(pull)[:, None], 0.0)

    def weight(self, batch: Judged) -> Tensor:
        return batch.samples.mask.sum(1)

    def loss(self, model: ActorCritic, batch: Judged) -> Outcome:
        samples, mask = batch.samples, batch.samples.mask
        assert samples.log_q is not None and samples.log_ref is not None and samples.reward is not None
        log_p = model.policy.log_prob(samples)
        value = model.critic.values_before(samples)[..., 0]
        log_q = samples.log_q.to(log_p)
        step = policy_loss(log_p, log_q, batch.advantage.to(log_p), self.clip)
        fit = value_loss(value, batch.value.to(value), batch.returns.to(value), self.value_clip)
        each = torch.where(mask, step + self.value_weight * fit, 0.0)
        clipped = (((log_p.detach() - log_q).exp() - 1).abs() > self.clip) & mask
        metrics = {
            "reward": samples.reward,
            "kl": (samples.log_q - samples.log_ref).sum(1),
            "clipped": clipped.sum(1) / mask.sum(1),
            "value_loss": torch.where(mask, fit.detach(), 0.0).sum(1) / mask.sum(1),
        }
        return Outcome(each.sum(1), metrics)


@dataclass(frozen=True)
class Valued(Around):
    """Another experience's draws of the policy, with the critic's values in front of every token as they were then."""

    critic: Critic

    @torch.no_grad()
    def batch(self, step: int) -> Rollout:
        samples: Samples = self.experience.batch(step)
        return Rollout(samples, self.critic.values_before(samples)[..., 0])


NAMES: dict[str, str] = {"ppo": "PPO: own samples, a critic, clipped steps"}
METHODS: dict[str, Method] = {"ppo": PPO()}
