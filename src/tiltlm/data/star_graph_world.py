"""Which star graphs a task has: by split, from a seed or from the original's text files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tiltlm.data.star_graph import Graphs, StarGraph, generate, read_lines
from tiltlm.seeds import Stream

Split = Literal["pretrain", "posttrain", "test"]
SPLITS: tuple[Split, ...] = ("pretrain", "posttrain", "test")


@dataclass(frozen=True)
class World:
    """Which graphs, and how many."""

    degree: int = 2
    """Arms of a graph."""

    path_length: int = 3
    """Nodes of an arm, the start included."""

    nodes: int = 10
    """Node labels to choose from."""

    reverse: bool = False
    """Write paths goal first."""

    teacherless: bool = False
    """Predict all tokens of a path at once, from the prompt and dummies."""

    pretrain: int = 0
    """Graphs for pre-training; 0: fresh ones at every step (with a folder: all there are)."""

    posttrain: int = 8000
    """Graphs for everything after pre-training."""

    test: int = 1000
    """Graphs for measuring."""

    imitate: Literal["random_arm", "goal"] = "random_arm"
    """What pre-training copies: a random arm of each graph (the walker), or the path to the goal (the paper)."""

    folder: str = ""
    """Read the original's text files in this folder (the first `posttrain`, … graphs), instead of generating."""

    def __post_init__(self) -> None:
        if min(self.pretrain, self.posttrain, self.test) < 0:
            raise ValueError(f"numbers of graphs must not be negative; got {self}")
        _ = self.graph  # impossible graphs are refused here, before any work

    @property
    def graph(self) -> StarGraph:
        return StarGraph(self.degree, self.path_length, self.nodes, self.reverse)

    def graphs(self, split: Split, own: Stream) -> Graphs:
        """The graphs of a split: read from the folder, or generated from the stream `own`."""
        count = {"pretrain": self.pretrain, "posttrain": self.posttrain, "test": self.test}[split]
        if self.folder:
            return read_lines(self.file(split), self.graph).select(slice(0, count or None))
        return generate(self.graph, count, own.child("graphs", split).numpy())

    def file(self, split: Split) -> Path:
        """The folder's file of a split. Raises ValueError unless there is just one."""
        pattern = f"{self.graph.file_stem}*{split}*.txt"
        found = sorted(Path(self.folder).glob(pattern))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise ValueError(f"{self.folder} must hold one file {pattern}; found {names}")
        return found[0]

    def check(self) -> None:
        """Raise ValueError where the folder lacks a file."""
        for split in SPLITS if self.folder else ():
            self.file(split)
