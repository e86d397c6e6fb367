"""What the documentation shows runs as it stands, and every link and command in it leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from documents import ROOT, Code, blocks, codes, commands, every_flag, flags_in, flags_of, is_among, wrong
from tiltlm.methods import names
from tiltlm.recipes import recipe

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
SHOWN = [
    page for page in PAGES if page.name != "CONTRIBUTING.md"
]  # whose recipes are examples of what one may add

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
def test_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        there = page.parent / target if target else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links: lower case, without punctuation, a hyphen for every blank."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_every_method_page_has_the_same_headings_and_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        headings = re.findall(r"^## (.+)$", page.read_text(), re.M)
        assert headings == [
            "Formula", "Reference", "When to use", "Command", "Metrics explained", "Result against the paper", "Deviations",
        ], page.name  # fmt: skip
        assert f"methods/{page.name}" in index


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_can_be_said(page):
    """Names resolve and options parse; nothing is built, and files that are named need not be there."""
    found = [(code, words) for code in codes(as_of_now(page)) for words in commands(code)]
    errors = [
        f"line {code.line}: {code.text}\n    {why}" for code, words in found if (why := wrong(words, code.whole))
    ]
    assert not errors, "\n".join([page.name, *errors])


PAPERS = ROOT / "docs" / "from_the_papers.md"
OTHERS = {"--baseline", "--eta"}
"""Options of the papers' own code that the pages of methods speak of; those with _ are others' as well."""


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_that_is_named_is_an_option(page):
    """Options named alone in a sentence or a table: some recipe or command has them."""
    text = as_of_now(page)
    if page == PAPERS:  # its tables name others' options as well, and are looked at cell by cell
        text = re.sub(r"^\|.*$", "", text, flags=re.M)
    alone = [
        code for code in codes(text) if not code.whole and code.text.startswith("--") and "_" not in code.text
    ]
    said = [(code, flag) for code in alone for flag in flags_in(code.text) if flag not in OTHERS]
    errors = [f"line {code.line}: {flag}" for code, flag in said if not is_among(flag, every_flag())]
    assert not errors, "\n".join([page.name, *errors])


def test_commands_and_options_are_looked_at():
    """What the two tests above would say of commands that are none."""
    for line in (
        "tiltlm run animals/ctI", "tiltlm run animals/ctl --goal.beta 1", "tiltlm run animals/ctl --fit.lr fast",
        "tiltlm sweep animals/ctl --seed 1,x", "tiltlm run animals/evaluate --methods untrained", "tiltlm rum animals/ctl",
        "tiltlm sample MODEL --prompts p.jsonl", "tiltlm report RUN --sample 3", "tiltlm list animals-small",
    ):  # fmt: skip
        (words,) = commands(Code(1, line, True))
        assert wrong(words, True), line
    text = "a `tiltlm run animals/ctl\n--seed 1`\n\n    tiltlm run animals/ctl \\\n      --seed 2   # so\n\n"
    text += "```sh\ntiltlm list\n```"
    assert [words for code in codes(text) for words in commands(code)] == [
        ["run", "animals/ctl", "--seed", "2"], ["list"], ["run", "animals/ctl", "--seed", "1"]
    ]  # fmt: skip
    assert "--fit.lr" in every_flag() and "--goal.beta" not in every_flag()


# ---- from_the_papers.md: the options of the papers' commands, as they are called here ------------------------------------

PLACEHOLDER = re.compile(r"(?<![A-Za-z])[A-Z][A-Z_]*(?![a-z-])")
G25 = ("star-graph-g25/evaluate", "star-graph-g25/q-sharp", "star-graph-g25/value", "star-graph-g25/rpo")
TEXT = ("toxicity/evaluate", "toxicity/ctl", "toxicity/ppo", "infill15/ctl", "continuation/ctl", "threshold/bounds",
        "infill15/log-z", "toxicity/frontier", "infill15/qualitative", "mine/ctl", "animals/ctl")  # fmt: skip
HH = ("hh/evaluate", "hh/exo-rw", "hh/exo-pref", "hh/generate")
D2PO = ("words/d2po", "words/dpo", "words/ppo", "pairs/reward-model", "words/budget")
STAR = ("mmlu/seed-dpo", "mmlu/seed-sft", "mmmlu/seed-sft")
SECTIONS = {
    "## Star graph": G25,
    "### `data/graphs.py`": ("star-graph-g25/graphs",),
    "### `train.py`": ("star-graph-g25/base",),
    "### `collect_rollouts.py`": ("star-graph-g25/rollouts",),
    "### `train_classifier.py`": ("star-graph-g25/value", "star-graph-g25/q-sharp"),
    "### `train_reinforce.py`": ("star-graph-g25/reinforce",),
    "### `train_dpo.py`": ("star-graph-g25/rpo",),
    "### `evaluate_ckpts.py`": ("star-graph-g25/q-sharp", "star-graph-g25/evaluate"),
    "## Twisted sequential Monte Carlo": TEXT,
    "## STaR and iterated DPO on MMLU": STAR,
    "## STaR on MMLU: the mathematics": ("animals/dpo-rw",),
    "## EXO on HH": HH,
    "## D2PO": D2PO,
}
"""Of which recipes the options in a part of the page are; the first is also whose methods are meant."""


def cells() -> list[tuple[str, tuple[str, ...], str]]:
    """Every cell of the page's tables that says what something is called here: (where, the recipes of its part, text)."""
    found, part = [], ()
    for number, line in enumerate(PAPERS.read_text().splitlines(), 1):
        if line.startswith("## "):
            part = next((own for name, own in SECTIONS.items() if line.startswith(name)), ())
            outer = part
        elif line.startswith("### "):
            part = SECTIONS.get(line, outer)
        elif line.startswith("|"):
            _, _, *ours, _ = re.split(r"(?<!\\)\|", line)
            found += [(f"line {number}", part, cell) for cell in ours]
    return found


def test_what_the_papers_say_has_its_counterpart():
    """Each cell's commands, methods with options, options, and `/stage` behind a command."""
    errors = [
        f"{where}: {why}"
        for where, part, cell in cells()
        for code in codes(cell)
        if (why := unsaid(part, cell, code.text))
    ]
    assert not errors, "\n".join(errors)
    assert {part for _, part, _ in cells()} == {*SECTIONS.values(), TEXT, HH, D2PO}


def unsaid(part: tuple[str, ...], cell: str, text: str) -> str:
    """What is wrong with code in a cell (empty: nothing, or nothing is said)."""
    first = text.split(" ")[0]
    if text.startswith("tiltlm "):
        return next((why for words in commands(Code(1, text, False)) if (why := wrong(words, False))), "")
    if first.startswith("/") and "tiltlm run " in cell:
        return wrong(["run", cell.split("tiltlm run ")[1].split("/")[0] + first], False)
    if re.fullmatch(r"\S+( --.*)?", text) and first in names():
        return wrong(["run", f"{part[0].split('/')[0]}/{first}", *text.split(" ")[1:]], False)
    if not first.startswith("--") or "_" in text:  # with _ they are the original's
        return ""
    known = set().union(*(flags_of(each) for each in part))
    unknown = [flag for flag in flags_in(text) if not is_among(flag, known)]
    if unknown or PLACEHOLDER.search(text) or "…" in text or re.search(r"--\S+( --|$)", text):
        return f"{unknown[0]} is no option of {', '.join(part)}" if unknown else ""
    said = [wrong(["run", each, *shlex.split(text)], False) for each in part]
    return "" if "" in said else said[0]


# ---- CHANGELOG.md: what a command of before is called now ---------------------------------------------------------------


def test_the_new_names_of_the_changelog_are_names():
    """The right column of its tables: recipes resolve, options are options."""
    rows = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("| `")]
    now = [code.text for row in rows for code in codes(re.split(r"(?<!\\)\|", row)[2])]
    unknown = [
        flag for text in now for flag in flags_in(text.replace(".X", ".")) if not is_among(flag, every_flag())
    ]
    named = [text for text in now if re.fullmatch(r"[a-z0-9-]+/[a-z0-9-]+", text)]
    assert not unknown and len(rows) > 20 and len(named) > 5
    assert [recipe(name).name for name in named] == named


# ---- log.md: what stands there was typed on that day --------------------------------------------------------------------

NEW_GRAMMAR = "2026-11-26"


def as_of_now(page: Path) -> str:
    """A page's text; of the log, without its entries of before the present grammar (their lines stay, empty)."""
    text = page.read_text()
    if page.name != "log.md":
        return text
    parts = re.split(r"^(?=## )", text, flags=re.M)
    return "".join("\n" * part.count("\n") if entry_before(part, NEW_GRAMMAR) else part for part in parts)


def entry_before(part: str, day: str) -> bool:
    """Whether a part of the log is an entry of an earlier day."""
    found = re.match(r"## (\d{4}-\d\d-\d\d)", part)
    return bool(found) and found[1] < day


def test_the_log_says_that_its_older_commands_are_of_another_grammar():
    intro = " ".join((ROOT / "docs" / "log.md").read_text().split("\n## ")[0].split())
    assert f"before {NEW_GRAMMAR}" in intro and "(../CHANGELOG.md)" in intro
