"""What ends in one line instead of a traceback: the user's mistakes, and what the machine refuses (a full disk, say)."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches

MISTAKES = (ValueError, OSError, FloatingPointError)
"""Errors that say by themselves what came, what was expected and what to do."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


def one_line(error: Exception) -> str:
    """What the user is told: the error's own text; of the system's errors also what to do."""
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
        return " ".join(str(error).split("\n")) if isinstance(error, UnicodeError) else str(error)
    where, why = f"{error.filename}: " if error.filename else "", error.strerror
    if error.errno in FULL:
        return f"{where}cannot be written: {why}. What was finished before is kept: make room, and the same command goes on"
    if error.errno in REFUSED:
        return f"{where}{why}: give this user the right to it, or name another place; the same command goes on"
    return f"{where}{why}"


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """A question that names the known names nearest to `name`, with a space in front; empty where none is near."""
    near = get_close_matches(name, list(known), n=n, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
