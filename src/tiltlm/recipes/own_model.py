"""A small language model of the project's own making, where no pretrained one is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tiltlm.data.stories import train_tokenizer
from tiltlm.device import device_of
from tiltlm.experience import Offline
from tiltlm.models.causal import CausalLM
from tiltlm.policies.sft import SFT
from tiltlm.recipes.fitting import Fit, fit
from tiltlm.run import Run
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream

OWN_TOKENS = 512
"""Tokens that the own model holds."""


def train_own_model(
    run: Run[Any],
    texts: Sequence[str],
    how: Fit,
    own: Stream,
    device_name: str,
    most_tokens: int,
    stop: bool = False,
) -> None:
    """A Llama of 0.3 million parameters on `texts`, each cut to `most_tokens`; its tokenizer is learnt from them too.

    stop: end every text that fits with the start token, as a model that is to stop by itself must see it.
    """
    from transformers import LlamaConfig

    tokenizer = train_tokenizer(texts[:2000])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=OWN_TOKENS, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = CausalLM.from_config(config, seed=own.child("init").generator())
    model.tokenizer = tokenizer
    device, end = device_of(device_name), [tokenizer.bos_token_id] if stop else []
    rows = [[*ids, *end][: most_tokens + 1] for ids in tokenizer(list(texts))["input_ids"]]
    completions = Tokens.of([ids[1:] for ids in rows])
    start = Tokens.of([[tokenizer.bos_token_id]])
    index = torch.zeros(len(rows), dtype=torch.int64)
    data = Samples(start, index, completions.ids, completions.mask).to(device)
    experience = Offline(data, how.batch_size, own.child("data"))
    fit(run, model, SFT(), experience, how, device=device, stream=own)
