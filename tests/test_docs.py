"""What the documentation shows runs as it stands, and every link and command in it leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tiltlm.recipes import recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
SHOWN = [
    page for page in PAGES if page.name != "CONTRIBUTING.md"
]  # whose recipes are examples of what one may add
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.S)


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in BLOCK.findall(page.read_text()) if name == language]


PYTHON = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{k}")
    for page in SHOWN
    for k, code in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("code", PYTHON)
def test_examples_run_as_they_stand(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_there_are_examples():
    assert len(PYTHON) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_recipes_in_commands_exist(page):
    for what in re.findall(r"tiltlm (?:run|sweep) +([a-z0-9-]+/[a-z0-9-]+)", page.read_text()):
        assert recipe(what).name == what


def test_every_method_page_has_the_same_headings_and_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        headings = re.findall(r"^## (.+)$", page.read_text(), re.M)
        assert headings == [
            "Formula", "Reference", "When to use", "Command", "Metrics explained", "Result against the paper", "Deviations",
        ], page.name  # fmt: skip
        assert f"methods/{page.name}" in index


def test_every_option_in_a_command_is_an_option():
    """Options of `tiltlm run RECIPE --…` lines, checked against the recipe's own settings."""
    for page in SHOWN:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                found = re.match(r"tiltlm (?:run|sweep) (\S+/\S+)(.*?)(?:#|$)", line)
                if found and "-g" not in found.group(1):
                    for option in re.findall(r"--([a-z][\w.-]*)", found.group(2).replace("--jobs", "")):
                        assert has(recipe(found.group(1)), option.split(".")), f"{page.name}: {line}"


def has(value: object, path: list[str]) -> bool:
    name = path[0].replace("-", "_").removeprefix("no_")
    if not hasattr(value, name):
        return False
    return len(path) == 1 or has(getattr(value, name), path[1:])
