"""Best of n: draw n completions of each prompt and keep the one of highest reward.

No language model draws these, so they carry no log_q. Their divergence obeys

    KL(best-of-n ‖ pi_ref) ≤ log n − (n − 1)/n     (nats),

an upper bound, with equality only when rewards never tie (Beirami et al. 2024, arXiv:2401.01879, thm. 1). With
ties it is, over the distinct rewards r_1 < r_2 < … of probabilities p_j under pi_ref, with F_j = p_1 + … + p_j,

    KL = Σ_j (F_j^n − F_{j−1}^n) · log[(F_j^n − F_{j−1}^n) / p_j],

for the best of n is pi_ref within each value of the reward. `kl_estimate` puts the frequencies of drawn rewards
in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltlm.models.base import LanguageModel
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream
from tiltlm.target import Reward


def best_of(
    model: LanguageModel,
    reward: Reward,
    prompts: Tokens,
    *,
    n: int,
    max_new_tokens: int,
    stream: Stream,
    batch_size: int = 256,
) -> Samples:
    """The best of `n` draws per prompt: Samples with one row a prompt, `reward` set; ties go to the first."""
    if n < 1:
        raise ValueError(f"best_of needs n >= 1 draws per prompt; got {n}")
    drawn = draw_in_batches(
        model, prompts, n=n, max_new_tokens=max_new_tokens, stream=stream, batch_size=batch_size
    )
    rewards = reward(drawn).reshape(len(prompts), n)
    if bool(rewards.isnan().any()):
        raise ValueError(f"the reward of prompt {int(rewards.isnan().nonzero()[0, 0])} is NaN: no draw is best")
    best = rewards.argmax(1) + torch.arange(len(prompts), device=rewards.device) * n
    return drawn.with_(reward=rewards.flatten(), log_q=None).select(best)


def kl_upper_bound(n: int) -> float:
    """log n − (n − 1)/n in nats: the most that best-of-n can move away from what it draws from."""
    if n < 1:
        raise ValueError(f"best_of needs n >= 1 draws per prompt; got {n}")
    return math.log(n) - (n - 1) / n


def kl_estimate(rewards: Tensor, n: int) -> float:
    """KL(best-of-n ‖ pi_ref) in nats, from rewards [N] of plain draws (their frequencies in the place of p_j).

    Exact where `rewards` lists every completion once per unit of probability; otherwise with a bias that falls as
    n/N. Raises ValueError unless there are at least n draws.
    """
    if not 1 <= n <= len(rewards):
        raise ValueError(f"an estimate for the best of {n} needs at least {n} draws; got {len(rewards)}")
    _, count = rewards.double().unique(return_counts=True)
    log_p = (count.double() / count.sum()).log()
    log_f = (count.cumsum(0).double() / count.sum()).log() * n
    before = torch.cat([log_f.new_full((1,), -torch.inf), log_f[:-1]])
    log_q = log_f + torch.log(-torch.expm1(before - log_f))
    return float((log_q.exp() * (log_q - log_p)).nan_to_num(0.0).sum())
