"""What a file says of itself in a dict literal, read without importing it: members of open folders are found by looking."""

from __future__ import annotations

import ast
from pathlib import Path


def literal(path: Path, name: str) -> dict[str, str]:
    """The dict literal that a file assigns to `name` (annotated); empty where it has none."""
    text = path.read_text(encoding="utf-8")
    if f"\n{name}: " not in text:  # parsing all files takes longer than looking
        return {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            found: dict[str, str] = ast.literal_eval(node.value) if node.value is not None else {}
            return found
    return {}
