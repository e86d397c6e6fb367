"""The report page: what is on it, and that it works in a real browser without a network."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from command import tiltlm
from tiltlm.commands.compared import what_differs
from tiltlm.commands.page_tables import wide
from tiltlm.commands.report import render
from tiltlm.ruler.estimate import Estimate, t_975
from tiltlm.ruler.table import over_seeds

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
    text = render({"title": EVIL + "\u2028"})
    assert EVIL not in text and text.count("</script>") == render({"title": ""}).count("</script>")
    assert json.loads(re.search(r'id="page">(.*?)</script>', text, re.S).group(1))["title"] == EVIL + "\u2028"


def test_an_unfinished_or_foreign_folder_is_refused(tmp_path):
    for args, message in (([], "at least one run folder"), (["nowhere"], "not a run folder")):
        done = tiltlm("report", *args, cwd=tmp_path, check=False)
        assert done.returncode == 2 and message in done.stderr
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


@pytest.fixture
def tab(browser, page):
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


# ---- the numbers over seeds ---------------------------------------------------------------------------------


def test_students_quantiles_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 5, 10, 11, 20, 100, 10_000):
        assert t_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-4)
    with pytest.raises(ValueError, match="at least one degree"):
        t_975(0)


def test_over_three_seeds_by_hand():
    """1, 2, 3: mean 2, standard error 1/√3, t(2) = 4.3027: 2 ± 2.484."""
    rows = [
        {"method": "a", "metric": "m", "seed": k, "value": v, "stderr": 0.1, "certified": v - 1}
        for k, v in enumerate((1.0, 2.0, 3.0))
    ]
    (row,) = over_seeds(rows)
    assert "certified" not in row  # one seed's alone
    assert row["n"] == 3 and row["stderr"] == pytest.approx(3**-0.5)
    assert (row["low"], row["high"]) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-3)
    assert Estimate(1.0, 0.1, 1).interval() == (-torch.inf, torch.inf)


def test_a_bracketed_log_z_stays_an_interval_over_seeds():
    rows = [
        {
            "method": "a",
            "metric": "m",
            "value": v,
            "stderr": 0.1,
            "low": v - 1,
            "high": v + 2,
            "gap": 3.0,
            "seed": v,
        }
        for v in (1.0, 2.0)
    ]
    (row,) = over_seeds(rows)
    half = (
        12.7062 * 0.5
    )  # Student's t with two seeds: the spread over seeds is in it, beyond the bracket's mean ends
    assert (row["low"], row["high"], row["gap"]) == pytest.approx((0.5 - half, 3.5 + half, 3.0), abs=1e-3)
    assert wide([row], "t", "")["rows"][0]["m"]["t"] == "[-5.853, 9.853]"


def test_runs_that_differ_in_more_than_the_seed_are_told_apart():
    from dataclasses import replace

    from tiltlm.recipes import recipe

    one = recipe("animals/ctl")
    other = replace(one, task=one.task.at(0.1))
    assert what_differs([one, other, replace(one, seed=7)]) == ["task.beta=1.0", "task.beta=0.1", "task.beta=1.0"]
    assert what_differs([one, replace(one, seed=7)]) == ["", ""]
    assert what_differs([one, recipe("animals/dpg")]) == ["", ""]  # other stages are no variants
