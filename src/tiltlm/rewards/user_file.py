"""A reward of your own: FILE.py:FUNCTION, a function of texts."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def function_of(name: str) -> Callable[..., Any]:
    """The function called FILE.py:FUNCTION. Raises FileNotFoundError or ValueError that say what is missing."""
    path, _, function = name.rpartition(":")
    file = Path(path)
    if not path.endswith(".py") or not function:
        raise ValueError(f"a reward of your own is named FILE.py:FUNCTION; got {name!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"{file}: no such file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = vars(module).get(function)
    if not callable(found):
        have = ", ".join(each for each, value in vars(module).items() if callable(value)) or "none"
        raise ValueError(f"{file} has no function {function!r}; it has {have}")
    return found


def call(name: str, function: Callable[..., Any], *arguments: Any) -> list[float]:
    """What the user's function returns, as numbers. Raises ValueError that says where it failed, and how it was called."""
    try:
        return [float(value) for value in function(*arguments)]
    except Exception as error:
        own = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename.endswith(_file_of(name).name)
        ]
        where = f" at line {own[-1].lineno}" if own else ""
        raise ValueError(
            f"{name} failed{where}: {type(error).__name__}: {error} (it was called with {_said(arguments)}, and must "
            "return a list of numbers)"
        ) from error


def _said(arguments: tuple[Any, ...]) -> str:
    """What a reward is called with: `tiltlm score` hands it the lines, everything else prompts and completions."""
    return "1 argument, the lines as dicts" if len(arguments) == 1 else "2 arguments, prompts and completions"


def _file_of(name: str) -> Path:
    return Path(name.rpartition(":")[0])
