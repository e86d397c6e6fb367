"""Star graphs G(d, l): d arms of l − 1 nodes leave a start; the answer is the arm that ends in the goal.

All d(l−1) + 1 labels are distinct, a uniform partial permutation of 0 … N−1; edges come in uniformly random order
and the goal is the end of arm 0. Task and line format: Bachmann & Nagarajan 2024 (arXiv:2403.06963), used for
Q# by Zhou et al. 2025 (arXiv:2502.20548). One graph is one line,

    a,b|c,d|…/start,goal=n0,n1,…        32,3|3,19|32,34|34,6/32,6=32,34,6

with n0 = start and n_{l−1} = goal. A file holds paths forwards; `StarGraph.reverse` turns them when they become
tokens. Shapes: n graphs, E = d(l−1) edges. This module needs numpy only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_STEM = re.compile(r"deg_(\d+)_path_(\d+)_nodes_(\d+)")
_NUMBER = "(?:0|[1-9][0-9]{0,8})"
SIZES = {"test": 20_000, "pretrain": 200_000, "posttrain": 200_000}
"""The original's three files and how many graphs each holds."""


@dataclass(frozen=True)
class StarGraph:
    """A family of star graphs: `degree` arms, paths of `path_length` nodes (start included), labels below `nodes`.

    `reverse`: answers are written goal first. Raises ValueError if such a graph cannot exist.
    """

    degree: int = 2
    path_length: int = 3
    nodes: int = 10
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise ValueError(f"degree must be 1 or more: the start needs an arm; got {self.degree}")
        if self.path_length < 2:
            raise ValueError(f"path_length must be 2 or more, start and goal; got {self.path_length}")
        if self.nodes < self.edges + 1:
            raise ValueError(
                f"degree {self.degree} and path_length {self.path_length} need {self.edges + 1} distinct labels; "
                f"got nodes={self.nodes}: raise nodes, or lower one of the others"
            )

    @staticmethod
    def of_file(path: str | Path) -> StarGraph:
        """The family named in a file's name (deg_D_path_L_nodes_N…). Raises ValueError if it names none."""
        found = _STEM.search(Path(path).name)
        if found is None:
            raise ValueError(
                f"the file name {Path(path).name!r} does not say which graphs it holds (expected "
                "deg_D_path_L_nodes_N…): pass world=StarGraph(…)"
            )
        degree, length, nodes = (int(number) for number in found.groups())
        return StarGraph(degree, length, nodes)

    @property
    def edges(self) -> int:
        """E, the number of edges; a graph has E + 1 labels."""
        return self.degree * (self.path_length - 1)

    @property
    def vocab_size(self) -> int:
        """Numeral tokens: the nodes and | = / $."""
        return self.nodes + 4

    @property
    def prompt_length(self) -> int:
        """Numeral tokens up to and including =."""
        return 3 * self.edges + 3

    @property
    def target_length(self) -> int:
        """Numeral tokens after =."""
        return self.path_length

    @property
    def file_stem(self) -> str:
        return f"deg_{self.degree}_path_{self.path_length}_nodes_{self.nodes}"


@dataclass(frozen=True)
class Graphs:
    """n star graphs: edges int64 [n, E, 2] (from, to), path int64 [n, l] from the start to the goal."""

    edges: np.ndarray
    path: np.ndarray

    def __post_init__(self) -> None:
        edges, path = self.edges.shape, self.path.shape
        if len(edges) != 3 or edges[2] != 2 or len(path) != 2 or edges[0] != path[0]:
            raise ValueError(f"Graphs need edges [n, E, 2] and path [n, l]; got {list(edges)} and {list(path)}")
        if path[1] < 2 or edges[1] % (path[1] - 1):
            raise ValueError(
                f"E must be a multiple of l - 1 (arms of equal length); got E={edges[1]}, l={path[1]}"
            )

    def __len__(self) -> int:
        return len(self.path)

    @property
    def degree(self) -> int:
        return self.edges.shape[1] // (self.path.shape[1] - 1)

    def select(self, index: np.ndarray | slice) -> Graphs:
        """The graphs at `index`, in its order."""
        return Graphs(self.edges[index], self.path[index])


def generate(world: StarGraph, n: int, rng: np.random.Generator) -> Graphs:
    """n independent graphs of `world`: uniform labels, uniform order of edges, goal = end of arm 0."""
    labels = rng.permuted(np.tile(np.arange(world.nodes), (n, 1)), axis=1)[:, : world.edges + 1]
    beyond = labels[:, 1:].reshape(n, world.degree, world.path_length - 1)
    start = np.broadcast_to(labels[:, :1, None], (n, world.degree, 1))
    arm = np.concatenate([start, beyond], axis=2)
    edges = np.stack([arm[:, :, :-1], arm[:, :, 1:]], axis=-1).reshape(n, world.edges, 2)
    order = rng.permuted(np.tile(np.arange(world.edges), (n, 1)), axis=1)
    return Graphs(np.take_along_axis(edges, order[:, :, None], axis=1), arm[:, 0])


def _walk(graphs: Graphs) -> tuple[np.ndarray, np.ndarray]:
    """Arms [n, d, l] found by following edges from the start, and whether each graph is a star, bool [n]."""
    n, length = graphs.path.shape
    source, sink = graphs.edges[:, :, 0], graphs.edges[:, :, 1]
    row, nowhere = np.arange(n)[:, None], int(graphs.edges.max(initial=-1)) + 1
    leaves = source == graphs.path[:, :1]
    first = np.argsort(~leaves, axis=1, kind="stable")[:, : graphs.degree]
    successor = np.full((n, nowhere + 1), nowhere)  # `nowhere` is the end of every arm, and leads to itself
    successor[row, source] = sink
    found = np.empty((n, graphs.degree, length), dtype=np.int64)
    found[:, :, 0], found[:, :, 1] = graphs.path[:, :1], sink[row, first]
    for t in range(2, length):
        found[:, :, t] = successor[row, found[:, :, t - 1]]
    labels = np.sort(np.concatenate([found[:, 0, :1], found[:, :, 1:].reshape(n, -1)], axis=1), axis=1)
    distinct = (np.diff(labels, axis=1) > 0).all(1) & (labels[:, -1] < nowhere)
    # d edges leave the start and E + 1 distinct labels are reached by them: no edge is left over
    return found, distinct & (leaves.sum(1) == graphs.degree)


def arms(graphs: Graphs) -> np.ndarray:
    """Every graph's arms, int64 [n, d, l], recovered from its edges, in the order of their first edges.

    Raises ValueError naming the first graph whose edges are not d arms of equal length that leave path[:, 0].
    """
    found, is_star = _walk(graphs)
    if not is_star.all():
        raise ValueError(f"graph {int(np.argmin(is_star))}: {_NOT_A_STAR}")
    return found


def random_arms(graphs: Graphs, rng: np.random.Generator) -> np.ndarray:
    """A uniformly random arm of each graph, int64 [n, l]: what a walker that ignores the goal would answer."""
    return arms(graphs)[np.arange(len(graphs)), rng.integers(graphs.degree, size=len(graphs))]


_NOT_A_STAR = "its edges are not arms of equal length, with distinct labels, that leave the path's first node"


def _fill(world: StarGraph) -> str:
    """The %-template of a line: 2E numbers of edges, start and goal, l numbers of the path."""
    edges = "|".join(["%d,%d"] * world.edges)
    return f"{edges}/%d,%d={','.join(['%d'] * world.path_length)}"


def to_lines(graphs: Graphs) -> list[str]:
    """One line (without its newline) per graph."""
    n, length = graphs.path.shape
    ends = graphs.path[:, [0, -1]]
    template = _fill(StarGraph(graphs.degree, length, graphs.edges.shape[1] + 1))
    rows = np.concatenate([graphs.edges.reshape(n, -1), ends, graphs.path], axis=1).tolist()
    return [template % tuple(row) for row in rows]


def to_line(graphs: Graphs, row: int = 0) -> str:
    """The line of graph `row`."""
    return to_lines(graphs.select(np.array([row])))[0]


def parse_line(line: str, world: StarGraph) -> Graphs:
    """The one graph written in `line` (without its newline). Raises ValueError saying what is wrong with it."""
    return _parse([line], world, "line")


def _parse(lines: Sequence[str], world: StarGraph, name: str) -> Graphs:
    pattern = re.compile(re.escape(_fill(world)).replace("%d", _NUMBER))
    for number, line in enumerate(lines, 1):
        if not pattern.fullmatch(line):
            raise ValueError(
                f"{name}:{number}: expected {world.edges} edges 'a,b' joined by '|', then '/start,goal=', then "
                f"{world.path_length} nodes joined by ','; got {line[:120]!r}. Correct the line, or the world "
                f"(read as {world.file_stem})"
            )
    joined = ",".join(lines).translate(str.maketrans("|/=", ",,,"))
    numbers = np.fromstring(joined, dtype=np.int64, sep=",").reshape(len(lines), -1)
    last = 2 * world.edges
    graphs = Graphs(numbers[:, :last].reshape(-1, world.edges, 2), numbers[:, last + 2 :])
    for faulty, what in _faults(graphs, numbers[:, last : last + 2], world):
        if faulty.any():
            number = int(np.argmax(faulty))
            raise ValueError(f"{name}:{number + 1}: {what}; got {lines[number][:120]!r}")
    return graphs


def _faults(graphs: Graphs, ends: np.ndarray, world: StarGraph) -> list[tuple[np.ndarray, str]]:
    """What can be wrong with graphs of the right format: which graphs have it (bool [n]), in words."""
    too_big = (graphs.edges >= world.nodes).any((1, 2)) | (graphs.path >= world.nodes).any(1)
    other_ends = (graphs.path[:, [0, -1]] != ends).any(1)
    found, is_star = _walk(graphs)
    no_arm = ~(found == graphs.path[:, None]).all(2).any(1)
    return [
        (too_big, f"labels must be below {world.nodes} (nodes of the world)"),
        (other_ends, "the path must begin at the start and end at the goal that stand before '='"),
        (~is_star, _NOT_A_STAR),
        (no_arm, "the path is not an arm of the graph"),
    ]


def write_lines(path: str | Path, graphs: Graphs, *, overwrite: bool = False) -> None:
    """Write one line a graph. Raises FileExistsError if `path` exists, unless `overwrite`."""
    path = Path(path)
    _refuse([path], overwrite)
    with open(path, "w", encoding="ascii", newline="\n") as file:
        file.writelines(line + "\n" for line in to_lines(graphs))


def _refuse(paths: Sequence[Path], overwrite: bool) -> None:
    present = [str(path) for path in paths if path.exists()]
    if present and not overwrite:
        raise FileExistsError(
            f"{', '.join(present)} would be overwritten: pass overwrite=True, or choose another place"
        )


def read_lines(path: str | Path, world: StarGraph | None = None) -> Graphs:
    """The graphs in a file of lines; without `world`, the file's name says which family (`StarGraph.of_file`).

    Raises ValueError naming file and line if a line is malformed or its graph is not a star of that family.
    """
    world = StarGraph.of_file(path) if world is None else world
    text = Path(path).read_bytes().decode("ascii", errors="replace")
    lines = text.removesuffix("\n").split("\n")
    return _parse(lines, world, str(path))


def generate_files(
    folder: str | Path,
    world: StarGraph,
    *,
    seed: int = 42,
    sizes: Mapping[str, int] = SIZES,
    overwrite: bool = False,
) -> dict[str, Path]:
    """Write the splits `sizes` (name -> graphs) as deg_D_path_L_nodes_N_{20k}_{name}.txt; returns their paths.

    Each split has its own random stream, so the size of one does not move another. Raises FileExistsError
    before anything is written if one of the files exists, unless `overwrite`.
    """
    from tiltlm.seeds import stream  # here, not above: it loads torch

    folder = Path(folder)
    paths = {name: folder / file_name(world, name, n) for name, n in sizes.items()}
    _refuse(list(paths.values()), overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        rng = stream(seed, "star_graph", world.file_stem, name).numpy()
        write_lines(path, generate(world, sizes[name], rng), overwrite=overwrite)
    return paths


def file_name(world: StarGraph, split: str, n: int) -> str:
    """The original's name for a file of n graphs: deg_2_path_5_nodes_50_200k_pretrain.txt."""
    short = f"{n // 1000}k" if n and n % 1000 == 0 else str(n)
    return f"{world.file_stem}_{short}_{split}.txt"
