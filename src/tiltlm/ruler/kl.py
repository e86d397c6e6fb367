"""Divergences along samples, in nats.

KL(q‖pi_ref) is estimated in its Rao–Blackwell form: along sequences drawn from q, sum over t the *exact*
divergence between the two next-token distributions,

    KL(q‖p) = E_{y~q} Σ_t KL( q(·|y_<t) ‖ p(·|y_<t) ),

unbiased, with a far smaller spread than log q(y) − log p(y) (Amini et al. 2025, arXiv:2504.10637). With it,

    KL(q‖pi*) = KL(q‖pi_ref) − E_q[r]/beta + log Z,     J(pi*) − J(q) = beta·KL(q‖pi*).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.exact import kl
from tiltlm.models.base import LanguageModel
from tiltlm.samples import Samples


@torch.no_grad()
def kl_along(q: LanguageModel, p: LanguageModel, samples: Samples) -> Tensor:
    """Exact next-token KL(q‖p) before each token of the samples, [N, T], 0 at padding; both walk in lockstep.

    The row sums are unbiased for KL(q‖p) if the samples were drawn from q.
    """
    width = samples.tokens.shape[1]
    prompts = samples.row_prompts
    states = q.start(prompts, width), p.start(prompts, width)
    columns = []
    for t in range(width):
        columns.append(kl(states[0].log_next(), states[1].log_next()))
        if t + 1 < width:
            for state in states:
                state.append(samples.tokens[:, t])
    return torch.where(samples.mask, torch.stack(columns, 1), 0.0)


def kl_along_in_batches(q: LanguageModel, p: LanguageModel, samples: Samples, batch_size: int) -> Tensor:
    """`kl_along` summed over tokens, [N], at most `batch_size` rows at once."""
    starts = range(0, len(samples), batch_size)
    return torch.cat([kl_along(q, p, samples.select(slice(b, b + batch_size))).sum(1) for b in starts])
