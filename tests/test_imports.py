"""Imports flow one way: a room imports only rooms before it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"
SOURCE = Path(__file__).resolve().parents[1] / "src" / "tiltlm"
ORDER = [
    {"ranks"},
    {"mistakes", "stopping", "tensors", "jsonl", "progress", "settings", "literals"},
    {"seeds", "samples", "lock"},
    {"device", "turns"},
    {"groups"},
    {"models"},
    {"target", "objective"},
    {"exact"},
    {"rewards"},
    {"samplers"},
    {"data"},
    {"questions"},
    {"problem"},
    {"experience"},
    {"method"},
    {"clipped"},
    {"policies"},
    {"twists"},
    {"sharded", "parts", "memory"},
    {"engine"},
    {"train", "tracking"},
    {"fit"},
    {"judges"},
    {"feeds", "nets"},
    {"ruler"},
    {"decoders"},
    {"methods"},
    {"run"},
    {"stages"},
    {"tasks"},
    {"recipes"},
    {"commands"},
    {"api"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: k for k, rooms in enumerate(ORDER) for room in rooms}


def imported_rooms(path: Path) -> set[str]:
    """The rooms of this package that a file imports, at any depth of nesting."""
    names = [
        name
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        )
    ]  # fmt: skip
    return {name.split(".")[1] for name in names if name.startswith("tiltlm.")}


def test_every_room_imports_only_rooms_before_it():
    backward = [
        f"{path.relative_to(SOURCE)} imports {other}"
        for path in SOURCE.rglob("*.py")
        if (room := path.relative_to(SOURCE).parts[0].removesuffix(".py")) != "__init__"
        for other in imported_rooms(path)
        if other != room and FLOOR[other] >= FLOOR[room]
    ]
    assert not backward, backward


def test_every_room_has_a_place_in_the_order():
    rooms = {
        p.name.removesuffix(".py") for p in SOURCE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert rooms - {"__init__"} == set(FLOOR)


def test_the_page_on_architecture_has_the_rooms_in_this_order():
    """docs/architecture.md: no room of its table stands before one that it may import, and none is missing."""
    table = PAGE.read_text(encoding="utf-8").split("| room |")[1].split("\n\n")[0]
    lines = [re.findall(r"`([a-z_]+)/?`", line.split("|")[1]) for line in table.splitlines()[2:]]
    floors = [FLOOR[room] for line in lines for room in line]
    assert floors == sorted(floors)
    assert {room for line in lines for room in line} == set(FLOOR)
