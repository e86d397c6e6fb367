"""The coverage loop in short: estimates hold in about 95% of 80 runs or say that they may not, certificates always."""

from __future__ import annotations

import pytest

from command import tiltlm
from tiltlm.ruler.calibrate import Cell, bounds_cells, cell, importance_cells, method_cells, rate_cells, table
from tiltlm.ruler.intervals import Interval
from tiltlm.seeds import stream

RUNS, ROOT = 80, stream(4, "test-calibrate")
CELLS = {
    "bounds": lambda: bounds_cells(RUNS, (3, 20), (4,), ("near", "noisy"), (0.3,), ROOT),
    "importance": lambda: importance_cells(RUNS, (50, 500), (1.0, 0.1), ROOT),
    "methods": lambda: method_cells(RUNS, (3, 20), (40,), (0.3,), ROOT),
    "rates": lambda: rate_cells(RUNS, (5, 50), (0.5, 0.99), ROOT),
}


@pytest.mark.parametrize("kind", CELLS)
def test_every_interval_holds_as_often_as_it_says(kind):
    found = list(CELLS[kind]())
    weak = [each for each in found if not each.sound]
    assert len(found) >= 4 and not weak, "\n".join(table(weak))
    assert any(each.claimed for each in found)  # power: not all of them hide behind a doubt


def test_a_cell_by_hand():
    """Intervals [0, 2], [0, ½] and a doubted one, truth 1: one of two held; certificates [0, 3], [2, 3]: one of two."""
    ends = [Interval(0, 2), Interval(0, 0.5), Interval(5, 6, doubt="few")]
    found = cell("x", "s", 1.0, list(zip(ends, [(0.0, 3.0), (2.0, 3.0), None], strict=True)))
    assert (found.claimed, found.held, found.certificates, found.certified) == (2, 1, 2, 1)
    assert found.coverage == 0.5 and (found.width, found.certified_width) == (1.0, 1.0)
    assert table([found])[-1] == "| x | s | 0.500 | 0.33 | 1 | 0.500 | 1 |"


def test_sound_means_what_was_claimed_within_the_count_s_own_error():
    def made(held: int, certified: int) -> Cell:
        return Cell("x", "s", 300, 300, held, 1.0, 300, certified, 1.0)

    assert made(280, 285).sound and made(300, 300).sound
    assert not made(250, 300).sound and not made(300, 260).sound  # 83% and 87%


def test_the_command_prints_the_table(tmp_path):
    flags = ["--runs", "20", "--draws", "50", "--betas", "1", "--out", "c.md"]
    done = tiltlm("calibrate", "importance", *flags, cwd=tmp_path)
    assert "| log Z, importance | beta 1, n 50 |" in (tmp_path / "c.md").read_text()
    assert "2 lines of 20 runs; below what was claimed by more than three errors of the count: none" in done.stdout
    wrong = tiltlm("calibrate", "everything", cwd=tmp_path, check=False)
    assert wrong.returncode == 2 and "unknown kinds" in wrong.stderr
