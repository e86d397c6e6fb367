"""Pretrained parts by folder or hub name, with one clear error where there is no such thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from tiltlm.jsonl import read_json


def pretrained(kind: Any, name: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained(name)`. Raises ValueError that names what was looked for."""
    config = Path(name) / "config.json"
    if config.is_file() and not isinstance(read_json(config), dict):
        raise ValueError(f"{config}: a model's settings are an object; this is something else")
    try:
        return kind.from_pretrained(str(name), **options)
    except (OSError, StrictDataclassError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{str(name)!r} is no folder or hub name that transformers can load: {reason} "
            "(without a network, download the model elsewhere and name its folder)"
        ) from None
