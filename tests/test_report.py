"""The report page: what is on it, and that it works in a real browser without a network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from command import tiltlm
from tiltlm.commands.report import pieces
from tiltlm.recipes import recipe
from tiltlm.run import Run, begin, find, provenance
from tiltlm.samples import Samples, Tokens

FLAGS = [
    "--task.model=",
    "--task.stories",
    "200",
    "--task.new-tokens",
    "4",
    "--exact.n",
    "20",
    "--task.fit.steps",
    "6",
]
FLAGS += ["--task.fit.warmup", "1", "--log-z.draws", "400", "--ruler.n", "60", "--exact.batch-size", "200"]
FLAGS += ["--ctl.fit.steps", "2", "--ctl.feed.particles", "6"]
EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report of two seeds of a comparison of two methods, one of whose samples is hostile."""
    work = tmp_path_factory.mktemp("report")
    runs = []
    for seed in ("0", "1"):
        done = tiltlm("run", "animals/evaluate", *FLAGS, "--seed", seed, "--methods", "reference", "ctl", cwd=work)
        runs.append(done.stdout.splitlines()[-1])
    path = next((work / "runs/animals/ctl").glob("*/samples.jsonl"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(lines[0]) | {"completion": EVIL, "log_w": 1e9}), *lines[1:]]))
    tiltlm("report", *runs, "--out", "page.html", "--title", "A & B <i>", "--samples", "60", cwd=work)
    return work / "page.html"


def content(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="page">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    return json.loads(found.group(1))


def test_the_page_holds_tables_pictures_samples_and_where_they_come_from(page):
    it = content(page)
    titles = [table["title"] for table in it["tables"]]
    assert titles == ["animals: over seeds", "animals: every run", "Differences in pairs"]
    seeds, every, pairs = it["tables"]
    assert [row["method"] for row in seeds["rows"]] == ["reference", "ctl"]
    assert len(every["rows"]) == 4 and {row["seed"] for row in every["rows"]} == {0, 1}
    labels = [column["label"] for column in seeds["columns"]]
    assert "KL(q‖pi*)" in labels and "KL(pi*‖q)" in labels
    assert re.fullmatch(
        r"-?\d\.\d{3} ± \d\.\d{3}  \[-?\d+\.\d{3}, -?\d+\.\d{3}\]", seeds["rows"][1]["kl_to_target"]["t"]
    )
    assert {row["verdict"] for row in pairs["rows"]} <= {"higher", "lower", "no difference shown", "identical"}
    assert {(row["first"], row["second"]) for row in pairs["rows"]} == {("reference", "ctl")}  # over both seeds
    assert "Over 2 seeds" in pairs["about"]
    assert len(it["samples"]["rows"]) == 2 * (2 * 60 + 20)  # both methods', and the exact draws
    assert {picture["title"] for picture in it["pictures"]} == {
        "animals/evaluate: kl",
        "animals/evaluate: frontier",
    }
    assert any("log Z" in run["facts"] for run in it["runs"])
    assert any(run["facts"]["command"].startswith("tiltlm run animals/evaluate") for run in it["runs"])


def test_nothing_is_loaded_from_elsewhere(page):
    text = page.read_text()
    assert "Content-Security-Policy" in text and "default-src 'none'" in text
    assert not re.findall(r"(?:src|href)=[\"']?https?:", text) and "@import" not in text


def test_no_text_can_end_the_element_it_stands_in():
    text, plain = ("".join(pieces({"title": title})) for title in (EVIL + "\u2028", ""))
    assert EVIL not in text and text.count("</script>") == plain.count("</script>")
    assert json.loads(re.search(r'id="page">(.*?)</script>', text, re.S).group(1))["title"] == EVIL + "\u2028"


def test_an_unfinished_or_foreign_folder_is_refused(tmp_path):
    for args, message in (([], "at least one run folder"), (["nowhere"], "not a run folder")):
        done = tiltlm("report", *args, cwd=tmp_path, check=False)
        assert done.returncode == 2 and message in done.stderr
    (tmp_path / "runs" / "task" / "stage" / "key").mkdir(parents=True)
    (tmp_path / "runs" / "task" / "stage" / "key" / "provenance.json").touch()
    done = tiltlm("report", "runs", cwd=tmp_path, check=False)
    assert "not a run folder" in done.stderr and "name runs/task/stage/*" in done.stderr
    done = tiltlm("report", "nowhere", "--samples", "-1", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "0 or more" in done.stderr


# ---- in the browser -----------------------------------------------------------------------------------------


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium`")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield found
        found.close()


@contextmanager
def opened(browser, page: Path) -> Iterator[Any]:
    """The page, opened offline; any complaint of the browser fails the test."""
    context = browser.new_context(offline=True)
    tab, complaints = context.new_page(), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda r: complaints.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
    tab.goto(page.as_uri())
    yield tab
    context.close()
    assert not complaints, complaints


@pytest.fixture
def tab(browser, page):
    with opened(browser, page) as tab:
        yield tab


def column(tab, name: str) -> list[str]:
    """The shown cells of a column of the samples."""
    labels = tab.locator("#samples th button").all_inner_texts()
    return tab.locator(f"#samples tbody td:nth-child({labels.index(name) + 1})").all_inner_texts()


def test_the_browser_shows_it_all_and_runs_nothing_a_model_wrote(tab):
    assert tab.title() == "A & B <i>"
    headings = tab.locator("h2").all_inner_texts()
    assert headings[:3] == ["Verdict", "animals: over seeds", "animals: every run"]
    assert headings[3:] == ["Differences in pairs", "Pictures", "Training", "Samples", "Runs"]
    width = tab.locator("figure img").first.evaluate("image => image.decode().then(() => image.naturalWidth)")
    assert width > 300
    tab.locator("#samples input[type=search]").fill("onerror")
    assert column(tab, "completion") == [EVIL] and tab.title() == "A & B <i>"
    assert tab.locator("#samples mark").inner_text() == "onerror"


def test_the_verdict_comes_first_and_says_how_far_it_goes(tab, page):
    (verdict,) = content(page)["verdicts"]
    assert {row["method"] for row in verdict["rows"]} == {"ctl", "reference"} and "Over 2 seeds" in verdict[
        "about"
    ]
    first = tab.locator("section").first
    assert first.locator("strong").inner_text() == verdict["title"]
    assert first.locator("tbody tr").first.inner_text().endswith("the highest")


def test_training_curves_are_drawn_for_the_metric_chosen(tab, page):
    curves = content(page)["curves"]
    assert [each["name"] for each in curves if "loss" in each["metrics"]]
    charts = tab.locator("#training figure")
    assert charts.count() == sum("loss" in each["metrics"] for each in curves)
    shape = charts.first.locator("path").get_attribute("d")
    assert shape.startswith("M") and "NaN" not in shape
    tab.locator("#training select").select_option("lr")
    assert charts.count() == sum("lr" in each["metrics"] for each in curves)
    assert charts.first.locator("svg").get_attribute("aria-label").endswith(": lr")


def test_samples_sort_by_a_click(tab):
    head = tab.locator("#samples th button", has_text=re.compile("^reward$"))
    head.click()
    down = [float(text) for text in column(tab, "reward")]
    assert down == sorted(down, reverse=True) and len(set(down)) > 1
    assert tab.locator("#samples th[aria-sort=descending]").inner_text().startswith("reward")
    head.click()
    up = [float(text) for text in column(tab, "reward")]
    assert up == sorted(up) and up[0] < down[0]


def test_samples_filter_by_run_text_and_number_and_turn_pages(tab):
    status = tab.locator("#samples [role=status]")
    assert status.inner_text() == "1–50 of 280"
    tab.locator("#samples .more").click()
    assert status.inner_text() == "51–100 of 280"
    tab.locator("#samples .choice").select_option("animals/ctl · seed 0")
    assert status.inner_text() == "1–50 of 60 (280 in all)"
    assert set(column(tab, "run")) == {"animals/ctl · seed 0"}
    tab.locator("#samples .bounded").select_option("log_w")
    tab.locator("#samples .least").fill("-5.0")
    kept = [float(text) for text in column(tab, "log_w")]
    assert 0 < len(kept) < 50 and min(kept) >= -5


def test_results_sort_too_missing_values_last(tab):
    table = tab.locator("section").nth(2).locator("table")
    table.locator("th button", has_text="KL(q‖pi*)").click()
    methods = table.locator("tbody td:first-child").all_inner_texts()
    assert sorted(methods) == ["ctl", "ctl", "reference", "reference"]
    labels = table.locator("th").all_inner_texts()
    at = next(k for k, label in enumerate(labels) if label.startswith("KL(q‖pi*)"))
    shown = [float(row.split()[0]) for row in table.locator(f"tbody td:nth-child({at + 1})").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)


# ---- many samples -------------------------------------------------------------------------------------------


MANY = 100_000


def run_with(samples: str, root: Path) -> Run:
    """A finished run with these lines as its samples, made without any model."""
    run = find(recipe("animals/reference"), root)
    begin(run)
    run.write_json("provenance.json", provenance(0, ""))
    (run.folder / "samples.jsonl").write_text(samples)
    (run.folder / "DONE").touch()
    return run


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Run:
    """100,000 samples of rewards 0 to 99,999, each once, in no order."""
    lines = (f'{{"prompt": "p", "completion": "c{k} ", "reward": {k * 37 % MANY}}}\n' for k in range(MANY))
    return run_with("".join(lines), tmp_path_factory.mktemp("many") / "runs")


def test_of_many_samples_it_shows_random_and_extreme_ones_and_where_the_rest_is(browser, many, tmp_path):
    """The places of those drawn at random: their mean is 50,000 within 4 standard errors of 28,868/√100."""
    tiltlm("report", str(many.folder), "--out", "page.html", cwd=tmp_path)
    rewards = {"at random": [], "highest reward": [], "lowest reward": []}
    for row in content(tmp_path / "page.html")["samples"]["rows"]:
        rewards[row["shown as"]].append(row["reward"])
    assert set(rewards["highest reward"]) <= set(range(MANY - 50, MANY)) and len(rewards["highest reward"]) > 40
    assert set(rewards["lowest reward"]) <= set(range(50)) and len(rewards["lowest reward"]) > 40
    assert len(set(rewards["at random"])) == 100
    places = [reward * pow(37, -1, MANY) % MANY for reward in rewards["at random"]]
    assert abs(sum(places) / 100 - MANY / 2) < 4 * 2887
    assert (tmp_path / "page.html").stat().st_size < 100_000
    with opened(browser, tmp_path / "page.html") as tab:
        said = tab.locator(".rest")
        assert "200 shown of 100,000 in samples.jsonl" in said.locator("li").inner_text()
        assert Path(said.locator("a").evaluate("link => new URL(link.href).pathname")).samefile(
            many.folder / "samples.jsonl"
        )
        tab.locator("#samples input[type=search]").fill("highest")
        assert tab.locator("#samples [role=status]").inner_text().endswith("(200 in all)")


def test_a_page_of_100_000_samples_sorts_and_filters_and_shows_fifty_at_a_time(browser, many, tmp_path):
    tiltlm("report", str(many.folder), "--out", "page.html", "--samples", str(MANY), cwd=tmp_path)
    with opened(browser, tmp_path / "page.html") as tab:
        status = tab.locator("#samples [role=status]")
        assert status.inner_text() == "1–50 of 100000" and tab.locator(".rest").count() == 0
        tab.locator("#samples th button", has_text=re.compile("^reward$")).click()
        tab.locator("#samples .more").click()
        assert column(tab, "reward") == [str(k) for k in range(MANY - 51, MANY - 101, -1)]
        tab.locator("#samples input[type=search]").fill("c77777 ")
        assert column(tab, "completion") == ["c77777"] and status.inner_text() == "1–1 of 1 (100000 in all)"
        assert tab.evaluate("document.querySelectorAll('*').length") < 1000


def test_draws_that_are_kept_as_ids_alone_are_named_and_a_broken_file_leaves_no_page(tmp_path):
    run = run_with('{"prompt": "a", "completion": "b"}\n\n', tmp_path / "runs")
    ids = torch.zeros(7, 1, dtype=torch.int64)
    Samples(Tokens.of([[0]]), ids[:, 0], ids, ids == 0).save(run.folder / "samples.safetensors")
    tiltlm("report", str(run.folder), "--out", "page.html", cwd=tmp_path)
    (said,) = content(tmp_path / "page.html")["samples"]["rest"]
    assert (said["shown"], said["texts"], said["drawn"]) == (1, 1, 7)
    assert (tmp_path / said["href"]).samefile(run.folder)
    (run.folder / "samples.jsonl").write_text('{"prompt": "a"}\n{"prompt')
    done = tiltlm("report", str(run.folder), "--out", "other.html", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "samples.jsonl:2" in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]
