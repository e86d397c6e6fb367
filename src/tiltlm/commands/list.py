"""`tiltlm list`: every recipe, one line each, without importing torch."""

from __future__ import annotations

from collections.abc import Sequence

from tiltlm.recipes import catalogue


def list(args: Sequence[str]) -> int:
    """Print the recipes by family; a word among the arguments narrows them down."""
    if args and args[0] in ("-h", "--help"):
        print("usage: tiltlm list [WORD]   every recipe (whose name contains WORD), one line each")
        return 0
    word, found = args[0] if args else "", False
    for entry in catalogue():
        for family, line in entry.families.items():
            names = {
                f"{family}/{stage}": text for stage, text in entry.stages.items() if word in f"{family}/{stage}"
            }
            if names:
                found = True
                print(f"\n{family}: {line}")
                width = 2 + max(len(name) for name in names)
                print("\n".join(f"  {name:<{width}}{text}" for name, text in names.items()))
    if not found:
        print(f"no recipe's name contains {word!r}; `tiltlm list` shows them all")
    return 0
