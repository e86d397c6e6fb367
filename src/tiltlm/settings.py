"""Settings are frozen dataclasses that nest. This module says which of them a result depends on."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

SPEED: dict[str, Any] = {"speed": True}
"""The metadata of a setting that changes how fast a result is made, not which: no part of a key."""

ADDED: dict[str, Any] = {"added": True}
"""The metadata of a setting that at its default is no part of a key: one that came later, so that older runs are found as
before, or one that decides which random numbers are drawn and no more."""


def hashed(value: Any) -> Any:
    """What a key is a hash of: `asdict` and the classes' names, without `SPEED` settings, and without `ADDED` ones that
    have their default."""
    if is_dataclass(value) and not isinstance(value, type):
        found = ((f, getattr(value, f.name)) for f in fields(value) if not f.metadata.get("speed"))
        kept = {f.name: hashed(x) for f, x in found if not (f.metadata.get("added") and x == f.default)}
        return {"": type(value).__name__, **kept}
    if isinstance(value, (list, tuple)):
        return [hashed(each) for each in value]
    return {name: hashed(each) for name, each in value.items()} if isinstance(value, dict) else value


def at_least_one(settings: Any, *names: str) -> None:
    """Raise ValueError for settings that must be 1 or more and are not."""
    for name in names:
        value = getattr(settings, name)
        if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"{option} of {type(settings).__name__} must be 1 or more; got {value}")
