"""What ends in one line instead of a traceback: the user's mistakes, and what the machine refuses (a full disk, say)."""

from __future__ import annotations

import errno

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
