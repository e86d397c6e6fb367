"""CONTRIBUTING.md does what it says: what it shows is written into a copy of the library, and works there.

The first line of a block says where it goes: a file; or a place in one, `below NAME` (a table), `above "LINE"`, `at its
top`, `at its end`.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```python\n# ((?:src|tests)/\S+?\.py)(?:, ([^\n]*))?\n(.*?)```", re.S)

ADDED = '''
"""What was added is found by name, learns, and is measured: in the catalogue, on a toy task, in a comparison."""

import json
import math
from dataclasses import replace

import pytest

import tiltlm as tl
from tiltlm import methods
from tiltlm.commands.run import run as command
from tiltlm.policies.log_cosh import LogCosh
from tiltlm.recipes import preset_of, tasks
from tiltlm.recipes.preset import Preset
from tiltlm.recipes.stages import measured
from tiltlm.ruler.measure import Ruler
from tiltlm.run import ensure
from tiltlm.stages.measure import RulerSettings
from toy import Toy


@pytest.mark.parametrize(("name", "road"), [("log-cosh", "policies"), ("cumulant", "twists")])
def test_a_new_method_is_found_and_measured(name, road, tmp_path):
    assert name in methods.catalogue()[road] and methods.method(name).optimum
    made = measured(Preset(Toy(), ruler=RulerSettings(n=50)), name)
    run = ensure(replace(made, fit=replace(made.fit, steps=3, batch_size=8)), tmp_path)
    rows = {row["metric"]: row for row in json.loads((run.folder / "report.json").read_text())}
    assert all(math.isfinite(rows[metric]["value"]) for metric in ("objective", "kl_to_reference", "entropy"))
    assert rows["entropy"]["unit"] == "nats"
    assert len((run.inputs["learnt"].folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_method_learns_where_it_ends(tmp_path):
    """On parity, where a table can be pi*: the guess is 0.43 nats away."""
    made = measured(preset_of("parity"), "log-cosh")
    run = ensure(replace(made, fit=replace(made.fit, lr=0.1, steps=300)), tmp_path)
    rows = {row["metric"]: row for row in json.loads((run.folder / "report.json").read_text())}
    assert abs(rows["kl_to_target"]["value"]) < 0.05


def test_a_new_method_learns_in_memory():
    problem = Toy().problem({}, 0)
    learnt = tl.learn(problem, LogCosh(), steps=2)
    rows = {row["metric"]: row["value"] for row in tl.measure(problem, {"learnt": learnt}, n=20).rows}
    assert math.isfinite(rows["objective"])


def test_a_new_task_is_found_and_compared(tmp_path, monkeypatch, capsys):
    assert tasks()["parity"][0] == "tiltlm.recipes.parity"
    monkeypatch.setenv("TILTLM_RUNS", str(tmp_path))
    assert command(["parity/evaluate", "--methods", "reference", "dpo", "--task.bits", "2", "--dpo.fit.steps", "20"]) == 0
    shown = capsys.readouterr().out
    assert "reference" in shown and "dpo" in shown and "H(q)" in shown
'''
"""Tests of what the page adds that it does not show itself."""

CHOSEN = (
    "token_count or test_mixed or test_entropy or parity or test_added or cosh or cumulant or has_a_law or every_rule "
    "or test_imports"
)
"""Of the tests that stand in the copy: those the page shows, and those that look over the open sets."""


def put(text: str, where: str, block: str) -> str:
    """`text` with `block` at the place that `where` describes."""
    if where == "at its end":
        return f"{text}\n\n{block}"
    lines, new = text.splitlines(keepends=True), block
    if where == "at its top":
        place = lines.index("from __future__ import annotations\n") + 1
    elif found := re.fullmatch(r"below (\w+)", where):
        place = next(
            node.end_lineno or 0
            for node in ast.parse(text).body
            if (isinstance(node, ast.Assign) and named(node.targets[0]) == found[1])
            or (isinstance(node, ast.AnnAssign) and named(node.target) == found[1])
        )  # fmt: skip
    elif found := re.fullmatch(r'above "(.+)"', where):
        place = next(k for k, line in enumerate(lines) if line.strip() == found[1])
        indent = lines[place][: -len(lines[place].lstrip())]
        new = "".join(indent + line for line in block.splitlines(keepends=True))
    else:
        raise ValueError(f"CONTRIBUTING.md puts a block {where!r}, and no one knows where that is")
    return "".join([*lines[:place], f"\n{new}\n", *lines[place:]])


def named(target: ast.expr) -> str:
    return target.id if isinstance(target, ast.Name) else ""


def written(page: str, root: Path) -> list[Path]:
    """Put every block of `page` where it says, under `root`; returns the files that are new."""
    new = []
    for name, where, block in BLOCK.findall(page):
        path = root / name
        if where:
            path.write_text(put(path.read_text(encoding="utf-8"), where, block), encoding="utf-8")
            continue
        assert not path.exists(), f"{name} is there already"
        path.write_text(block, encoding="utf-8")
        new.append(path)
    return new


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A copy of sources and tests with everything in it that the page shows."""
    root = tmp_path_factory.mktemp("contributing")
    for folder in ("src", "tests", "docs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", root)
    new = written((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), root)
    added = root / "tests" / "test_added.py"
    added.write_text(ADDED.lstrip(), encoding="utf-8")
    return root, new


def run_in(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python command in the copy, which imports the copy."""
    paths = os.pathsep.join([str(root / "src"), str(root / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def test_what_the_page_shows_works(copy):
    """The tests it shows, those that look over the open sets, and `ADDED`."""
    root, new = copy
    files = [str(path) for path in new if path.name.startswith("test_")]
    assert len(files) >= 4
    shared = [
        "test_added.py",
        "test_losses.py",
        "laws/test_fixed_points.py",
        "laws/test_twists.py",
        "test_imports.py",
    ]
    chosen = [*files, *(str(root / "tests" / name) for name in shared)]
    done = run_in(root, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", CHOSEN, *chosen)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    walked = [f"tests/test_matrix.py::test_a_cell_is_measured_or_says_why_not[{cell}]" for cell in CELLS]
    done = run_in(root, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *walked)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


CELLS = (
    "parity/reference",
    "parity/dpo",
    "parity/ctl",
    "parity/log-cosh",
    "tree/log-cosh",
    "tree/cumulant",
)


def test_the_files_it_shows_are_typed_and_tidy(copy):
    """As `make check` has it of every other file: mypy and ruff, where they are installed."""
    root, new = copy
    files = [str(path) for path in new]
    for tool in (
        ["ruff", "check", "--no-cache"],
        ["ruff", "format", "--check", "--no-cache"],
        ["mypy", "--no-incremental"],
    ):
        pytest.importorskip(tool[0])
        sources = files if tool[0] == "ruff" else [path for path in files if "/src/" in path]
        done = run_in(root, "-m", *tool, *sources)
        assert done.returncode == 0, f"{tool}: {done.stdout[-3000:]}{done.stderr[-2000:]}"


def test_a_block_goes_where_it_says():
    text = "from __future__ import annotations\n\nA = {\n    1: 2,\n}\n\n\ndef f():\n    return A\n"
    assert put(text, "below A", "A[3] = 4\n").count("}\n\nA[3] = 4\n") == 1
    assert "\n\n    A.clear()\n\n    return A\n" in put(text, 'above "return A"', "A.clear()\n")
    assert put(text, "at its top", "import re\n").startswith("from __future__ import annotations\n\nimport re\n")
    assert put(text, "at its end", "B = 1\n").endswith("return A\n\n\nB = 1\n")
    with pytest.raises(ValueError, match="no one knows"):
        put(text, "somewhere", "B = 1\n")
