"""The wheel: what is in it, and that it runs where there is no checkout (`make wheel-check`: in an empty environment)."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built from a copy of it."""
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools 77")
    work = tmp_path_factory.mktemp("wheel")
    copied = ["pyproject.toml", "README.md", "LICENSE", "src"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in copied), str(work)], check=True)
    command = [sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('out')"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((work / "out").glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"tiltlm/py.typed", "tiltlm/commands/report.html", "tiltlm/cli.py"} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tiltlm"}
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/tiltlm").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_wheel_runs_without_the_checkout(wheel, tmp_path):
    """The dependencies of this environment, but not its own tiltlm: the installed one builds a recipe."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    site = tmp_path / f"env/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = (
        "import sys, tiltlm; print(tiltlm.__file__); from tiltlm.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    for args, said in (
        (["list"], "star-graph-g25"), (["list"], "q-sharp"), (["run", "tree/solve"], "KL(q‖ref)"),
        (["run", "star-graph/q-sharp", "--help"], "--task.beta"),
    ):  # fmt: skip
        done = subprocess.run(
            [python, "-c", script, *args], cwd=tmp_path, capture_output=True, text=True, env=outside
        )
        assert done.returncode == 0 and said in done.stdout, done.stderr
        assert done.stdout.startswith(str(site)), done.stdout
