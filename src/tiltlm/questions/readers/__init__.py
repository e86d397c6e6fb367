"""Questions of files and data sets, each row with its place, so that whoever refuses one can say which."""

from __future__ import annotations
