"""`tiltlm merge FOLDER --out FOLDER`: adapters merged into their model, as a plain folder that anything can load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tiltlm.commands.arguments import settings_from
from tiltlm.commands.models import dtype_called, new_folder
from tiltlm.commands.process import prepare
from tiltlm.models.merging import merged
from tiltlm.progress import note


@dataclass(frozen=True)
class Merge:
    """Merge LoRA adapters, of a language model or a reward model, into the model that they were trained beside."""

    adapters: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTERS")]
    """A folder of adapters (adapter_config.json), or a run that trained a policy of adapters."""

    out: Path
    """The folder to write: a plain model with its tokenizer. It must not be there yet."""

    base: str = ""
    """The model that the adapters belong to: folder, hub name or run (default: what their own settings name)."""

    dtype: str = "float32"
    """Of the weights: float32, bfloat16, float16, float64."""


def merge(args: list[str]) -> int:
    """Run the command."""
    settings = settings_from(args, Merge, "merge")
    aside, dtype = new_folder(settings.out), dtype_called(settings.dtype)
    prepare()
    found = merged(settings.adapters, settings.base, dtype)
    found.save(aside)
    aside.rename(settings.out)
    note(f"{settings.out}: a plain model with its tokenizer, {found.model.num_parameters():,} weights")
    return 0
