"""A recipe's settings as options of the command line, and as JSON: derived from the recipe's own value.

Fields of recipes are annotated with what they may be (any task, any method); what they *are* decides which options there
are. So the value is walked, down to the plain settings in it: each has a flag (`--fit.lr`), a place, a kind and a value.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any

import tyro

from tiltlm.commands.kinds import converted
from tiltlm.feeds import TwistFeed
from tiltlm.stages.cells import Cell
from tiltlm.stages.evaluate import Evaluate
from tiltlm.stages.examine import Examine
from tiltlm.stages.learn import Learn
from tiltlm.stages.measure import Measure
from tiltlm.stages.rounds import Round

HIDDEN = ("called", "purpose", "methods")
"""Fields of recipes that are no options: the recipe's name decides them, or `--methods`."""

SHARED = ("fit", "feed", "net")
"""Groups of settings that, said without a method's name, are said to all methods of a comparison that have them."""


@dataclass(frozen=True)
class Setting:
    """One option.

    flag     its name on the command line, without the dashes: fit.batch-size
    path     where it stands in the recipe: (fit, batch_size)
    kind     what its field is annotated with
    owner    the class of the settings that it is a field of
    hidden   whether it is no option, and only part of a whole recipe's JSON
    """

    flag: str
    path: tuple[str, ...]
    kind: Any
    value: Any
    owner: type
    hidden: bool = False


def option(name: str) -> str:
    return name.replace("_", "-")


def attribute(name: str) -> str:
    return name.replace("-", "_")


# ---- what settings there are ------------------------------------------------------------------------------------


def settings_of(recipe: Any) -> list[Setting]:
    """Every plain setting of a recipe, in the order of its fields."""
    return list(_walk(recipe, (), (), False))


def _walk(value: Any, flag: tuple[str, ...], path: tuple[str, ...], hidden: bool) -> Iterator[Setting]:
    idle = _trains_nothing(value)
    for f in fields(value):
        kind, own, here = _hints(value.__class__)[f.name], getattr(value, f.name), (*path, f.name)
        unseen = hidden or _suppressed(kind) or (not path and f.name in HIDDEN) or (idle and f.name in SHARED)
        named = flag if _flat(kind) else (*flag, option(f.name))
        if isinstance(own, Mapping):
            for name, each in own.items():
                yield from _walk(each, (*flag, name), (*here, name), unseen)
        elif is_dataclass(own):
            yield from _walk(own, named, here, unseen)
        else:
            unseen = unseen or (own is None and _optional_settings(kind))
            yield Setting(".".join(named), here, kind, own, type(value), unseen)


def _trains_nothing(value: Any) -> bool:
    return isinstance(value, Cell | Measure | Examine) and value.method.trained().trains == "nothing"


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _suppressed(kind: Any) -> bool:
    return typing.get_args(tyro.conf.Suppress[str])[1] in getattr(kind, "__metadata__", ())


def _flat(kind: Any) -> bool:
    """Whether a group's settings stand under the name of what it is part of."""
    return any(getattr(each, "name", None) == "" for each in getattr(kind, "__metadata__", ()))


def _optional_settings(kind: Any) -> bool:
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else ()
    return any(is_dataclass(option) for option in options)


def by_flag(recipe: Any) -> dict[str, list[Setting]]:
    """The settings that each option says something to: one, or those of all methods of a comparison."""
    found: dict[str, list[Setting]] = {}
    for each in settings_of(recipe):
        if not each.hidden:
            found.setdefault(each.flag, []).append(each)
            if isinstance(recipe, Evaluate) and each.path[0] == "cells" and _shared(recipe, *each.path[1:]):
                found.setdefault(each.flag.partition(".")[2], []).append(each)
    return found


def _shared(recipe: Evaluate, method: str, group: str, *name: str) -> bool:
    """Whether what is said to all methods is said to this setting of one: not a twist's batch size, which does nothing."""
    batch = (group, *name) == ("fit", "batch_size")
    return group in SHARED and not (batch and isinstance(recipe.cells[method].feed, TwistFeed))


# ---- what the command line says ---------------------------------------------------------------------------------


def parsed(recipe: Any, args: Sequence[str], others: Iterable[str] = ()) -> Any:
    """`recipe` with what the options in `args` say. Raises ValueError, in one line, for what is no option or no value.

    others: options of the command itself, which a misspelt one may have meant.
    """
    known, said = by_flag(recipe), {}
    for flag, values in _spoken(args):
        name, plain = _named(flag, values, known)
        if name not in known:
            raise ValueError(no_option(flag, recipe, [*known, *others]))
        for each in known[name]:
            said[each.path] = converted(each.kind, plain, f"--{name}")
    return changed(recipe, said)


def _spoken(args: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(--flag, its values) in their order."""
    k = 0
    while k < len(args):
        flag, equals, value = args[k].partition("=")
        if not flag.startswith("--"):
            raise ValueError(f"{args[k]!r} is no option: options begin with --, and a value follows its option")
        values, k = ([value] if equals else []), k + 1
        while not equals and k < len(args) and not args[k].startswith("--"):
            values.append(args[k])
            k += 1
        yield flag, values


def _named(flag: str, values: list[str], known: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The option's name, and its values; of switches (`--fit.no-x`, `--no-fit.x`) False."""
    name = option(flag.removeprefix("--"))
    group, _, last = name.rpartition(".")
    bare = f"{group}.{last.removeprefix('no-')}".lstrip(".")
    for positive in (bare, name.removeprefix("no-")):
        if name not in known and positive in known and not values:
            return positive, ["False"]
    return name, values


def no_option(flag: str, recipe: Any, known: Iterable[str]) -> str:
    """What is said of an option that there is not: the nearest ones, and the groups they live in."""
    name = option(flag.removeprefix("--"))
    if isinstance(recipe, Learn | Round) and name in by_flag(_measuring(recipe)):
        method = "METHOD" if recipe.method.trains == "value" else recipe.called
        other = f"tiltlm run {recipe.task.name}/{method}"
        return f"{recipe.name} measures nothing: {flag} is an option of `{other}`, which does"
    near = near_options(name, list(known))
    where = [f"--{each} (in {each.rpartition('.')[0]})" if "." in each else f"--{each}" for each in near]
    hint = f" Did you mean {' or '.join(where)}?" if near else ""
    return f"{recipe.name} has no option {flag}.{hint} `tiltlm run {recipe.name} --help-all` lists them"


def _measuring(recipe: Learn | Round) -> Measure:
    """What measures the result of a training."""
    return Measure(recipe.task, recipe.method, recipe.feed, recipe.fit, recipe.net, called=recipe.called)


def near_options(name: str, known: Sequence[str], n: int = 2) -> list[str]:
    """The options that `name` may have meant: those of that last name in other groups first, then those spelt like it."""
    from difflib import get_close_matches

    last = name.rpartition(".")[2]
    short = sorted(known, key=lambda each: (not each.startswith("fit."), each.count(".")))  # training's come first
    same = [each for each in short if each.rpartition(".")[2] == last]
    if same:
        group = name.rpartition(".")[0]
        return ([each for each in same if group and group in each] or same)[:1]
    whole = get_close_matches(name, known, n=n, cutoff=0.75)
    ends = get_close_matches(last, [each.rpartition(".")[2] for each in short], n=1, cutoff=0.6)
    return whole or [each for each in short if each.rpartition(".")[2] in ends][:n]


def changed(value: Any, said: Mapping[tuple[str, ...], Any]) -> Any:
    """`value` with other settings at these places; what is said is looked at together, not one by one."""
    if () in said:
        return said[()]
    if not said:
        return value
    parts: dict[str, dict[tuple[str, ...], Any]] = {}
    for path, new in said.items():
        parts.setdefault(path[0], {})[path[1:]] = new
    if isinstance(value, Mapping):
        return {name: changed(each, parts.get(name, {})) for name, each in value.items()}
    return replace(value, **{name: changed(getattr(value, name), part) for name, part in parts.items()})


def methods_in(args: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """What `--methods a b c` names (None: nothing), and the other arguments."""
    start = next((k for k, arg in enumerate(args) if arg.partition("=")[0] == "--methods"), None)
    if start is None:
        return None, list(args)
    end, names = start + 1, list(filter(None, args[start].partition("=")[2].split()))
    while not names and end < len(args) and not args[end].startswith("-"):
        end += 1
    names = names or list(args[start + 1 : end])
    if not names:
        raise ValueError("--methods wants names, --methods ctl dpo say; `tiltlm list` shows them")
    return names, [*args[:start], *args[end:]]


# ---- JSON -------------------------------------------------------------------------------------------------------


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
        made = {
            name: _plain(hints[name], each)
            if not isinstance(each, Mapping)
            else from_json(getattr(default, name), each, f"{where}{name}.")
            for name, each in value.items()
        }
        return replace(default, **made)  # type: ignore[type-var]
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
