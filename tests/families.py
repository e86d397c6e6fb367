"""One small random model of every family the library promises to support."""

from __future__ import annotations

import torch
import transformers as hf

from tiltlm.models.causal import CausalLM

VOCAB = 23
_COMMON = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _config(family: str) -> hf.PretrainedConfig:
    if family == "gpt2":
        return hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=64, **_COMMON)
    if family == "gpt_neo":
        return hf.GPTNeoConfig(
            num_layers=2, hidden_size=16, num_heads=2, max_position_embeddings=64, window_size=5,
            attention_types=[[["global", "local"], 1]], **_COMMON,
        )  # fmt: skip
    if family == "opt":
        return hf.OPTConfig(
            num_hidden_layers=2, hidden_size=16, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=16,
            max_position_embeddings=64, **{**_COMMON, "pad_token_id": 1},
        )  # fmt: skip
    if family == "gpt_neox":
        return hf.GPTNeoXConfig(
            num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64, **_COMMON,
        )  # fmt: skip
    if family == "llama":
        return hf.LlamaConfig(
            num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=32, max_position_embeddings=64, **_COMMON,
        )  # fmt: skip
    raise KeyError(family)


FAMILIES = ["gpt2", "gpt_neo", "opt", "gpt_neox", "llama"]


def build(
    family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, eos_ids: tuple[int, ...] = ()
) -> CausalLM:
    """A random model of `family`, in eval mode, weights spread widely enough to tell tokens apart."""
    model = CausalLM.from_config(_config(family), seed=seed, eos_ids=eos_ids).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.to(dtype)
