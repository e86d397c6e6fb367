"""Star graphs: what is generated has the right law, and the line format survives a round trip byte for byte."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tiltlm.data import star_graph
from tiltlm.data.star_graph import Graphs, StarGraph, generate, parse_line, read_lines, to_line, write_lines

REAL = ["deg_2_path_5_nodes_50", "deg_5_path_3_nodes_50"]
LINE = "32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12"
G25 = StarGraph(2, 5, 50)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("degree, path_length, total", [(2, 5, 32), (5, 5, 68), (3, 8, 74), (2, 20, 137)])
def test_numeral_lengths_are_the_published_ones(degree, path_length, total):
    world = StarGraph(degree, path_length, 50)
    assert world.prompt_length + world.target_length == total
    assert world.edges == degree * (path_length - 1) and world.vocab_size == 54


@pytest.mark.parametrize(
    "sizes, word", [((0, 3, 10), "degree"), ((2, 1, 10), "path_length"), ((2, 3, 4), "nodes=4")]
)
def test_impossible_worlds_are_refused(sizes, word):
    with pytest.raises(ValueError, match=word):
        StarGraph(*sizes)
    StarGraph(2, 3, 5)  # exactly enough labels


@pytest.mark.parametrize("world", [StarGraph(2, 3, 5), G25, StarGraph(5, 3, 50), StarGraph(1, 2, 2)])
def test_generated_graphs_are_stars_of_distinct_labels(world):
    graphs = generate(world, 300, rng())
    for edges, path in zip(graphs.edges, graphs.path, strict=True):
        nodes = set(edges.flatten().tolist())
        assert len(nodes) == world.edges + 1 and nodes <= set(range(world.nodes))
        assert len({tuple(edge) for edge in edges.tolist()}) == world.edges
        assert (edges[:, 0] == path[0]).sum() == world.degree
        links = {tuple(edge) for edge in edges.tolist()}
        assert all(link in links for link in zip(path[:-1].tolist(), path[1:].tolist(), strict=True))
        assert path[-1] not in edges[:, 0]


def test_arms_use_every_edge_once_and_hold_the_path():
    graphs = generate(StarGraph(4, 4, 30), 200, rng())
    arms = star_graph.arms(graphs)
    assert arms.shape == (200, 4, 4)
    used = np.stack([arms[:, :, :-1], arms[:, :, 1:]], -1).reshape(200, -1, 2)
    for mine, theirs in zip(used.tolist(), graphs.edges.tolist(), strict=True):
        assert sorted(mine) == sorted(theirs)
    assert ((arms == graphs.path[:, None]).all(2).sum(1) == 1).all()


def test_arms_of_a_line_by_hand():
    arms = star_graph.arms(parse_line(LINE, G25))
    assert arms.tolist() == [[[32, 3, 19, 47, 28], [32, 34, 6, 16, 12]]]


@pytest.mark.parametrize(
    "edges",
    [
        [[0, 1], [2, 3], [1, 4], [3, 5]],  # two strands, one of which does not leave the start
        [[0, 1], [0, 2], [1, 3], [3, 4]],  # arms of unequal length
        [[0, 1], [0, 2], [1, 3], [2, 3]],  # arms that meet
        [[0, 1], [0, 2], [1, 0], [2, 4]],  # an arm that comes home
        [[0, 1], [0, 2], [0, 3], [0, 4]],  # too many arms
    ],
)
def test_arms_refuse_what_is_no_star(edges):
    good = generate(StarGraph(2, 3, 6), 1, rng())
    both = Graphs(np.concatenate([good.edges, [edges]]), np.concatenate([good.path, [[0, 1, 3]]]))
    with pytest.raises(ValueError, match="graph 1: "):
        star_graph.arms(both)


def test_malformed_arrays_are_refused():
    with pytest.raises(ValueError, match=r"edges \[n, E, 2\]"):
        Graphs(np.zeros((2, 4, 2), int), np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="multiple"):
        Graphs(np.zeros((2, 5, 2), int), np.zeros((2, 3), int))


def within_four_errors(count: np.ndarray, n: int, p: float) -> bool:
    """Counts of an event of probability p in n independent trials."""
    return bool((abs(count / n - p) < 4 * np.sqrt(p * (1 - p) / n)).all())


def test_labels_are_a_uniform_partial_permutation():
    n, graphs = 20_000, generate(StarGraph(2, 3, 6), 20_000, rng(1))
    start, goal = graphs.path[:, 0], graphs.path[:, -1]
    ends = np.array([((start == a) & (goal == b)).sum() for a in range(6) for b in range(6) if a != b])
    assert ends.sum() == n and within_four_errors(ends, n, 1 / 30)
    left_out = 15 - (graphs.edges[:, :, 1].sum(1) + start)
    assert within_four_errors(np.bincount(left_out, minlength=6), n, 1 / 6)


def test_edges_come_in_uniformly_random_order():
    n, graphs = 20_000, generate(StarGraph(2, 3, 6), 20_000, rng(2))
    step = [(graphs.edges == graphs.path[:, None, t : t + 2]).all(2) for t in (0, 1)]
    first, second = (where.argmax(1) for where in step)
    places = np.array([((first == a) & (second == b)).sum() for a in range(4) for b in range(4) if a != b])
    assert places.sum() == n and within_four_errors(places, n, 1 / 12)


def test_random_arms_are_uniform_and_ignore_the_goal():
    n, graphs = 20_000, generate(StarGraph(3, 3, 10), 20_000, rng(3))
    picked = star_graph.random_arms(graphs, rng(4))
    arms = star_graph.arms(graphs)
    which = (arms == picked[:, None]).all(2)
    assert (which.sum(1) == 1).all()
    assert within_four_errors(which.sum(0), n, 1 / 3)
    assert within_four_errors((picked == graphs.path).all(1).sum(), n, 1 / 3)


def test_equal_seeds_give_equal_graphs_and_others_do_not():
    one, two, three = (generate(G25, 50, rng(seed)) for seed in (5, 5, 6))
    assert (one.edges == two.edges).all() and (one.path == two.path).all()
    assert not (one.edges == three.edges).all()


@pytest.mark.parametrize("name", REAL)
def test_published_files_survive_a_round_trip_byte_for_byte(shared_data, tmp_path, name):
    source, copy = shared_data / "star_graph" / f"{name}.txt", tmp_path / f"{name}.txt"
    graphs = read_lines(source)
    assert len(graphs) > 1900 and star_graph.arms(graphs).shape[1] == StarGraph.of_file(source).degree
    write_lines(copy, graphs)
    assert copy.read_bytes() == source.read_bytes()


def test_one_line_there_and_back():
    graphs = parse_line(LINE, G25)
    assert graphs.path.tolist() == [[32, 34, 6, 16, 12]] and graphs.edges[0, 1].tolist() == [16, 12]
    assert to_line(graphs) == LINE
    assert to_line(generate(G25, 3, rng()), 2) == star_graph.to_lines(generate(G25, 3, rng()))[2]


def test_writing_refuses_to_overwrite(tmp_path):
    path = tmp_path / "deg_2_path_5_nodes_50.txt"
    write_lines(path, parse_line(LINE, G25))
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_lines(path, generate(G25, 2, rng()))
    assert path.read_text() == LINE + "\n"
    write_lines(path, generate(G25, 2, rng()), overwrite=True)
    assert len(read_lines(path)) == 2


@pytest.mark.parametrize(
    "bad, what",
    [
        (LINE.replace("16,12|", "16;12|", 1), "expected 8 edges"),
        (LINE.replace("32,3|", "", 1), "expected 8 edges"),
        (LINE + "\r", "expected 8 edges"),
        (LINE.replace("32,3|", "32,03|", 1), "expected 8 edges"),
        ("", "expected 8 edges"),
        (LINE.replace("28", "50"), "below 50"),
        (LINE.replace("/32,12", "/32,28"), "before '='"),
        (LINE.replace("=32,34,6,16,12", "=32,3,6,16,12"), "not an arm"),
        (LINE.replace("19,47|", "3,47|", 1), "distinct labels"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, bad, what):
    path = tmp_path / "deg_2_path_5_nodes_50_test.txt"
    path.write_bytes(f"{LINE}\n{bad}\n{LINE}\n".encode())
    with pytest.raises(ValueError, match=what) as error:
        read_lines(path)
    assert f"{path}:2:" in str(error.value)


def test_the_family_is_read_off_the_file_name_or_asked_for(tmp_path):
    path = tmp_path / "graphs.txt"
    path.write_text(LINE + "\n")
    with pytest.raises(ValueError, match="world="):
        read_lines(path)
    assert read_lines(path, G25).path.tolist() == [[32, 34, 6, 16, 12]]
    assert StarGraph.of_file("x/deg_3_path_8_nodes_50_20k_test.txt") == StarGraph(3, 8, 50)
    with pytest.raises(ValueError, match=f"{path}:1:.*deg_2_path_4_nodes_50"):
        read_lines(path, StarGraph(2, 4, 50))


def test_generated_files_have_the_original_names_and_their_own_streams(tmp_path):
    world = StarGraph(2, 3, 10)
    one = star_graph.generate_files(tmp_path / "a", world, sizes={"test": 1000, "pretrain": 30, "posttrain": 20})
    names = ["1k_test", "30_pretrain", "20_posttrain"]
    assert [path.name for path in one.values()] == [f"deg_2_path_3_nodes_10_{name}.txt" for name in names]
    assert [len(read_lines(path)) for path in one.values()] == [1000, 30, 20]
    two = star_graph.generate_files(tmp_path / "b", world, sizes={"posttrain": 20})
    assert two["posttrain"].read_bytes() == one["posttrain"].read_bytes()
    three = star_graph.generate_files(tmp_path / "c", world, seed=43, sizes={"posttrain": 20, "other": 20})
    assert three["posttrain"].read_bytes() != two["posttrain"].read_bytes()
    assert three["posttrain"].read_bytes() != three["other"].read_bytes()


def test_generated_files_are_not_overwritten_and_nothing_is_left_half_done(tmp_path):
    world = StarGraph(2, 3, 10)
    paths = star_graph.generate_files(tmp_path, world, sizes={"posttrain": 20})
    before = paths["posttrain"].read_bytes()
    with pytest.raises(FileExistsError, match="20_posttrain"):
        star_graph.generate_files(tmp_path, world, seed=1, sizes={"test": 20, "posttrain": 20})
    assert list(tmp_path.iterdir()) == [paths["posttrain"]] and paths["posttrain"].read_bytes() == before


def test_default_sizes_are_the_original_ones():
    assert star_graph.SIZES == {"test": 20_000, "pretrain": 200_000, "posttrain": 200_000}


def test_graphs_need_numpy_only():
    code = "import sys, tiltlm.data.star_graph; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
