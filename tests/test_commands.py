"""The commands about recipes: lists, help, options, settings in files, ready models, finished runs; on a toy task."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import toy_world
from command import Done, environment, tiltlm
from tiltlm.commands.kinds import converted
from tiltlm.commands.options import changed, parsed, settings_of
from tiltlm.methods import catalogue
from tiltlm.recipes import recipe, tasks

QUICK = ("--fit.steps", "3", "--ruler.n", "20")


@pytest.fixture(autouse=True)
def toy(monkeypatch) -> None:
    toy_world.install(monkeypatch)


@pytest.fixture
def trained(tmp_path) -> str:
    """The folder of a small run of DPO."""
    return done("run", "toy/dpo", *QUICK, cwd=tmp_path)


def done(*args: str, cwd: Path) -> str:
    """The folder of the run that a command ends with."""
    return tiltlm(*args, cwd=cwd).stdout.splitlines()[-1]


def refused(*args: str, cwd: Path) -> str:
    """What a mistake is answered with: one line, status 2."""
    found: Done = tiltlm(*args, cwd=cwd, check=False)
    assert found.returncode == 2 and found.stdout == "" and found.stderr.count("\n") == 1, found
    return found.stderr


# ---- list ---------------------------------------------------------------------------------------------------------


def test_the_list_has_every_task_and_method_on_two_screens(tmp_path):
    lines = tiltlm("list", cwd=tmp_path).stdout.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 120
    shown = "\n".join(lines)
    for name in (*tasks(), "dpo", "ctl", "q-sharp", "reference", "model", "evaluate", "twisted_smc"):
        assert re.search(rf"(^|\s){re.escape(name)}[\s,]", shown), name


def test_a_word_narrows_the_list(tmp_path):
    shown = tiltlm("list", "toy", cwd=tmp_path).stdout
    assert "toy-sharp" in shown and "star-graph" not in shown and "dpo" not in shown
    assert "Did you mean toy" in tiltlm("list", "toyy", cwd=tmp_path).stdout
    assert "--matrix" in refused("list", "--matrixx", cwd=tmp_path)


def test_parts_that_the_list_only_names_are_shown_line_by_line_by_a_word(tmp_path):
    lines = tiltlm("list", "policies", cwd=tmp_path).stdout.splitlines()
    shown = {line.split()[0] for line in lines if line.startswith("  ")}
    assert shown == {*catalogue()["policies"]}
    lines = tiltlm("list", "gpu", cwd=tmp_path).stdout.splitlines()
    shown = [line for line in lines if line.startswith("  ")]
    assert len(shown) > 10 and all(line.endswith("(wants a GPU)") for line in shown)


def test_the_list_imports_nothing_heavy():
    code = """if True:
        import sys
        from tiltlm.cli import main
        main(["list"])
        print([name for name in ("torch", "tyro", "numpy") if name in sys.modules])"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert found.stdout.splitlines()[-1] == "[]"


def test_the_matrix_says_which_cells_make_sense_and_why_the_others_do_not(tmp_path):
    shown = tiltlm("list", "toy", "--matrix", cwd=tmp_path).stdout
    rows = [line for line in shown.splitlines() if line.startswith("toy ")]
    assert len(rows) == 1 and set(rows[0].split()[1:]) <= {"✓", "–"} and "✓" in rows[0]
    assert "which model? --method.model FOLDER" in shown and re.search(r"toy, toy-sharp: model", shown)


# ---- help and mistakes ----------------------------------------------------------------------------------------------


def test_short_help_shows_what_people_change_first(tmp_path):
    shown = tiltlm("run", "toy/dpo", "--help", cwd=tmp_path).stdout
    flags = re.findall(r"^  --([\w.-]+)", shown, re.M)
    assert shown.startswith("usage: tiltlm run toy/dpo") and "direct preference optimisation" in shown
    assert {"task.beta", "task.table.prompts", "task.kind", "method.beta", "fit.lr", "fit.steps", "seed"} <= {
        *flags
    }
    assert (
        "Temperature: it divides the reward. (0.5)" in shown and "{plain,fancy}" in shown and "--help-all" in shown
    )
    assert len(flags) < 24 and "fit.smoothing" not in flags and "twist.fit.lr" not in flags


def test_full_help_shows_every_setting_once(tmp_path):
    shown = tiltlm("run", "toy/dpo", "--help-all", cwd=tmp_path).stdout
    flags = re.findall(r"^  --([\w.-]+)", shown, re.M)
    wanted = [each.flag for each in settings_of(recipe("toy/dpo")) if not each.hidden]
    assert [flag for flag in flags if flag not in ("jobs", "config", "save-config")].sort() == wanted.sort()
    assert len(set(flags)) == len(flags) and "fit.smoothing" in flags


def test_help_of_a_comparison_says_how_to_set_all_and_one(tmp_path):
    shown = tiltlm("run", "toy/evaluate", "--help", cwd=tmp_path).stdout
    assert "--methods A B …" in shown and "now dpo rloo" in shown and "--METHOD.fit.lr" in shown


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("toy/dpo", "--lr", "3"), "Did you mean --fit.lr (in fit)?"),
        (("toy/dpo", "--fit.lrr", "3"), "--fit.lr (in fit)"),
        (("toy/dpo", "--shrad"), "Did you mean --shard?"),
        (("toy/dpo", "--job", "2"), "Did you mean --jobs?"),
        (("toy/dpo", "--beta", "3"), "--task.beta (in task)"),
        (("toy/evaluate", "--dpo.lr", "3"), "--dpo.fit.lr (in dpo.fit)"),
        (("toy/dpo", "--fit.lr", "fast"), "--fit.lr wants a number; got 'fast'"),
        (("toy/dpo", "--fit.steps", "1.5"), "--fit.steps wants a whole number; got '1.5'"),
        (("toy/dpo", "--fit.steps"), "--fit.steps wants a whole number; got nothing"),
        (("toy/dpo", "--task.kind", "fancie"), "plain, fancy; got 'fancie'. Did you mean fancy?"),
        (("toy/dpo", "3"), "'3' is no option"),
        (("toy/reference", "--fit.lr", "3"), "has no option --fit.lr"),
        (("toy/dpoo",), "Did you mean dpo"),
        (("tooy/dpo",), "Did you mean toy"),
        (("toy/evaluate", "--methods", "dpp"), "Did you mean"),
        (("toy",), "TASK/STAGE"),
        ((), "tiltlm list"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_nearest(args, told, tmp_path):
    assert told in refused("run", *args, cwd=tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", ["--dry-run", "--shard"])
def test_measuring_refuses_what_only_building_knows(option, tmp_path):
    assert "`tiltlm run` and `tiltlm sweep`" in refused("measure", "runs/toy", option, cwd=tmp_path)


# ---- options --------------------------------------------------------------------------------------------------------


def test_options_are_read_into_the_recipe_together():
    base = recipe("toy/ctl")
    found = parsed(
        base, ["--feed.supply", "fresh", "--feed.positives=exact", "--fit.betas", "0.8", "0.9", "--fit.keep"]
    )
    assert found.feed.positives == "exact" and found.fit.betas == (0.8, 0.9) and found.fit.keep == ()
    assert replace(found, feed=base.feed, fit=base.fit) == base
    stored = parsed(base, ["--feed.supply", "stored", "--feed.positives", "exact"])  # each alone would be refused
    assert stored.feed.supply == "stored"
    assert (
        not parsed(base, ["--ruler.no-absolute"]).ruler.absolute
        and not parsed(base, ["--no-ruler.absolute"]).ruler.absolute
    )


def test_what_is_said_to_all_methods_of_a_comparison_reaches_those_that_have_it():
    found = parsed(
        recipe("toy/evaluate", ["dpo", "ctl", "reference"]),
        ["--fit.lr", "1", "--ctl.fit.lr", "2", "--feed.size", "3"],
    )
    assert (found.cells["dpo"].fit.lr, found.cells["ctl"].fit.lr, found.cells["dpo"].feed.size) == (1.0, 2.0, 3)
    assert found.cells["reference"] == recipe("toy/evaluate", ["reference"]).cells["reference"]
    sized = parsed(
        recipe("toy/evaluate", ["dpo", "ctl"]), ["--fit.batch-size", "8"]
    )  # a twist's batch: its particles
    assert (sized.cells["dpo"].fit.batch_size, sized.cells["ctl"].fit.batch_size) == (8, 64)


def test_kinds_by_hand():
    assert converted(float, ["1"], "x") == 1.0 and isinstance(converted(float, ["1"], "x"), float)
    assert converted(float | None, ["none"], "x") is None and converted(tuple[int, ...], [], "x") == ()
    assert converted(tuple[tuple[str, float], ...], ["a", "1", "b", "2"], "x") == (("a", 1.0), ("b", 2.0))
    several = tuple[float, ...] | None
    assert converted(several, ["1", "2"], "x") == (1.0, 2.0) and converted(several, ["none"], "x") is None
    with pytest.raises(ValueError, match="x wants a number or none; got 2 values, 1 2"):
        converted(float | None, ["1", "2"], "x")
    with pytest.raises(ValueError, match="x wants 2 values each time"):
        converted(tuple[tuple[str, float], ...], ["a"], "x")
    assert changed({"a": recipe("toy/dpo")}, {("a", "seed"): 7})["a"].seed == 7


# ---- settings in files ------------------------------------------------------------------------------------------------


def test_a_file_says_what_options_say_and_options_win(tmp_path, trained):
    """Both names of a setting, nested or dotted, numbers that YAML takes for texts."""
    path = tmp_path / "small.yaml"
    path.write_text("recipe: toy/dpo\nfit: {steps: 3}\nruler:\n  n: 20\nfit.lr: 3e-2\n")
    assert done("run", "--config", str(path), cwd=tmp_path) == trained
    longer = done("run", "--config", str(path), "--fit.steps", "4", cwd=tmp_path)
    assert json.loads((tmp_path / longer / "config.json").read_text())["settings"]["fit"]["steps"] == 4
    assert done("run", "toy-sharp/dpo", "--config", str(path), cwd=tmp_path).startswith("runs/toy-sharp/dpo/")


@pytest.mark.parametrize("args", [("toy/dpo", *QUICK), ("toy/evaluate", "--methods", "dpo", "reference", *QUICK)])
def test_a_runs_own_settings_find_it_again(args, tmp_path):
    found = done("run", *args, cwd=tmp_path)
    assert done("run", "--config", f"{found}/config.json", cwd=tmp_path) == found
    for name in ("a.yaml", "a.json"):
        saved = tiltlm("run", *args, "--save-config", name, cwd=tmp_path)
        assert saved.stdout == f"{name}\n" and done("run", "--config", name, cwd=tmp_path) == found
    text = (tmp_path / "a.yaml").read_text()
    assert yaml.safe_load(text) == json.loads((tmp_path / "a.json").read_text()) and "called" not in text


def test_saving_settings_runs_nothing(tmp_path):
    tiltlm("run", "toy/dpo", "--save-config", "a.yaml", cwd=tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "recipe: toy/dpo\nfit:\n  lr: 1\n  stepps: 3\n",
            "a.yaml, line 4: toy/dpo has no setting fit.stepps. Did you mean fit.steps?",
        ),
        ("recipe: toy/dpo\nfit:\n  lr: fast\n", "a.yaml, line 3: fit.lr wants a number; got 'fast'"),
        ("recipe: toy/dpo\nzork: 3\n", "a.yaml, line 2: toy/dpo has no setting zork"),
        ("recipe: toy/dpo\nfit: {lr: {a: 1}}\n", "fit.lr is one setting"),
        ("- 3\n", "settings are names with values"),
        ("a: [\n", "a.yaml: no YAML"),
        ("fit: {lr: 1}\n", "name a recipe"),
    ],
)
def test_a_mistake_in_a_file_names_its_line(text, told, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    assert told in refused("run", "--config", "a.yaml", cwd=tmp_path)


def test_secrets_are_not_saved_and_their_loss_is_said(tmp_path):
    url = "https://ann:hunter2@host/score"
    tiltlm("run", "toy/dpo", *QUICK, "--task.reward", url, "--save-config", "a.yaml", cwd=tmp_path)
    assert "hunter2" not in (tmp_path / "a.yaml").read_text()
    found = tiltlm("run", "--config", "a.yaml", cwd=tmp_path)
    assert "--task.reward: the file holds it without its credentials" in found.stderr.replace("\n", " ")
    again = tiltlm("run", "--config", "a.yaml", "--task.reward", url, cwd=tmp_path)
    assert "credentials" not in again.stderr


# ---- ready models, finished runs --------------------------------------------------------------------------------------


def test_a_model_trained_elsewhere_is_measured_on_the_same_prompts_against_the_same_target(tmp_path, trained):
    policy = done("run", "toy/dpo-policy", "--fit.steps", "40", "--fit.lr", "0.05", cwd=tmp_path)
    checkpoint = next((tmp_path / policy).glob("checkpoint-*"))
    shown = tiltlm("measure", trained, f"trl={checkpoint}", cwd=tmp_path).stdout
    assert re.search(r"^  trl  \[\w+\]", shown, re.M) and "dpo − trl" in shown
    own = done("run", "toy/model", "--method.model", str(checkpoint), "--ruler.n", "20", cwd=tmp_path)
    assert len([*(tmp_path / "runs/toy/model").iterdir()]) == 1  # the very run that `measure` made
    trained_here = done("run", "toy/dpo", "--fit.steps", "40", "--fit.lr", "0.05", "--ruler.n", "20", cwd=tmp_path)
    reports = [json.loads((tmp_path / run / "report.json").read_text()) for run in (own, trained_here)]
    assert [row["value"] for row in reports[0]] == [
        row["value"] for row in reports[1]
    ]  # the same model, the same numbers
    assert "no such folder" in refused("measure", trained, "trl=./nowhere", cwd=tmp_path)
    assert "at least one run folder" in refused("measure", f"trl={checkpoint}", cwd=tmp_path)


def test_a_ready_model_whose_weights_change_is_another_run(tmp_path):
    policy = done("run", "toy/dpo-policy", "--fit.steps", "3", cwd=tmp_path)
    first = recipe("toy/model")
    named = replace(first, method=replace(first.method, model=str(tmp_path / policy)))
    key = named.key
    tables = next((tmp_path / policy).glob("checkpoint-*/tables.safetensors"))
    tables.write_bytes(tables.read_bytes()[:-1] + b"x")
    assert named.key != key


OLD = {
    "recipe": "animals-small/untrained",
    "settings": {
        "seed": 0,
        "family": "animals-small",
        "goal": {"beta": 1.0, "reward": "words"},
        "net": {"body": "copy"},
    },
    "files": {},
}


def test_a_run_of_an_earlier_version_is_refused_and_said_how_to_make_again(tmp_path):
    folder = tmp_path / "runs/animals-small/untrained/0123456789"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(OLD))
    for name in ("provenance.json", "DONE"):
        (folder / name).write_text("{}")
    for args in (
        ("measure", str(folder)),
        ("report", str(folder)),
        ("run", "--config", str(folder / "config.json")),
    ):
        told = refused(*args, cwd=tmp_path)
        assert "made by an earlier version" in told and "`tiltlm run animals/reference`" in told


def test_a_finished_run_is_shown_without_importing_what_only_training_needs(tmp_path, trained):
    """Of a network's libraries none: with them, a table of a finished run takes seconds."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from tiltlm import cli, recipes
        known = recipes.tasks()
        recipes.tasks = lambda: known | {{"toy": ("toy_world", "")}}
        assert cli.main({["run", "toy/dpo", *QUICK]!r}) == 0
        print([m for m in ("transformers", "peft", "datasets", "matplotlib", "scipy") if m in sys.modules])"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert found.stdout.splitlines()[-2:] == [trained, "[]"], found.stderr


def test_two_seeds_of_a_sweep_end_in_a_table_over_seeds(tmp_path):
    shown = tiltlm("sweep", "toy/dpo", *QUICK, "--seed", "0,1", cwd=tmp_path).stdout
    assert "mean over 2 seeds" in shown and shown.count("runs/toy/dpo/") == 2


SMALL = (
    "--task.model=",
    "--task.stories",
    "200",
    "--task.new-tokens",
    "4",
    "--task.fit.steps",
    "6",
    "--task.fit.warmup",
    "1",
)
SMALL += ("--exact.n", "20", "--exact.batch-size", "200", "--log-z.draws", "400", "--ruler.n", "60")


def test_a_network_of_the_same_vocabulary_is_measured_and_one_of_another_is_not(tmp_path):
    """The reference, as a model from elsewhere, is the reference to the last bit; as many tokens are not the same."""
    reference = done("run", "animals/reference", *SMALL, cwd=tmp_path)
    checkpoint = next((tmp_path / "runs/animals/base").glob("*/checkpoint-6"))
    shown = tiltlm("measure", reference, f"again={checkpoint}", cwd=tmp_path).stdout
    assert len(re.findall(r"reference − again .* identical", shown)) == 6
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    stored = json.loads((other / "tokenizer.json").read_text())
    words = stored["model"]["vocab"]
    first, second = [*words][-2:]
    words[first], words[second] = words[second], words[first]  # as many tokens, two of them other ones
    (other / "tokenizer.json").write_text(json.dumps(stored))
    found = tiltlm("measure", reference, f"other={other}", cwd=tmp_path, check=False)
    assert found.returncode == 2 and "knows another vocabulary" in found.stderr.splitlines()[-1]
