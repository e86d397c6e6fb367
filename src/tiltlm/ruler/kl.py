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

AT_ONCE = 4_000_000
"""Next-token probabilities held at once, in entries."""


@torch.no_grad()
def kl_along(q: LanguageModel, p: LanguageModel, samples: Samples) -> Tensor:
    """Exact next-token KL(q‖p) before each token of the samples, [N, T], 0 at padding.

    The row sums are unbiased for KL(q‖p) if the samples were drawn from q. Two networks are asked for all positions in one
    pass each; other models walk along the tokens in lockstep.
    """
    both = q.next_logits(samples), p.next_logits(samples)
    if both[0] is None or both[1] is None:
        return _walking(q, p, samples)
    size = max(1, AT_ONCE // q.vocab_size)
    rows, columns, _ = samples.places()
    parts = [slice(begin, begin + size) for begin in range(0, len(rows), size)]
    found = [kl(*(torch.log_softmax(ask(part).float(), -1) for ask in both if ask)) for part in parts]
    out = torch.zeros(samples.mask.shape, device=samples.device)
    return out.index_put((rows, columns), torch.cat(found)) if found else out


def _walking(q: LanguageModel, p: LanguageModel, samples: Samples) -> Tensor:
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
