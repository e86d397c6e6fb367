"""Devices by name, looked at before any work: `cpu`, `cuda`, `cuda:N`, `mps`, `auto`.

Every command and every recipe setting called `device` goes through `device_of`, and `check_devices` asks it for all
settings of a recipe before the first of its runs begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, get_type_hints

import torch

from tiltlm import ranks
from tiltlm.progress import note

KNOWN = ("cpu", "cuda", "cuda:N", "mps", "auto")

OTHER_WORDS = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "metal": "mps", "apple": "mps"}
"""What devices are called elsewhere, and here."""


def device_of(name: str, option: str = "--device") -> torch.device:
    """The device called `name`; auto: cuda, else mps, else cpu, and which it is is said once.

    Of several processes (`ranks`) each gets a GPU of its own for `cuda`. Raises ValueError that names `option`, for a
    name that is none of `KNOWN` and for a device that is not there.
    """
    if name == "auto":
        return _best()
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"{option} {name}: there is no such device.{_hint(name)} Known: {', '.join(KNOWN)}")
    name = _own(name, option)
    if reason := why_not(name):
        raise ValueError(f"{option} {name}: {reason}; take cpu or auto")
    return torch.device(name)


def _own(name: str, option: str) -> str:
    """This process's device of a kind, where several run."""
    if ranks.size() == 1 or not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise ValueError(
            f"{option} {name}: {ranks.size()} processes cannot share one GPU; take cuda: each gets its own"
        )
    return f"cuda:{ranks.local()}"


def why_not(name: str) -> str:
    """Why the device called `name` (no `auto`) can't be computed on here; empty if it can."""
    kind, _, number = name.partition(":")
    if kind == "cuda":
        return _why_no_cuda(int(number or 0))
    if kind == "mps" and not torch.backends.mps.is_available():
        return "this machine has no Metal device that torch can use"
    try:
        torch.zeros(1, dtype=torch.float64, device=name)
    except (TypeError, RuntimeError):
        return f"{kind} computes no float64, in which draws and weights are kept"
    return ""


def _why_no_cuda(number: int) -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "torch sees no GPU here" if built else "the installed torch was built without CUDA"
    count = torch.cuda.device_count()
    if number < count:
        return ""
    return f"there {'is 1 GPU, cuda:0' if count == 1 else f'are {count} GPUs, cuda:0 to cuda:{count - 1}'}"


@cache
def _best() -> torch.device:
    found = next(name for name in ("cuda", "mps", "cpu") if not why_not(name))
    note(f"device: {found} (auto)")
    return torch.device(_own(found, "--device"))


def _hint(name: str) -> str:
    word = name.lower()
    numbered = re.fullmatch(r"(?:cuda|gpu)[:_ -]?(\d+)", word)
    near = (
        [f"cuda:{numbered[1]}"] if numbered else get_close_matches(word, [*KNOWN, *OTHER_WORDS], n=1, cutoff=0.5)
    )
    return f" Did you mean {OTHER_WORDS.get(near[0], near[0])}?" if near else ""


def check_devices(settings: Any) -> None:
    """Raise `device_of`'s ValueError for the first device that a recipe's settings name in vain."""
    for option, name in _devices(settings, "--"):
        device_of(name, option)


def _devices(settings: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(option, value) of every field called `device`, at any depth."""
    hints = get_type_hints(type(settings), include_extras=True)
    for field in fields(settings):
        value = getattr(settings, field.name)
        option = prefix + field.name.replace("_", "-")
        if field.name == "device":
            yield option, value
        elif is_dataclass(value):
            yield from _devices(value, prefix if _flat(hints[field.name]) else f"{option}.")


def _flat(hint: Any) -> bool:
    """Whether a group's settings stand beside those around it on the command line (`tyro.conf.arg(name="")`)."""
    return any(getattr(extra, "name", None) == "" for extra in getattr(hint, "__metadata__", ()))
