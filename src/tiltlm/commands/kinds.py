"""Kinds of settings: what a text on the command line, or a plain value in a file, means as one, and how kinds are shown."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from tiltlm.mistakes import nearest

PLAIN: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", int),
    float: ("a number", float),
    str: ("text", str),
    Path: ("a path", Path),
}
SHOWN = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


def converted(kind: Any, texts: Sequence[str], flag: str) -> Any:
    """The value of a setting of that kind. Raises ValueError that names `flag`, what came and what is expected."""
    kind, origin = bare(kind), typing.get_origin(bare(kind))
    if kind is bool:
        return _switch(texts, flag)
    if origin is tuple:
        return _several(kind, texts, flag)
    if origin in (typing.Union, types.UnionType):
        return _either(kind, texts, flag)
    if len(texts) != 1:
        raise _miscounted(kind, texts, flag)
    if origin is Literal:
        return _choice(kind, texts[0], flag)
    if kind not in PLAIN:
        raise ValueError(f"{flag} cannot be said on the command line")
    try:
        return PLAIN[kind][1](texts[0])
    except ValueError:
        raise ValueError(f"{flag} wants {expected(kind)}; got {texts[0]!r}") from None


def bare(kind: Any) -> Any:
    """A kind without its annotations."""
    return bare(kind.__origin__) if hasattr(kind, "__metadata__") else kind


def _switch(texts: Sequence[str], flag: str) -> bool:
    words = {"true": True, "false": False}
    if not texts:
        return True
    if len(texts) > 1 or texts[0].lower() not in words:
        raise ValueError(f"{flag} is a switch, on (--x) or off (--no-x), or true or false; got {' '.join(texts)}")
    return words[texts[0].lower()]


def _several(kind: Any, texts: Sequence[str], flag: str) -> tuple[Any, ...]:
    """A tuple: of any length, or with a kind for each; of tuples, whose parts follow each other."""
    parts = typing.get_args(kind)
    if len(parts) == 2 and parts[1] is ...:
        inner = bare(parts[0])
        size = len(typing.get_args(inner)) if typing.get_origin(inner) is tuple else 1
        if len(texts) % size:
            raise ValueError(f"{flag} wants {size} values each time ({expected(inner)}); got {' '.join(texts)}")
        return tuple(converted(inner, texts[k : k + size], flag) for k in range(0, len(texts), size))
    if len(texts) != len(parts):
        raise ValueError(f"{flag} wants {expected(kind)}; got {' '.join(texts) or 'nothing'}")
    return tuple(converted(part, [text], flag) for part, text in zip(parts, texts, strict=True))


def _miscounted(kind: Any, texts: Sequence[str], flag: str) -> ValueError:
    came = "nothing" if not texts else f"{len(texts)} values, {' '.join(texts)}"
    return ValueError(f"{flag} wants {expected(kind)}; got {came}")


def _either(kind: Any, texts: Sequence[str], flag: str) -> Any:
    options = [bare(each) for each in typing.get_args(kind)]
    if type(None) in options and len(texts) == 1 and texts[0] in ("None", "none", "null"):
        return None
    if len(texts) != 1:
        options = [each for each in options if typing.get_origin(each) is tuple]
    if not options:
        raise _miscounted(kind, texts, flag)
    errors = []
    for each in options:
        if each is not type(None):
            try:
                return converted(each, texts, flag)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def _choice(kind: Any, text: str, flag: str) -> Any:
    known = {str(each): each for each in typing.get_args(kind)}
    if text not in known:
        raise ValueError(f"{flag} is one of {', '.join(known)}; got {text!r}.{nearest(text, known, 1)}")
    return known[text]


def expected(kind: Any) -> str:
    """A kind in words."""
    kind, parts = bare(kind), typing.get_args(bare(kind))
    if kind in PLAIN:
        return PLAIN[kind][0]
    if typing.get_origin(kind) is tuple:
        return (
            f"{len(parts)} values ({', '.join(expected(part) for part in parts)})"
            if ... not in parts
            else "values"
        )
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, parts))}"
    return " or ".join("none" if part is type(None) else expected(part) for part in parts) or "a value"


def shown(kind: Any) -> str:
    """A kind as it stands behind a flag in a help text."""
    kind, origin = bare(kind), typing.get_origin(bare(kind))
    parts = typing.get_args(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if origin is tuple:
        return f"[{shown(parts[0])} …]" if parts[-1] is ... else " ".join(map(shown, parts))
    if origin in (typing.Union, types.UnionType):
        return "|".join(shown(part) for part in parts if part is not type(None))
    return "" if kind is bool else SHOWN.get(kind, "VALUE")


def texts_of(value: Any) -> list[str]:
    """A plain value of a file as the texts that the command line would have for it."""
    if isinstance(value, list | tuple):
        return [text for each in value for text in texts_of(each)]
    return [str(value)]
