"""Settings in files: `--config FILE` reads a recipe's settings from YAML or JSON, `--save-config FILE` writes them.

    recipe: animals/ctl          the recipe, unless the command line names one
    task: {beta: 0.5}            settings nest as the options do: --task.beta; or all of them under `settings`
    fit: {lr: 1e-3}

A run's own config.json is such a file. What the command line says comes after the file, and wins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltlm.commands.earlier import refuse_earlier
from tiltlm.commands.kinds import converted, texts_of
from tiltlm.commands.options import attribute, changed, near_options, option, settings_of
from tiltlm.jsonl import write_whole
from tiltlm.progress import note
from tiltlm.rewards.masking import is_masked, without_secrets

ABOUT = ("recipe", "settings", "files")
"""Keys of a file that are no settings."""


@dataclass(frozen=True)
class Config:
    """What a file says: the recipe's name (may be empty), settings by place, and the text to find lines in."""

    path: Path
    text: str
    recipe: str
    settings: Mapping[str, Any]

    @property
    def methods(self) -> list[str] | None:
        """The methods of a comparison, where it names some. Raises ValueError where they are no names."""
        found = self.settings.get("methods")
        names = found.split() if isinstance(found, str) else found
        if names is not None and not (
            isinstance(names, list) and names and all(isinstance(x, str) for x in names)
        ):
            raise ValueError(f"{self.at(['methods'])}: methods are names, [ctl, dpo] say; got {found!r:.40}")
        return names

    def at(self, keys: Sequence[str]) -> str:
        """The file and the line where these keys stand."""
        where, line = 0, 1
        for key in keys:
            found = re.compile(rf"""(?m)(^|[\s{{,]){re.escape(key)}["']?\s*:""").search(self.text, where)
            found = found or re.compile(rf"""["']{re.escape(key)}["']\s*:""").search(self.text, where)
            if found is None:
                break
            where = found.end()
            line = self.text.count("\n", 0, where) + 1
        return f"{self.path}, line {line}"


def read(path: Path) -> Config:
    """The file's content. Raises ValueError for what is no such file, FileNotFoundError where there is none."""
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        form = "JSON" if path.suffix == ".json" else "YAML"
        raise ValueError(f"{path}: no {form}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(
            f"{path}: settings are names with values, `fit: {{lr: 0.001}}` say; this is something else"
        )
    refuse_earlier(found, path)
    settings = found.get("settings", {name: value for name, value in found.items() if name not in ABOUT})
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: `settings` are names with values; got {settings!r:.40}")
    return Config(path, text, str(found.get("recipe") or ""), settings)


def applied(config: Config, recipe: Any) -> Any:
    """`recipe` with the file's settings. Raises ValueError, naming the file's line, for what does not belong there."""
    found = settings_of(recipe)
    known = {".".join(each.path): each for each in found} | {each.flag: each for each in found}
    known |= {attribute(each.flag): each for each in found}
    said: dict[tuple[str, ...], Any] = {}
    compared = getattr(recipe, "methods", None)  # those of the command line, or else the file's
    left_out = set() if compared is None else {"methods", *(config.methods or ())} - set(compared)
    for keys, value in _plain(config.settings, known):
        name = ".".join(keys)
        if keys[keys[0] == "cells" and len(keys) > 1] in left_out:
            continue
        each = known.get(name) or known.get(attribute(name))
        if each is None and _nothing(value):
            continue  # an empty group, or one that is not there (null)
        if each is None:
            near = near_options(option(name), [each.flag for each in found if not each.hidden], 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{config.at(keys)}: {recipe.name} has no setting {name}.{hint}")
        said[each.path] = _value(each.kind, value, f"{config.at(keys)}: {name}")
    return changed(recipe, said)


def _nothing(value: Any) -> bool:
    return value is None or value == {}


def _plain(settings: Mapping[str, Any], known: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[Any]:
    """(keys, value) of everything that is no group of others."""
    for name, value in settings.items():
        keys = (*before, *str(name).split("."))
        if isinstance(value, dict) and value and ".".join(keys) not in known:
            yield from _plain(value, known, keys)
        else:
            yield keys, value


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(value, dict):
        raise ValueError(f"{where} is one setting, no group of them")
    if value is None or (isinstance(value, str) and kind in (str, "str")):
        return value
    return converted(kind, texts_of(value), where)


def say_masked(recipe: Any) -> None:
    """Say which settings are URLs that have lost their credentials, as in a run's config.json."""
    for each in settings_of(recipe):
        urls = re.findall(r"https?://\S+", each.value) if isinstance(each.value, str) else []
        if any(is_masked(url) for url in urls):
            said = "the file holds it without its credentials, masked: a finished run is found, a new one cannot ask it"
            note(f"--{each.flag}: {said}; say it anew")


def save(recipe: Any, path: Path) -> None:
    """Write a recipe's settings; credentials are masked."""
    import yaml

    settings: dict[str, Any] = {}
    for each in settings_of(recipe):
        if not each.hidden:
            *groups, last = each.path if each.path[0] != "cells" else each.path[1:]
            inner = settings
            for name in groups:
                inner = inner.setdefault(name, {})
            inner[last] = _listed(each.value)
    if hasattr(recipe, "methods"):
        settings = {"methods": list(recipe.methods), **settings}
    whole = {"recipe": recipe.name, **without_secrets(settings)}
    as_json = path.suffix == ".json"
    text = json.dumps(whole, indent=1) if as_json else yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
    write_whole(path, text.rstrip("\n") + "\n")


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value
