"""Pretrained parts by name, with one clear error where there is no such thing: a folder, a hub name, or a run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from tiltlm.jsonl import read_json
from tiltlm.models.folders import located
from tiltlm.models.reachable import hub_for
from tiltlm.models.scattered import is_wanted
from tiltlm.models.scattering import load

if TYPE_CHECKING:
    import torch

WEIGHTS = ("*.safetensors", "*.bin")


def pretrained(kind: Any, name: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained(name)`. Raises ValueError that names what was looked for, soon if the hub is silent."""
    from huggingface_hub.errors import StrictDataclassError

    place = located(name)
    config = Path(place) / "config.json"
    if config.is_file() and not isinstance(read_json(config), dict):
        raise ValueError(f"{config}: a model's settings are an object; this is something else")
    try:
        with hub_for(place) as silence:
            return kind.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError, StrictDataclassError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if silence and isinstance(error, OSError):
            reason = f"not all of it is here, and the hub cannot be reached: {silence}"
        raise ValueError(
            f"{str(name)!r} is no folder or hub name that transformers can load: {reason} "
            "(without a network, download the model elsewhere and name its folder)"
        ) from None


def network(
    kind: Any, name: str | Path, device: torch.device | str, examine: Callable[[Any], Any], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The network called `name` on a device, and what transformers says of its loading; in parts where that is wanted
    (`scattered`). examine: the self-test, which wants the network whole; it raises for one that cannot be used."""

    def read() -> tuple[Any, dict[str, Any]]:
        return pretrained(kind, name, output_loading_info=True, **options)

    if is_wanted():
        return load(read, device, examine)
    found, said = read()
    return found.to(device), said


def config_of(name: str | Path) -> Any:
    """The configuration of the model called `name`, its weights unread: whether there is such a model, before any work.

    Raises ValueError where there is none, and for a folder of adapters or without weights.
    """
    from transformers import AutoConfig

    folder = Path(located(name))
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{name} holds adapters alone: name a folder in which they are merged into their model")
    config = pretrained(AutoConfig, name)
    if folder.is_dir() and not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(f"{name} holds a model's config.json and no weights ({', '.join(WEIGHTS)})")
    return config
