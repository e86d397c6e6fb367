"""Models by name for the command line: a transformers folder, a hub name, or a finished run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiltlm.jsonl import read_json
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.recipes import recipe
from tiltlm.run import Recipe, Run, find, from_json


@dataclass(frozen=True)
class Decoder:
    """A language model with its tokenizer, if it has one, and the length its completions must have, if fixed."""

    model: LanguageModel
    tokenizer: Any = None
    most_new_tokens: int | None = None

    def encode(self, prompt: str | list[int], where: str) -> list[int]:
        """Token ids of a prompt given as text or as ids."""
        if isinstance(prompt, list) and all(isinstance(i, int) for i in prompt):
            bad = [i for i in prompt if not 0 <= i < self.model.vocab_size]
            if bad:
                raise ValueError(
                    f"{where}: token id {bad[0]} is outside the vocabulary (0 to {self.model.vocab_size - 1})"
                )
            return prompt
        if not isinstance(prompt, str):
            raise ValueError(f"{where}: a prompt is text or a list of token ids; got {type(prompt).__name__}")
        if self.tokenizer is None:
            raise ValueError(f"{where} is text, but the model's folder has no tokenizer: give token ids instead")
        return list(self.tokenizer(prompt)["input_ids"])

    def decode(self, row: list[int]) -> str | None:
        """The text of a completion, without the token that ended it; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        body = row[:-1] if row and row[-1] == self.model.eos_id else row
        return str(self.tokenizer.decode(body))


def load_decoder(name: str, device: str, dtype: str, eos_id: int | None) -> Decoder:
    """The decoder called `name`. Raises ValueError that says what was looked for."""
    if (Path(name) / "provenance.json").is_file():
        if (device, dtype, eos_id) != ("cpu", "float32", None):
            raise ValueError(
                f"{name} is a run: device, dtype and end of text are its own; leave those options out"
            )
        return _of_run(load_run(Path(name)))
    try:
        model = CausalLM.load(name, dtype=getattr(torch, dtype), device=device, eos_id=eos_id)
    except ValueError as error:
        raise ValueError(f"{name!r} is no run of this library, and {error}") from None
    tokenizer = _tokenizer(name)
    if eos_id is None and tokenizer is not None:
        model.eos_id = tokenizer.eos_token_id
    return Decoder(model, tokenizer)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None


def _of_run(run: Run[Any]) -> Decoder:
    return Decoder(run.recipe.decoder(run), *run.recipe.speech(run))


def recipe_in(stored: Any, config: Path) -> Recipe:
    """The recipe that a config.json holds. Raises ValueError, naming the file, where it holds none."""
    try:
        kind, settings = type(recipe(stored["recipe"])), dict(stored["settings"])
        dict[str, str](stored.get("files") or {})
        value: Recipe = from_json(kind, settings)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{config}: not the settings of a run ({type(error).__name__}: {error}); run its recipe again"
        ) from None
    return value


def load_run(folder: Path) -> Run[Recipe]:
    """The run in `folder`, with its recipe as it was. Raises ValueError if it is not a finished run."""
    config = folder / "config.json"
    if not (folder / "provenance.json").is_file() or not config.is_file():
        raise ValueError(f"{folder} is not a run folder (no config.json and provenance.json in it)")
    if not (folder / "DONE").is_file():
        raise ValueError(f"{folder} is not finished: run the same recipe again to complete it")
    stored = read_json(config)
    value = recipe_in(stored, config)
    found = find(value, folder.resolve().parents[2], stored.get("files"))
    if found.folder.resolve() != folder.resolve():
        raise ValueError(f"{folder} was moved or made by another version: its settings belong to {found.folder}")
    return found
