"""Settings that an earlier version wrote: known by a field that none has any more, and refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiltlm.recipes import tasks

RENAMED = {"untrained": "reference"}
"""Stages that have another name by now."""


def refuse_earlier(stored: Any, where: Path) -> None:
    """Raise ValueError for settings of an earlier version, saying how to make the run again."""
    settings = stored.get("settings") if isinstance(stored, Mapping) else None
    if not isinstance(settings, Mapping) or "family" not in settings:
        return
    family, _, stage = str(stored.get("recipe", "")).partition("/")
    now = next((name for name in (family, family.removesuffix("-small")) if name in tasks()), "")
    again = f"`tiltlm run {now}/{RENAMED.get(stage, stage)}`" if now else "`tiltlm list` shows what there is"
    raise ValueError(
        f"{where} was made by an earlier version, whose settings had other names: make it anew, {again}"
    )
