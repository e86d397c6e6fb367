"""A recipe's settings as options of the command line, and as JSON: derived from the recipe's own value.

Fields of recipes are annotated with what they may be (any task, any method); what they *are* decides which options there
are. So the value is shown to tyro as a class whose fields have the types of this very value, and read back.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from typing import Any

import tyro

from tiltlm.stages.cells import Cell
from tiltlm.stages.evaluate import Evaluate

HIDDEN = ("called", "purpose", "cells")
"""Fields of recipes that the recipe's name decides."""


def option(name: str) -> str:
    return name.replace("_", "-")


def attribute(name: str) -> str:
    return name.replace("-", "_")


def parsed(recipe: Any, args: Sequence[str], prog: str) -> Any:
    """`recipe` with what the options in `args` say. Leaves the process, as tyro does, after help or a mistake."""
    args = shared(recipe, list(args)) if isinstance(recipe, Evaluate) else list(args)
    shown = shadow(recipe)
    found = tyro.cli(type(shown), prog=prog, default=shown, args=args, description=type(recipe).__doc__)
    return unshadowed(found, recipe)


def shadow(value: Any) -> Any:
    """`value` as a dataclass whose fields have the types that they have in it."""
    if not _polymorphic(value):
        return value
    made: list[Any] = []
    for f, kind in _shown(value):
        own = getattr(value, f.name)
        inner = shadow(own) if is_dataclass(own) else own
        made.append((f.name, type(inner) if is_dataclass(own) else kind, field(default=inner)))
    for name, cell in value.cells.items() if isinstance(value, Evaluate) else ():
        inner = shadow(cell)
        made.append((attribute(name), type(inner), field(default=inner)))
    return make_dataclass(type(value).__name__, made, frozen=True)()


def _shown(value: Any) -> list[tuple[Any, Any]]:
    """The fields that are options, with their annotations."""
    hints = typing.get_type_hints(type(value), include_extras=True)
    top = not isinstance(value, Cell)
    found = [(f, hints[f.name]) for f in fields(value) if not (top and f.name in HIDDEN)]
    return [(f, kind) for f, kind in found if getattr(value, f.name) is not None or not _optional_settings(kind)]


def _optional_settings(kind: Any) -> bool:
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else ()
    return any(is_dataclass(option) for option in options)


def _polymorphic(value: Any) -> bool:
    """Whether some field's annotation says less than its value."""
    hints = typing.get_type_hints(type(value))
    return any(
        is_dataclass(own) and (hints[f.name] is not type(own) or _polymorphic(own))
        for f in fields(value)
        if (own := getattr(value, f.name)) is not None
    ) or isinstance(value, Evaluate)


def unshadowed(found: Any, original: Any) -> Any:
    """What was read, in the classes of the original."""
    if type(found) is type(original) or not is_dataclass(original):
        return found
    changed = {
        f.name: unshadowed(getattr(found, f.name), getattr(original, f.name))
        for f in fields(original)  # type: ignore[arg-type]
        if hasattr(found, f.name)
    }
    if isinstance(original, Evaluate):
        cells = {name: getattr(found, attribute(name)) for name in original.cells}
        changed["cells"] = {name: unshadowed(cell, original.cells[name]) for name, cell in cells.items()}
    return replace(original, **changed)  # type: ignore[type-var]


SHARED = ("fit", "feed", "net")
"""Groups of settings that, said without a method's name, are said to all methods of a comparison that have them."""


def shared(recipe: Evaluate, args: list[str]) -> list[str]:
    """The arguments, `--fit.steps 10` spelt out for every method of the comparison that has such a setting."""
    out: list[str] = []
    k = 0
    while k < len(args):
        flag, equals, value = args[k].partition("=")
        group, _, rest = flag.removeprefix("--").removeprefix("no-").partition(".")
        if not (flag.startswith("--") and group in SHARED and rest):
            out.append(args[k])
            k += 1
            continue
        values = [value] if equals else []
        while not equals and k + 1 < len(args) and not args[k + 1].startswith("--"):
            values.append(args[k := k + 1])
        out += _spelt_out(recipe, flag, rest, values)
        k += 1
    return out


def _spelt_out(recipe: Evaluate, flag: str, rest: str, values: list[str]) -> list[str]:
    group = flag.removeprefix("--").partition(".")[0]
    owners = [name for name, cell in recipe.cells.items() if has(getattr(cell, group), rest.split("."))]
    if not owners:
        raise ValueError(f"no method of this comparison ({', '.join(recipe.methods)}) has the setting {flag}")
    return [part for name in owners for part in (f"--{name}.{group}.{rest}", *values)]


def has(value: object, path: Sequence[str]) -> bool:
    """Whether settings have an option of that path."""
    name = attribute(path[0]).removeprefix("no_")
    if not hasattr(value, name):
        return False
    return len(path) == 1 or has(getattr(value, name), path[1:])


def methods_in(args: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """What `--methods a b c` names (None: nothing), and the other arguments."""
    if "--methods" not in args:
        return None, list(args)
    start = list(args).index("--methods")
    end = start + 1
    while end < len(args) and not args[end].startswith("-"):
        end += 1
    if end == start + 1:
        raise ValueError("--methods wants names, --methods ctl dpo say; `tiltlm list` shows them")
    return list(args[start + 1 : end]), [*args[:start], *args[end:]]


def from_json(default: Any, value: Any, where: str = "") -> Any:
    """Settings read back from JSON, in the classes that `default` has. Raises ValueError for what does not belong there."""
    if isinstance(default, Mapping) and isinstance(value, Mapping):
        return {name: from_json(default[name], each, f"{where}{name}.") for name, each in value.items()}
    if is_dataclass(default) and isinstance(value, Mapping):
        known = {f.name for f in fields(default)}
        unknown = sorted(set(value) - known)
        if unknown:
            raise ValueError(f"there is no setting {where}{unknown[0]}: written by another version?")
        hints = typing.get_type_hints(type(default))
        changed = {
            name: _plain(hints[name], each)
            if not isinstance(each, Mapping)
            else from_json(getattr(default, name), each, f"{where}{name}.")
            for name, each in value.items()
        }
        return replace(default, **changed)  # type: ignore[type-var]
    return value


def _plain(kind: Any, value: Any) -> Any:
    """Lists as the tuples that annotations ask for."""
    if not isinstance(value, list):
        return value
    args = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        tuples = [option for option in args if typing.get_origin(option) is tuple]
        return _plain(tuples[0], value) if tuples else value
    if typing.get_origin(kind) is not tuple or not args:
        return tuple(value)
    return tuple(_plain(args[0] if args[-1] is ... else args[k], each) for k, each in enumerate(value))
