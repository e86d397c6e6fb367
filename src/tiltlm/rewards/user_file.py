"""A reward of your own: FILE.py:FUNCTION, a function f(prompts, completions, **columns) -> numbers.

prompts, completions: lists of N texts, row by row. columns: what else the rows have, as lists of N too, and only those
that the function names (`def f(prompts, completions, answer)`) or, with **columns, all of them. A column without a default
must be there. Parameters called `prompts` and `completions` are given by name, so their order is free; others are given in
the order prompts, completions. What it may return: see `numbers`.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import Parameter
from os.path import isfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tiltlm.models.scattered import in_parts
from tiltlm.rewards.of_texts import Column, Columns, OfTexts

SIGNATURE = "f(prompts, completions, **columns)"
HOW = (
    f"a reward is {SIGNATURE}: a list of prompts, a list of completions and, where it names them or has **columns, "
    "the rows' other columns as lists; it returns one number for each completion"
)


class Call(NamedTuple):
    """A function, the columns it takes, and whether prompts and completions are given to it by name."""

    function: Callable[..., Any]
    columns: Columns = Columns()
    by_name: bool = False


@dataclass(frozen=True)
class UserFunction(OfTexts):
    """The function called `name`, FILE.py:FUNCTION, called as the module says."""

    name: str
    reads_text: ClassVar[bool] = False

    @cached_property
    def call(self) -> Call:
        """Raises FileNotFoundError or ValueError that say what is missing or wrong."""
        function = function_of(self.name)
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:  # a function of C without a text signature: it is taken at its word
            return Call(function)
        return Call(function, *_read(self.name, parameters))

    @property
    def columns(self) -> Columns:
        return self.call.columns

    @property
    def files(self) -> tuple[str, ...]:
        return (self.name.rpartition(":")[0],)

    def check(self) -> None:
        _ = self.call

    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> Any:
        """Whatever the function returns. Raises ValueError that says where it failed."""
        function, takes, by_name = self.call
        given = takes.of(columns)
        try:
            with in_parts(False):  # who has rows to ask about may be the only one that reads a network there
                if by_name:
                    found = function(prompts=prompts, completions=completions, **given)
                else:
                    found = function(prompts, completions, **given)
                return list(found) if inspect.isgenerator(found) else found
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.name} failed{self._line(error)}: {said} ({HOW})") from error

    def _line(self, error: Exception) -> str:
        """Where in the user's file an error arose, for a sentence."""
        file = Path(self.name.rpartition(":")[0]).name
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == file]
        return f" at line {own[-1].lineno}" if own else ""


def _read(name: str, parameters: Mapping[str, Parameter]) -> tuple[Columns, bool]:
    """The columns that a signature takes, and whether prompts and completions are given by name."""
    named = {
        k: p for k, p in parameters.items() if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    }
    rest = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    by_name = "completions" in named and ("prompts" in named or rest)
    if by_name:
        others = {k: p for k, p in named.items() if k not in ("prompts", "completions")}
        unnamed = [p for p in parameters.values() if p.kind is Parameter.POSITIONAL_ONLY]
    else:
        first, others, unnamed = _by_position(parameters)
        if first < 2:
            raise ValueError(f"{name} takes {_arguments(parameters)}: {HOW}")
    needed = [p.name for p in unnamed if p.default is Parameter.empty]
    if needed:
        raise ValueError(f"{name} takes {needed[0]!r} by position alone, and columns are given by name: {HOW}")
    required = tuple(k for k, p in others.items() if p.default is Parameter.empty)
    return Columns(required, tuple(k for k in others if k not in required), rest), by_name


def _by_position(parameters: Mapping[str, Parameter]) -> tuple[int, dict[str, Parameter], list[Parameter]]:
    """How many of two positions there are, the parameters that can be named behind them, and those that cannot."""
    places = [
        p for p in parameters.values() if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    many = any(p.kind is Parameter.VAR_POSITIONAL for p in parameters.values())
    later = [p for p in parameters.values() if p not in places[:2]]
    named = {p.name: p for p in later if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    return (2 if many else min(2, len(places))), named, [p for p in later if p.kind is Parameter.POSITIONAL_ONLY]


def _arguments(parameters: Mapping[str, Parameter]) -> str:
    names = ", ".join(parameters)
    return f"one argument ({names})" if len(parameters) == 1 else f"({names})" if parameters else "no argument"


def function_of(name: str) -> Callable[..., Any]:
    """The function called FILE.py:FUNCTION. Raises FileNotFoundError or ValueError that say what is missing."""
    path, _, function = name.rpartition(":")
    file = Path(path)
    if not path.endswith(".py") or not function:
        raise ValueError(f"a reward of your own is named FILE.py:FUNCTION; got {name!r}")
    if not isfile(file):
        raise FileNotFoundError(f"{file}: no such file")
    about = file.stat()
    names = _names_in(file.resolve(), about.st_mtime_ns, about.st_size)
    found = names.get(function)
    if not callable(found):
        have = ", ".join(each for each, value in names.items() if callable(value)) or "none"
        raise ValueError(f"{file} has no function {function!r}; it has {have}")
    return found


@cache
def _names_in(file: Path, changed: int, size: int) -> dict[str, Any]:
    """What a file of Python defines, run once as long as it does not change. Raises ValueError for one that fails."""
    spec = importlib.util.spec_from_file_location(f"tiltlm_own_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of its own look their module up there
    try:
        with in_parts(False):
            spec.loader.exec_module(module)
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = error.lineno if isinstance(error, SyntaxError) else own[-1].lineno if own else None
        where = f":{line}" if line else ""
        raise ValueError(f"{file}{where} cannot be imported: {type(error).__name__}: {error}") from error
    return vars(module)
