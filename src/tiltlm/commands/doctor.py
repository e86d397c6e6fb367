"""`tiltlm doctor MODEL`: what a model is, how it may be run, and what it will need.

The self-test (`models/selftest.py`) is run anew, whatever was found before. Exit status 0: the model can be used; 2: it
cannot, and the table's last line says why.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from tiltlm.commands.arguments import settings_from
from tiltlm.commands.models import Decoder, load_decoder
from tiltlm.commands.process import prepare
from tiltlm.models import selftest
from tiltlm.models.backbone import BackboneState
from tiltlm.models.body import Trust, attention_window, most_positions
from tiltlm.models.causal import CausalLM
from tiltlm.models.packing import why_not
from tiltlm.models.prefixes import body_state
from tiltlm.samples import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Doctor:
    """Examine a model folder, a hub name or a finished run."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder or hub name that transformers loads, or a run folder of this library."""

    batch: int = 64
    """Rows at once, for the estimate of memory."""

    length: int = 512
    """Tokens a row, prompt included, for the estimate of memory."""

    device: str = "cpu"
    dtype: str = "float32"


def doctor(args: list[str]) -> int:
    """Run the command."""
    settings = settings_from(args, Doctor, "doctor")
    if min(settings.batch, settings.length) < 1:
        raise ValueError(
            f"--batch and --length are numbers of rows and tokens, 1 or more; got {settings.batch}, {settings.length}"
        )
    prepare()
    decoder, found = None, []
    try:
        decoder = load_decoder(settings.model, settings.device, settings.dtype, ())
        found = list(_rows(decoder, settings))
        verdict = "yes"
    except ValueError as error:
        verdict = f"no: {error}"
    table = Table("", settings.model, show_edge=False, pad_edge=False)
    for name, text in [*found, ("usable", verdict)]:
        table.add_row(name, text)
    Console(highlight=False).print(table)
    return 0 if verdict == "yes" else 2


def _rows(decoder: Decoder, settings: Doctor) -> Iterator[tuple[str, str]]:
    model, tokenizer = decoder.model, decoder.tokenizer
    if not isinstance(model, CausalLM):
        yield (
            "model",
            f"{type(model).__name__} of this library, over {model.vocab_size} tokens: no network to examine",
        )
        return
    began = time.monotonic()
    trust = selftest.run(model.model)
    seconds = time.monotonic() - began
    size = sum(p.numel() for p in model.model.parameters())
    yield "network", f"{type(model.model).__name__}, {_count(size)} parameters"
    yield "vocabulary", _vocabulary(model, tokenizer)
    yield "end tokens", _ends(model, tokenizer)
    yield "chat template", "yes" if getattr(tokenizer, "chat_template", None) else "none"
    yield "head", _head(model)
    yield "positions", _positions(model.model)
    yield (
        "padding",
        "right-padded rows are as rows alone" if trust.padding else "none: rows of one length together",
    )
    yield "cache", _cache(trust)
    yield "candidates", _candidates(trust)
    yield "packing", why_not(model.model) or "exact"
    yield "dtype, device", f"{str(model.model.dtype).removeprefix('torch.')}, {model.device}"
    yield "adapters", _adapters(model.model)
    yield "memory", _memory(model, trust, settings)
    yield "self-test", f"{seconds:.1f} s"
    if trust.refused:
        raise ValueError(trust.refused)


def _count(n: int) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:.3g} {name}"
    return str(n)


def _vocabulary(model: CausalLM, tokenizer: Any) -> str:
    if tokenizer is None:
        return f"{model.vocab_size} tokens; no tokenizer: prompts are lists of ids"
    known = len(tokenizer)
    if known > model.vocab_size:
        raise ValueError(
            f"its tokenizer knows {known} tokens, the network {model.vocab_size}: they do not belong together"
        )
    more = "" if known == model.vocab_size else f" ({known} of them in the tokenizer)"
    return f"{model.vocab_size} tokens{more}"


def _ends(model: CausalLM, tokenizer: Any) -> str:
    ids = model.eos_ids
    if not ids:
        return "none: every completion is as long as you say"
    names = [str(i) if tokenizer is None else f"{i} {tokenizer.convert_ids_to_tokens(i)}" for i in ids]
    return ", ".join(names)


def _head(model: CausalLM) -> str:
    curve, entry = model.plain_curve, model.entry
    parts = ["linear", "with bias" if model.head.bias is not None else "without bias"]
    parts += [f"states × {entry.factor:.6g}"] if entry.factor != 1 else []
    parts += ["states transformed"] if entry.module is not None else []
    parts += [f"scale {curve.scale:.6g}"] if curve.scale != 1 else []
    parts += [f"soft cap {curve.cap:.6g}"] if curve.cap is not None else []
    parts += [f"the first {curve.entries} of {model.head.out_features} outputs"] if curve.entries else []
    return ", ".join(parts)


def _positions(model: PreTrainedModel) -> str:
    limit, window = most_positions(model), attention_window(model.config)
    text = "no limit named" if limit is None else f"at most {limit} tokens a row"
    return text if window is None else f"{text}; attention window of {window}"


def _cache(trust: Trust) -> str:
    if not trust.cache:
        return f"none, full forward passes (slower): {trust.why}"
    return "right" if trust.reach is None else f"right; beyond {trust.reach} tokens full forward passes"


def _candidates(trust: Trust) -> str:
    if not trust.cache:
        return "a forward pass over whole rows"
    return "all behind a prefix in one pass" if trust.peek else "a row for each"


def _adapters(model: PreTrainedModel) -> str:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }
    here = linear - {
        name.rsplit(".", 1)[-1] for name, m in model.named_modules() if m is model.get_output_embeddings()
    }
    targets = KNOWN.get(model.config.model_type)
    known = sorted(here & set([targets] if isinstance(targets, str) else targets or ()))
    if known:
        return f"LoRA on {', '.join(known)}"
    return f"LoRA needs target modules to be named; its linear layers are {', '.join(sorted(here)) or 'none'}"


@torch.no_grad()
def _memory(model: CausalLM, trust: Trust, settings: Doctor) -> str:
    """Bytes of the parameters, and of keys and values for the batch asked for."""
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters())
    text = f"{_count(weights)}B of parameters"
    if not trust.cache:
        return f"{text}; no cache to keep"
    state = body_state(model.model, Tokens.of([[1]], model.device), 0)
    assert isinstance(state, BackboneState)
    token = sum(store.numel() * store.element_size() for layer in state.layers for store in layer.stores())
    cache = token * settings.batch * settings.length
    return f"{text}; {_count(cache)}B of cache for {settings.batch} rows of {settings.length} tokens"
