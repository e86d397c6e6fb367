"""Guided decoding and SMC in anybody's `model.generate`: a callable for transformers' `custom_generate`.

>>> import tiltlm as tl
>>> guided = tl.learn(task, tl.CTL())                                                        # doctest: +SKIP
>>> model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=24,
...                custom_generate=tl.generate_with(guided), seed=1)                         # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.api.learning import Learnt
from tiltlm.decoders.sampler import Sampler
from tiltlm.models.base import LanguageModel
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream

STANDARD = ("MaxLengthCriteria", "EosTokenCriteria")
"""Stopping criteria that every call of generate has."""


def generate_with(decoder: LanguageModel | Learnt, batch_size: int = 256) -> Callable[..., Any]:
    """A `custom_generate` that draws by `decoder`: a guided model (`tl.Guided`), any language model of this library, or
    what `tl.learn` returned (SMC and best of n too).

    The callable takes what `generate` hands on, and `seed` (default 0): row r is drawn with the random numbers that
    `tl.draw` gives row r of the stream `tl.stream(seed, "draw")`, those of `Learnt.draw(seed=seed)`. Prompts may be padded
    on the left, with their attention mask. What it returns is what generate returns: prompts and completions, int64
    [N, L + T], ended rows filled up with the pad token. max_new_tokens is generate's; ends are the decoder's own.

    The callable raises ValueError for what would bend the decoder's law or be ignored: logits processors (a temperature,
    top-k, top-p of generate), beams, other stopping criteria, a streamer, a model with another vocabulary.
    """
    found = decoder.model if isinstance(decoder, Learnt) and not isinstance(decoder.method, Sampler) else decoder

    def generated(
        model: Any, input_ids: Tensor, logits_processor: Any = (), stopping_criteria: Any = (),
        generation_config: Any = None, seed: int = 0, **options: Any,
    ) -> Any:  # fmt: skip
        _refuse(model, found, generation_config, logits_processor, stopping_criteria, options)
        prompts = _prompts(input_ids, options.get("attention_mask"))
        most = int(generation_config.max_length) - input_ids.shape[1]
        with torch.no_grad():
            drawn = _drawn(found, prompts, most, seed, batch_size)
        return _returned(drawn, input_ids, generation_config)

    return generated


def _drawn(decoder: LanguageModel | Learnt, prompts: Tokens, most: int, seed: int, batch_size: int) -> Samples:
    """One completion of every prompt, of `most` tokens at most."""
    if isinstance(decoder, Learnt):
        there = replace(decoder, problem=replace(decoder.problem, width=most))
        return there.draw(prompts, seed=seed, batch_size=batch_size)
    own = stream(seed, "draw")
    return draw_in_batches(
        decoder, prompts.to(decoder.device), max_new_tokens=most, stream=own, batch_size=batch_size
    )


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> Tokens:
    """generate's prompts, padded on the left or not at all, as Tokens."""
    if attention_mask is None:
        return Tokens.full(input_ids)
    rows = zip(input_ids, attention_mask.bool(), strict=True)
    return Tokens.of([ids[mask].tolist() for ids, mask in rows], input_ids.device)


def _returned(drawn: Samples, input_ids: Tensor, config: Any) -> Any:
    """Prompts with their completions behind them, as generate returns them."""
    pad = config.pad_token_id
    if pad is None:
        ends = config.eos_token_id
        pad = 0 if ends is None else ends[0] if isinstance(ends, list) else ends
    done = torch.where(drawn.mask, drawn.tokens, pad).to(input_ids.device)
    sequences: Any = torch.cat([input_ids, done], 1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)


def _refuse(
    model: Any,
    decoder: LanguageModel | Learnt,
    config: Any,
    processors: Any,
    criteria: Any,
    options: dict[str, Any],
) -> None:
    """Raise ValueError for what the decoder would not heed."""
    reference = decoder.problem.reference if isinstance(decoder, Learnt) else decoder
    size = int(model.config.get_text_config().vocab_size)
    if size != reference.vocab_size:
        raise ValueError(
            f"the decoder knows {reference.vocab_size} tokens and the model whose generate is called {size}: call that of "
            "the decoder's own reference"
        )
    if config.num_beams != 1 or options.get("streamer") is not None:
        raise ValueError("a decoder draws whole completions: num_beams 1, and no streamer")
    if len(processors):
        raise ValueError(
            f"generate's {type(processors[0]).__name__} would bend the decoder's law, and is not applied: call it with "
            "do_sample=True, temperature=1.0, top_k=0, top_p=1.0 and nothing else of that kind"
        )
    others = [type(each).__name__ for each in criteria if type(each).__name__ not in STANDARD]
    if others:
        raise ValueError(
            f"a decoder ends where its own model ends or at max_new_tokens; {others[0]} is not heeded"
        )
