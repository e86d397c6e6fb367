"""Networks that a discriminator may be made of, beside the reward model of `models.reward_model`.

LogRatio    beta·h of a second policy against its own frozen start, h = log p − log pi_ref: learnt by
            −log σ(beta·Δh), which is DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7)
LastValue   a value of the last token, on token ids: for worlds without texts
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tiltlm.data.encoding import Encoder
from tiltlm.models.base import LanguageModel, Values
from tiltlm.models.causal import CausalLM
from tiltlm.samplers.shared import of_rows
from tiltlm.samples import Samples, Tokens

TOGETHER = 64
"""Rows that are scored in one forward pass, at most (`Samples.passes`)."""


class LogRatio(nn.Module):
    """beta·h of texts under `policy`, h taken against `base`, which stays as it is, and is asked where rows are encoded.

    Completions end in the model's end token, where it has one. Prompts and completions are cut to half of `most_tokens`
    each.
    """

    def __init__(self, policy: CausalLM, base: LanguageModel, beta: float = 0.05, most_tokens: int = 512) -> None:
        super().__init__()
        if policy.tokenizer is None:
            raise ValueError("a judge of texts needs its model's tokenizer: name a folder that has one")
        self.policy, self.beta = policy, beta
        self._base = (base,)  # in a tuple, where torch does not look for submodules: it is never in training mode
        self.encoder = Encoder(policy.tokenizer, policy.eos_ids, most_tokens, most_tokens // 2)

    def encode(self, prompts: Sequence[str], completions: Sequence[str], together: int = 1) -> Samples:
        """Rows in the policy's tokens, with the base's log-probabilities; every row's prompt has the same room, whatever it
        is `together` with."""
        number = {text: k for k, text in enumerate(dict.fromkeys(prompts))}
        finished = [bool(self.policy.eos_ids)] * len(completions)
        encoder, index = self.encoder, [number[text] for text in prompts]
        asked = encoder.prompts(list(number))
        ends = [
            encoder.end_after(ids) if self.policy.eos_ids else -1 for ids in asked.lists()
        ]  # -1: none is written
        found = [
            encoder.completion(text, done, ends[k])[0]
            for text, done, k in zip(completions, finished, index, strict=True)
        ]
        done = Tokens.of(found)
        samples = Samples(asked, torch.tensor(index, dtype=torch.int64), done.ids, done.mask)
        return self._referred(samples.to(self.policy.device))

    def score(self, samples: Samples) -> Tensor:
        """beta·h, [N], of rows that `encode` made."""
        assert samples.log_ref is not None
        return self.beta * (self.policy.log_prob(samples) - samples.log_ref).sum(1)

    @torch.no_grad()
    def _referred(self, samples: Samples) -> Samples:
        """`samples` with log_ref, `TOGETHER` rows at a time, of several processes each its share of them."""

        def log_ref(some: Samples) -> Tensor:
            parts = [some.select(slice(b, b + TOGETHER)) for b in range(0, len(some), TOGETHER)]
            return torch.cat([self._base[0].log_prob(part.select(s)) for part in parts for s in part.passes()])

        return samples.with_(log_ref=of_rows(samples, log_ref))


class LastValue(nn.Module):
    """`values` (of width 1) of whole completions: token ids in, the value of the last token out; 0 of an empty one."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self.values = values

    def encode(self, prompts: Sequence[list[int]], completions: Sequence[list[int]], together: int = 1) -> Samples:
        """Rows as they are."""
        device = next(self.parameters()).device
        number = {ids: k for k, ids in enumerate(dict.fromkeys(tuple(ids) for ids in prompts))}
        done = Tokens.of(list(completions), device)
        index = torch.tensor([number[tuple(ids)] for ids in prompts], dtype=torch.int64, device=device)
        return Samples(Tokens.of([list(ids) for ids in number], device), index, done.ids, done.mask)

    def score(self, samples: Samples) -> Tensor:
        """The value of every row's last token, [N]."""
        if not samples.mask.any():
            return torch.zeros(len(samples), device=samples.device)
        last = samples.mask.sum(1) - 1
        values: Any = self.values.values(samples)[..., 0]
        return torch.where(last >= 0, values.gather(1, last.clamp_min(0)[:, None])[:, 0], 0.0)
