"""Models by name for the command line: a transformers folder, a hub name, or a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch

from tiltlm.commands.earlier import refuse_earlier
from tiltlm.commands.options import from_json
from tiltlm.data.chat import is_messages, opened, tools_in
from tiltlm.data.encoding import cut_left
from tiltlm.data.wording import Wording
from tiltlm.device import device_of
from tiltlm.jsonl import read_json
from tiltlm.models.base import LanguageModel, without_end
from tiltlm.models.causal import CausalLM
from tiltlm.models.ends import ends_of, tokenizer_of
from tiltlm.recipes import recipe
from tiltlm.run import Recipe, Run, find
from tiltlm.stages.task import OfTask

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_called(name: str) -> torch.dtype:
    """Raises ValueError, naming those there are."""
    if name not in DTYPES:
        raise ValueError(f"--dtype {name}: weights are of {', '.join(DTYPES)}")
    return DTYPES[name]


def new_folder(out: Path) -> Path:
    """Where to write what becomes the folder `out` by a rename, emptied of what an interrupted command left there. Raises
    FileExistsError where `out` is there already."""
    if out.exists():
        raise FileExistsError(f"{out} is there already: choose another --out, nothing is written over")
    aside = out.with_name(f".{out.name}.tmp")
    rmtree(aside, ignore_errors=True)
    return aside


@dataclass(frozen=True)
class Decoder:
    """A language model with its tokenizer, if it has one, the length its completions must have, if fixed, and the most
    tokens of a prompt that it reads: longer ones lose their front, as in the stages of its run."""

    model: LanguageModel
    tokenizer: Any = None
    most_new_tokens: int | None = None
    room: int | None = None
    wording: Wording = Wording()
    """The template that a run puts around its prompts."""

    def encode(self, prompt: Any, where: str) -> list[int]:
        """Token ids of a prompt given as text or as ids, cut to what is read. Raises ValueError naming `where`."""
        ids = self._ids(prompt, where)
        if not ids:
            raise ValueError(f"{where} has no tokens: a language model needs one to begin with")
        start = None if self.tokenizer is None else self.tokenizer.bos_token_id
        return ids if self.room is None else cut_left(ids, self.room, start)

    def spoken(self, prompt: Any, where: str, row: dict[str, Any]) -> Any:
        """A prompt as it is; messages (with the `tools` of their row) as the text that the chat template makes of them."""
        if not is_messages(prompt):
            return prompt
        try:
            return opened(self.tokenizer, prompt, tools_in(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _ids(self, prompt: Any, where: str) -> list[int]:
        if isinstance(prompt, list) and all(isinstance(i, int) for i in prompt):
            bad = [i for i in prompt if not 0 <= i < self.model.vocab_size]
            if bad:
                raise ValueError(
                    f"{where}: token id {bad[0]} is outside the vocabulary (0 to {self.model.vocab_size - 1})"
                )
            return prompt
        if not isinstance(prompt, str):
            raise ValueError(
                f"{where}: a prompt is text, messages or a list of token ids; got {type(prompt).__name__}"
            )
        if self.tokenizer is None:
            raise ValueError(f"{where} is text, but the model's folder has no tokenizer: give token ids instead")
        return list(self.tokenizer(prompt)["input_ids"])

    def decode(self, row: list[int]) -> str | None:
        """The text of a completion, without the token that ended it; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return str(self.tokenizer.decode(without_end(row, self.model.eos_ids)))


def load_decoder(name: str, device: str, dtype: str, stop: Sequence[str] = ()) -> Decoder:
    """The decoder called `name`. Raises ValueError that says what was looked for."""
    if (Path(name) / "provenance.json").is_file():
        if (device, dtype, *stop) != ("cpu", "float32"):
            raise ValueError(f"{name} is a run: device, dtype and stop are its own; leave those options out")
        return _of_run(load_run(Path(name)))
    weights = dtype_called(dtype)
    place = device_of(device)
    try:
        model = CausalLM.load(name, dtype=weights, device=place, eos_ids=())
    except ValueError as error:
        raise ValueError(f"{name!r} is no run of this library, and {error}") from None
    model.eos_ids = ends_of(name, stop)
    return Decoder(model, tokenizer_of(name))


def _of_run(run: Run[Any]) -> Decoder:
    model = run.recipe.decoder(run)  # first: it says where there is none
    tokenizer, most_new = run.recipe.speech(run)
    if not isinstance(run.recipe, OfTask):
        return Decoder(model, tokenizer, most_new)
    return Decoder(model, tokenizer, most_new, run.recipe.room(run), run.recipe.task.wording)


def recipe_in(stored: Any, config: Path) -> Recipe:
    """The recipe that a config.json holds. Raises ValueError, naming the file, where it holds none."""
    try:
        settings = dict(stored["settings"])
        default = recipe(stored["recipe"], settings.get("methods"))
        files = stored.get("files", {})
        if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
            raise TypeError(f"'files' are names and digests; got {files!r:.40}")
        value: Recipe = from_json(default, settings)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{config}: not the settings of a run ({type(error).__name__}: {error}); run its recipe again"
        ) from None
    return value


def load_run(folder: Path) -> Run[Recipe]:
    """The run in `folder`, with its recipe as it was. Raises ValueError if it is not a finished run."""
    config = folder / "config.json"
    if not (folder / "provenance.json").is_file() or not config.is_file():
        deeper = [path.parent for depth in range(1, 4) for path in folder.glob("*/" * depth + "provenance.json")]
        told = [each for each in deeper if (each / "report.json").is_file()] or deeper
        hint = f"; there are runs deeper down, TASK/STAGE/KEY: name {min(told).parent}/*, say" if told else ""
        raise ValueError(f"{folder} is not a run folder (no config.json and provenance.json in it){hint}")
    if not (folder / "DONE").is_file():
        raise ValueError(f"{folder} is not finished: run the same recipe again to complete it")
    stored = read_json(config)
    refuse_earlier(stored, folder)
    value = recipe_in(stored, config)
    found = find(value, folder.resolve().parents[2], stored.get("files"))
    if found.folder.resolve() != folder.resolve():
        raise ValueError(f"{folder} was moved or made by another version: its settings belong to {found.folder}")
    return found
