"""The tokens that end a completion, as a model's own files name them.

Four places may name some, and a model stops at any of them:

    tokenizer            eos_token
    generation_config    eos_token_id, one or several (chat models: end of text, end of turn, end of message)
    config               eos_token_id; unless the tokenizer knows it as an ordinary token (a default nobody set)
    chat template        the special token that the template itself puts behind an assistant's answer

Every end token keeps a probability of its own: a completion's density is that of the very token it ended in. The first
of them is the primary, which is written where an end must be written; it is the tokenizer's eos wherever there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.markup import escape

from tiltlm.models.folders import located
from tiltlm.models.hub import pretrained
from tiltlm.models.reachable import hub_for
from tiltlm.models.templates import end_of_turn
from tiltlm.progress import note


def ends_of(name: str | Path, stop: Sequence[str] = (), option: str = "--stop") -> tuple[int, ...]:
    """The end tokens of the model in a folder, of a hub name or of a run, the primary first; says them once per process.

    stop: counts before everything the model says, if not empty: ids, or texts of single tokens. Raises ValueError that
    names `option` for one that is neither. Empty: nothing ends this model's completions but their length.
    """
    place = located(name)
    return _found(place, tuple(stop), option, _written(Path(place)))


def _written(folder: Path) -> tuple[str, tuple[int, ...]]:
    """Which folder a name stands for, and when its settings were written: another of the same name may have other ends."""
    return str(folder.resolve()), tuple(path.stat().st_mtime_ns for path in sorted(folder.glob("*.json")))


@cache
def _found(name: str, stop: tuple[str, ...], option: str, written: object) -> tuple[int, ...]:
    from transformers import AutoConfig

    size = int(pretrained(AutoConfig, name).get_text_config().vocab_size)
    tokenizer = tokenizer_of(name)
    places = {option: stop_ids(stop, tokenizer, size, option)} if stop else _places(name, tokenizer)
    ids = dict.fromkeys(i for found in places.values() for i in found if 0 <= i < size)
    if ids:
        texts = [str(i) if tokenizer is None else f"{i} {tokenizer.decode([i])!r}" for i in ids]
        note(escape(f"end tokens of {name}: {', '.join(texts)} ({', '.join(_telling(places))})"))
    return tuple(ids)


def tokenizer_of(name: str | Path) -> Any:
    """The tokenizer of a folder, hub name or run; None where there is none."""
    from transformers import AutoTokenizer

    try:
        with hub_for(place := located(name)):
            return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError):
        return None


def _places(name: str, tokenizer: Any) -> dict[str, list[int]]:
    """Ids by the place that names them, in the order of the module's table."""
    from transformers import AutoConfig

    in_config = _listed(pretrained(AutoConfig, name).get_text_config().eos_token_id)
    generation = _generation(name)
    copied = (
        generation is None or generation._from_model_config
    )  # a copy of config's says no more than config does
    return {
        "tokenizer": [] if tokenizer is None else _listed(tokenizer.eos_token_id),
        "generation_config": [] if copied else _listed(generation.eos_token_id),
        "config": in_config if tokenizer is None else [i for i in in_config if i in _special(tokenizer).values()],
        "chat template": _listed(turn_id(tokenizer)),
    }


def _generation(name: str) -> Any:
    from transformers import GenerationConfig

    try:
        with hub_for(name):
            return GenerationConfig.from_pretrained(name)
    except OSError:
        return None


def _listed(ids: Any) -> list[int]:
    """What an eos_token_id holds (nothing, a number, or several), as a list."""
    return [] if ids is None else [int(i) for i in (ids if isinstance(ids, Iterable) else [ids])]


def _telling(places: dict[str, list[int]]) -> list[str]:
    """The places without those that only repeat what the ones before them name."""
    seen: set[int] = set()
    telling = []
    for place, ids in places.items():
        if set(ids) - seen:
            telling.append(place)
        seen.update(ids)
    return telling


def _special(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the tokens that are no ordinary pieces of text: special ones, and those added to the vocabulary."""
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {**tokenizer.get_added_vocab(), **named}


def turn_id(tokenizer: Any) -> int | None:
    """The token in which the chat template ends an assistant's turn; None without one, without template or tokenizer."""
    turn = end_of_turn(tokenizer)
    return None if turn is None else int(tokenizer.convert_tokens_to_ids(turn))


def stop_ids(stop: Sequence[str], tokenizer: Any, vocab_size: int, option: str = "--stop") -> list[int]:
    """Ids of the tokens that `stop` names by number or by text. Raises ValueError for what is no single token."""
    return [_stop_id(text, tokenizer, vocab_size, option) for text in stop]


def _stop_id(text: str, tokenizer: Any, vocab_size: int, option: str) -> int:
    if text.isascii() and text.isdigit():
        if int(text) >= vocab_size:
            raise ValueError(f"{option} {text}: token ids go from 0 to {vocab_size - 1}")
        return int(text)
    if tokenizer is None:
        raise ValueError(
            f"{option} {text!r}: this model has no tokenizer to know the text by: give the token's id"
        )
    ids = [tokenizer.get_vocab().get(text)]
    if ids == [None]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{option} {text!r} is {len(ids)} tokens, {ids}: an end is one token; name it, or its id")
    return int(ids[0])
