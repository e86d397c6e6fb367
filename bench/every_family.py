"""Every text family that transformers maps to a causal LM, built tiny, looked at, and told right from wrong.

    python bench/every_family.py                  the whole table, written to docs/models.md (minutes)
    python bench/every_family.py gemma2 mamba2    some families, printed

A family is right when, at logits of size 30, scores are those of one plain forward pass per row and what is drawn has
the density that scoring gives it. Both are compared here in float32 with weights of random spread; nothing of this file is
used by the library.
"""

from __future__ import annotations

import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tiltlm.models import selftest
from tiltlm.models.causal import CausalLM
from tiltlm.samplers.ancestral import draw
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream

VOCAB = 61
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "embedding_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "dff": 48,
    "d_ff": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 4,
    "sliding_window": 6, "attention_window": 6, "attention_chunk_size": 6,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "expand": 2,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "time_step_rank": 4, "mamba_dt_rank": 4, "chunk_size": 4,
    "mamba_chunk_size": 4, "lru_width": 32, "attention_hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "is_decoder": True, "global_attn_every_n_layers": 2,
    "final_logit_softcapping": 20.0, "logits_scaling": 4.0, "lm_head_multiplier": 0.5, "image_size": 28,
    "patch_size": 14, "moe_k": 2, "num_experts_per_token": 2, "moe_topk": 2,
}  # fmt: skip
"""What a tiny network of any family is made of; each takes the names it knows."""

OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_local_experts": 4, "n_group": 1, "topk_group": 1, "layer_group_size": 2},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 48},
    },
    "dots3_note_text": {"per_layer_config": None},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
        "laurel_rank": 8, "activation_sparsity_pattern": None,
    },
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "nemotron_h": {"n_groups": 2, "mamba_n_groups": 2},
    "phi4_multimodal": {"vision_config": {}, "audio_config": {}},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 8], "num_buckets": 4},
    "roc_bert": {"shape_vocab_size": VOCAB, "pronunciation_vocab_size": VOCAB, "shape_embed_dim": 32,
                 "pronunciation_embed_dim": 32},
    "xlm": {"emb_dim": 32, "causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "mamba_dt_rank": 4,
              "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4, "mamba_ngroups": 1,
               "n_mamba_heads": 4, "mamba_headdim": 16, "attention_hidden_size": 64, "attention_head_dim": 16,
               "use_mem_rope": False, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
"""What some families need beside or instead."""

SECONDS = 180
"""Time for one family."""

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"

SAID = {"cache": "with a cache", "passes": "by full passes", "refused": "refused", "not built": "not tried"}
"""The verdicts as the page says them."""

TEXT = """\
# Models

Any causal language model that transformers loads can be a reference, a policy, or the body of a twist. Before a network
is used for the first time it is looked at, for families differ in ways that ruin results without an error:

- **Between body and logits** some cap their logits softly (Gemma), some scale them (Cohere, Granite), some transform
  their states first. What a network does is read off the network itself, by putting numbers of up to 20000 in the place
  of what its head gives and looking at the logits that come out; scores, gradients and draws all go through it.
- **Its cache** is tested: a few random rows of unequal length, prompts padded, tokens appended, rows selected with
  repeats, against one plain forward pass of each row alone. Where they differ (Mamba, Qwen3-Next, MiniMax: states that are
  not keys and values), every token is drawn by a full pass over the row: T tokens cost T passes, and what is drawn is
  what is scored. That is said once.
- **Padding and batch mates** are tested in the same way; a network that cannot stand padding is run in rows of one length.
- **Refused**, by name and reason, is what cannot be used at all: networks whose tokens see what comes after them,
  networks that need more than tokens.

What was found is kept in `$XDG_CACHE_HOME/tiltlm/selftest` (`~/.cache` by default), by configuration, versions and code.

```sh
tiltlm doctor MODEL                             # all of this for one model, and the memory it will need
tiltlm doctor MODEL --batch 256 --length 1024   # exit status 0: usable; 2: not, and why
```

What to do when

- **a model is drawn from by full passes** and that is too slow: draw short completions, score what others drew
  (scoring costs one pass either way), or take a family with a cache.
- **a model is refused as not causal**: BERT and its kin are causal when their configuration says `is_decoder: true`
  and they were trained so; otherwise there is no left-to-right distribution to speak of.
- **candidates take "a row for each"** (`doctor`): V-type twists cost K rows a step; a Q-type head costs nothing.
- **adapters need target modules named**: `--net.lora-modules all-linear`, or names; `doctor` lists the network's
  linear layers. Adapters are scaled by alpha / rank, `--net.lora-alpha` (not named: twice the rank).

## Every family

All {n} families that `AutoModelForCausalLM` maps, each built tiny from its configuration with random weights and its head
scaled until it gave numbers of size 30 ({tested}): {counts}. The largest difference between a score and a
plain pass, or a draw's density and its score, was {worst:.0e} nats in float32. "Not tried" says nothing about a family: no
small network of it could be made here. `python bench/every_family.py` writes this page.

"""


@dataclass(frozen=True)
class Row:
    """A line of the table; verdict: cache | passes | refused | not built."""

    family: str
    network: str
    verdict: str
    head: str = ""
    note: str = ""
    error: float = 0.0
    seconds: float = 0.0


def config_of(family: str) -> Any:
    """A tiny configuration of `family`."""
    kind = CONFIG_MAPPING[family]
    return kind(**_small(kind().to_dict()) | OWN.get(family, {}))


def _small(known: dict[str, Any]) -> dict[str, Any]:
    """Those of `SMALL` that a configuration knows, in its parts as well."""
    given = {k: v for k, v in SMALL.items() if k in known}
    if "kv_lora_rank" in given:
        given["num_key_value_heads"] = SMALL["num_attention_heads"]
    for name, part in known.items():
        if name.endswith("_config") and isinstance(part, dict) and "model_type" in part:
            given[name] = _small(part) | {"model_type": part["model_type"]}
    return given


def build(family: str) -> Any:
    """A tiny network, its weights spread widely enough to tell tokens apart. Raises whatever transformers raises."""
    config = config_of(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 5_000_000:
        raise ValueError(f"{size / 1e6:.0f} million parameters even so")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


@torch.no_grad()
def loud(model: CausalLM, size: float = 30.0) -> None:
    """Scale the output head until the largest number it gives is `size`."""
    ids = torch.arange(3, 11)[None]
    seen: list[float] = []
    hook = model.head.register_forward_hook(lambda _, __, out: seen.append(out.abs().max().item()))
    model.model(input_ids=ids, use_cache=False)
    hook.remove()
    model.head.weight.mul_(size / seen[-1])


@torch.no_grad()
def error_of(model: CausalLM) -> float:
    """The largest difference, in nats, of scores from plain passes and of drawn densities from scores."""
    prompts = Tokens.of([[3, 5, 7, 11, 8, 9, 4], [9], [4, 6, 8, 10, 12, 14, 16, 18, 20, 22]])
    drawn = draw(model, prompts, n=2, max_new_tokens=5, stream=stream(0, "families"))
    assert drawn.log_q is not None
    scored = model.log_prob(drawn)
    return max((scored - plain(model, drawn)).abs().max().item(), (scored - drawn.log_q).abs().max().item())


def plain(model: CausalLM, samples: Samples) -> torch.Tensor:
    """The network's own logits, one row at a time, without cache, padding or positions."""
    found = torch.zeros(samples.tokens.shape, dtype=torch.float64)
    for n, (prompt, completion) in enumerate(
        zip(samples.row_prompts.lists(), samples.completions.lists(), strict=True)
    ):
        logits = model.model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].double()
        for t, y in enumerate(completion):
            found[n, t] = logits[len(prompt) + t - 1].log_softmax(-1)[y]
    return found


def judge(family: str) -> Row:
    """The family's line."""
    began = time.monotonic()
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    network = names if isinstance(names, str) else names[0]
    try:
        net = build(family)
    except Exception as error:  # whatever transformers raises: the family could not be built
        return Row(family, network, "not built", note=selftest.one_line(error))
    try:
        model = CausalLM(net)
    except ValueError as error:
        return Row(family, network, "refused", note=str(error), seconds=time.monotonic() - began)
    loud(model)
    error, trust, curve = error_of(model), model.trust, model.plain_curve
    head = ", ".join(
        text
        for text, there in (
            (f"soft cap {curve.cap:g}" if curve.cap else "", curve.cap),
            (f"scale {curve.scale:.4g}", curve.scale != 1),
            (f"states × {model.entry.factor:.4g}", model.entry.factor != 1),
            ("states transformed", model.entry.module is not None),
            ("bias", model.head.bias is not None),
            ("padded", curve.entries),
        )
        if there
    )
    slower = "" if trust.padding else "rows of one length together; "
    verdict = "cache" if trust.cache else "passes"
    return Row(family, network, verdict, head, slower + trust.why, error, time.monotonic() - began)


def main(families: list[str]) -> None:
    """Print a line per family; with none named, all of them, and write the page."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _late)
    rows = []
    for family in families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        signal.alarm(SECONDS)
        try:
            row = judge(family)
        except TimeoutError:
            row = Row(family, "", "not built", note=f"not done within {SECONDS} s")
        signal.alarm(0)
        rows.append(row)
        print(
            f"{family:24} {row.verdict:9} {row.error:.0e} {row.seconds:5.1f} s  {row.head} {row.note}", flush=True
        )
    if not families:
        PAGE.write_text(page(rows), encoding="utf-8")


def page(rows: list[Row]) -> str:
    """docs/models.md: its text, and a line per family."""
    count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in SAID}
    worst = max(row.error for row in rows if row.verdict in ("cache", "passes"))
    tested = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    counts = ", ".join(f"{n} {SAID[verdict]}" for verdict, n in count.items())
    head = TEXT.format(n=len(rows), counts=counts, worst=worst, tested=tested)
    lines = ["| family | network | drawn | between body and logits | why |", "|---|---|---|---|---|"]
    for row in rows:
        note = row.note.replace("|", "/").removeprefix(f"{row.network} ").removeprefix("cannot be used: ")
        lines.append(f"| {row.family} | {row.network} | {SAID[row.verdict]} | {row.head} | {note} |")
    return head + "\n".join(lines) + "\n"


def _late(number: int, frame: FrameType | None) -> None:
    raise TimeoutError


if __name__ == "__main__":
    main(sys.argv[1:])
