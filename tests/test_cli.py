"""The command line from the outside: what a newcomer types, and what comes back."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command import environment, from_outside, tiltlm
from families import build
from tiltlm import cli
from tiltlm.commands.arguments import unboxed
from tiltlm.commands.run import grid, what_varies

# A walker too small and too short to learn anything: it exercises every stage in seconds.
TINY = ["--task.network.layers", "1", "--task.network.width", "16", "--task.network.mlp", "16"]
TINY += ["--task.base.steps", "40", "--task.base.until", "0", "--task.base.checkpoint-every", "10"]
TINY += ["--task.world.posttrain", "80", "--task.world.test", "50"]
TINY_FITS = ["--task.rollouts.max-tries", "20", "--ruler.prompts", "50"]


def test_list_names_every_task_and_method_without_importing_torch(tmp_path):
    script = "import sys; from tiltlm.cli import main; main(['list']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    from tiltlm.methods import names
    from tiltlm.recipes import tasks

    assert {*tasks(), *names()} <= set(re.split(r"[\s,]+", done.stdout))
    assert len(done.stdout.splitlines()) <= 80  # two screens


def test_every_stage_of_every_task_can_be_made_and_knows_its_name():
    from tiltlm.methods import names
    from tiltlm.recipes import preset_of, recipe, tasks

    for task in tasks():
        own = preset_of(task).task.stages(0)
        for stage in (
            *names(),
            *own,
            "evaluate",
            "exact",
            "log-z",
            "generate",
            "label",
            "value",
            "dpo-policy",
            "ctl-twist",
        ):
            assert recipe(f"{task}/{stage}").name == f"{task}/{stage}"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["rum", "star-graph/base"], "Did you mean run?"),
        (["run", "star-graph/qsharp"], "q-sharp"),
        (["run", "star-graph/q-sharp", "--task.beta", "-1"], "beta must be positive"),
        (["run", "star-graph/base", "--task.world.degree", "9"], "distinct labels"),
        (["score", "exact-answr", "x", "--out", "y"], "exact-answer"),
        (["measure", "."], "not a run folder"),
        (["run", "star-graph/q-sharp", "--task.rollouts.n", "0"], "labelled draws"),
        (["run", "star-graph/dpo", "--task.rollouts.pairs", "gone.jsonl"], "gone.jsonl: no such file"),
        (["run", "star-graph/q-sharp", "--method.decode.calibrate"], "needs none"),
    ],
)
def test_mistakes_end_in_one_line_that_helps(args, said, tmp_path):
    done = tiltlm(*args, cwd=tmp_path, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_the_installed_program_works_from_outside(tmp_path):
    done = from_outside("run", "tree/solve", cwd=tmp_path)
    assert done.returncode == 0 and "KL(q‖ref)" in done.stdout and "runs/tree/solve" in done.stdout
    assert list((tmp_path / "runs/tree/solve").glob("*/report.json"))
    done = from_outside("run", "tree/slove", cwd=tmp_path)
    assert done.returncode == 2 and "Did you mean solve?" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("pairs/dpo-policy", "pairs/dpo"),
        ("animals/ctl-twist", "animals/ctl"),
        ("star-graph/value", "star-graph/METHOD"),
    ],
)
def test_options_of_measuring_are_said_to_be_that(name, where, tmp_path):
    done = tiltlm("run", name, "--ruler.n", "5", cwd=tmp_path, check=False)
    assert done.returncode == 2 and f"--ruler.n is an option of `tiltlm run {where}`" in done.stderr


def test_a_misspelt_option_names_the_nearest(tmp_path):
    done = tiltlm("run", "star-graph/dpo", "--method.bta", "0.5", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "--method.beta" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("sample m --prompts p --out y --draw.precision bf16", "Expected one of ('float32', 'bfloat16') (`tiltlm"),
        ("prepare x --out y.jsonl --as pair", "invalid choice 'pair' for argument '--as'"),
        ("doctor m --batch two", "Error parsing --batch: invalid literal for int() with base 10: 'two'"),
        ("sample m --prompts p --out y --temprature 2", "--temprature, 2; Perhaps you meant: --temperature"),
        ("sample", "Missing from tiltlm sample: MODEL, --prompts STR, --out PATH"),
        ("score r", "Missing from tiltlm score: ROWS, --out PATH"),
        ("measure r --seed x", "tiltlm measure --help"),
        ("runs du --x 1", "Unrecognized options: --x, 1 (`tiltlm runs du --help`)"),
    ],
)  # fmt: skip
def test_arguments_that_mean_nothing_are_one_line(args, said, tmp_path):
    done = tiltlm(*args.split(), cwd=tmp_path, check=False)
    assert done.returncode == 2 and said in done.stderr
    assert done.stderr.count("\n") == 1 and "│" not in done.stderr, "no box"


def test_a_box_of_a_terminal_is_read_as_well():
    box = """\
╭─ Required options ──────────────────────────────╮
│ Missing from tiltlm score:                      │
│     --out PATH                                  │
│         The .jsonl file to write. (required)    │
│ ─────────────────────────────────────────────── │
│ Unrecognized options:                           │
│     --dtype                                     │
│ ─────────────────────────────────────────────── │
│ For full helptext, run:                         │
│     tiltlm score --help                         │
╰─────────────────────────────────────────────────╯
"""
    assert list(unboxed(box)) == ["Missing from tiltlm score: --out PATH", "Unrecognized options: --dtype"]


def test_help_answers_everywhere(capsys):
    assert cli.main(["--help"]) == 0
    assert "tiltlm demo" in capsys.readouterr().out
    for command in ("run", "sweep", "sample", "score", "measure", "compare", "power", "runs", "demo", "list"):
        try:
            assert cli.main([command, "--help"]) == 0
        except SystemExit as stop:
            assert stop.code == 0
        assert len(capsys.readouterr().out) > 60, command


def test_grid_is_the_product_of_comma_lists():
    points = grid(["--seed", "1,2", "--task.beta=0.5,1", "--task.world.reverse"])
    assert len(points) == 4 and points[0] == ["--seed", "1", "--task.beta=0.5", "--task.world.reverse"]
    assert points[3] == ["--seed", "2", "--task.beta=1", "--task.world.reverse"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder in which every method has run once, at toy size."""
    folder = tmp_path_factory.mktemp("tiny")
    fits = ["--fit.steps=8", "--fit.until=0"]
    done = tiltlm("run", "star-graph/evaluate", *TINY, *TINY_FITS, *fits, "--ruler.also=1.0", cwd=folder)
    (folder / "stdout").write_text(done.stdout)
    return folder


def run_of(folder: Path, stage: str) -> Path:
    """The first run of a stage."""
    return min((folder / "runs" / "star-graph" / stage).iterdir(), key=lambda path: path.stat().st_ctime_ns)


def test_evaluate_builds_everything_and_reports_every_method(tiny):
    rows = json.loads((run_of(tiny, "evaluate") / "report.json").read_text())
    names = {"recipe", "method", "metric", "value", "stderr", "n", "unit", "low", "high", "interval", "seed"}
    assert all(names <= set(r) <= names | {"doubt"} for r in rows)
    methods = {row["method"] for row in rows}
    assert {"reference", "optimum (exact)", "reinforce", "dpo", "rpo", "cd", "fudge-value", "q-sharp"} <= methods
    needed = {"accuracy", "valid_rate", "reward", "kl_to_reference", "kl_to_target", "objective_gap", "log_z"}
    for method in methods:
        assert needed <= {row["metric"] for row in rows if row["method"] == method}, method
    assert (run_of(tiny, "evaluate") / "frontier.png").stat().st_size > 10_000
    results = json.loads((run_of(tiny, "evaluate") / "results_deg_2_path_3.json").read_text())
    assert {"pretrain", "q# (0.1)", "cd (0.1)", "reinforce", "dpo", "rpo"} <= set(results)
    classifier = json.loads((run_of(tiny, "value") / "report.json").read_text())
    assert {"value_loss_1", "p_wrong_3"} <= {row["metric"] for row in classifier}
    assert "KL(q‖pi*)" in (tiny / "stdout").read_text() and "E[r]" in (tiny / "stdout").read_text()


def test_no_method_comes_out_above_the_optimum(tiny):
    """The measured distance to pi* is not below 0 by more than 4 standard errors, even for untrained nets."""
    rows = json.loads((run_of(tiny, "evaluate") / "report.json").read_text())
    gaps = [row for row in rows if row["metric"] == "kl_to_target" and row["method"] != "optimum (exact)"]
    assert len(gaps) >= 7 and all(row["value"] > -4 * row["stderr"] for row in gaps)


def test_one_value_model_serves_all_decoders_and_nothing_is_built_twice(tiny):
    assert len(list((tiny / "runs" / "star-graph" / "value").iterdir())) == 1
    assert len(list((tiny / "runs" / "star-graph" / "base").iterdir())) == 1


def test_a_checkpoint_loads_with_transformers_as_it_is(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run_of(tiny, "dpo-policy") / "checkpoint-8"
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 14
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("3,4|5,6/3,6=")["input_ids"] == [3, 4, 10, 5, 6, 12, 3, 6, 11]
    assert tokenizer.decode([3, 4, 6]) == "3,4,6"


def test_provenance_says_where_the_numbers_come_from(tiny):
    said = json.loads((run_of(tiny, "q-sharp") / "provenance.json").read_text())
    assert (
        said["command"].startswith("tiltlm run star-graph/evaluate --task.network.layers 1") and said["seed"] == 0
    )
    assert {"torch", "transformers", "tiltlm"} <= set(said["versions"])


def test_measure_compares_runs_prompt_by_prompt(tiny):
    runs = [str(run_of(tiny, stage)) for stage in ("dpo", "rpo")]
    done = tiltlm("measure", *runs, "--out", "both.json", cwd=tiny)
    assert "dpo" in done.stdout and ("no difference shown" in done.stdout or "higher" in done.stdout)
    assert len(json.loads((tiny / "both.json").read_text())) > 10
    done = tiltlm("measure", str(run_of(tiny, "base")), cwd=tiny, check=False)
    assert done.returncode == 2 and "no report" in done.stderr


def test_runs_measured_on_different_prompts_are_not_paired(tiny):
    fits = ["--fit.steps=8", "--ruler.prompts=40"]
    tiltlm("run", "star-graph/dpo", *TINY, "--task.rollouts.max-tries", "20", *fits, cwd=tiny)
    runs = [str(path) for path in (tiny / "runs/star-graph/dpo").iterdir()]
    assert len(runs) == 2
    done = tiltlm("measure", *runs, cwd=tiny)
    assert "different prompts" in done.stderr and "verdict" not in done.stdout


def test_another_beta_measures_again_but_trains_nothing_again(tiny):
    fits = ["--fit.steps=8", "--ruler.prompts=50", "--task.beta=0.3"]
    tiltlm("run", "star-graph/dpo", *TINY, "--task.rollouts.max-tries", "20", *fits, cwd=tiny)
    assert len(list((tiny / "runs/star-graph/dpo-policy").iterdir())) == 1
    runs = {}
    for folder in (tiny / "runs/star-graph/dpo").iterdir():
        settings = json.loads((folder / "config.json").read_text())["settings"]
        if settings["ruler"]["prompts"] == 50:
            runs[settings["task"]["beta"]] = str(folder)
    said = tiltlm("measure", runs[0.1], runs[0.3], cwd=tiny).stdout.split("verdict")[1]
    assert "KL(q‖ref)" in said and "KL(q‖pi*)" not in said  # the targets differ, so that distance does not compare


def test_sampling_from_what_draws_nothing_is_refused(tiny, tmp_path):
    (tmp_path / "p.jsonl").write_text(PROMPTS)
    args = ["--prompts", "p.jsonl", "--out", "y.jsonl"]
    done = tiltlm("sample", str(run_of(tiny, "evaluate")), *args, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "draws nothing itself" in done.stderr
    tiltlm("run", "tree/solve", cwd=tiny)
    (tree,) = (tiny / "runs/tree/solve").iterdir()
    done = tiltlm("sample", str(tree), *args, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "is no decoder" in done.stderr


def test_a_model_of_ones_own_can_be_the_reference_and_pairs_can_come_from_a_file(tiny):
    checkpoint, pairs = run_of(tiny, "base") / "checkpoint-40", run_of(tiny, "rollouts") / "pairs.jsonl"
    args = [*TINY, "--task.pretrained", str(checkpoint), "--task.rollouts.pairs", str(pairs), "--seed", "4"]
    done = tiltlm("run", "star-graph/rollouts", *args, cwd=tiny)
    folder = tiny / done.stdout.strip().splitlines()[-1]
    assert (folder / "pairs.jsonl").read_bytes() == pairs.read_bytes()
    (taken,) = (tiny / "runs/star-graph/base").glob("*/checkpoint-0/model.safetensors")
    assert taken.read_bytes() == (checkpoint / "model.safetensors").read_bytes()


PROMPTS = """\
{"prompt": "3,4|5,6|3,5|4,7/3,6=", "answer": "3,5,6"}
{"prompt": [3, 4, 10, 5, 6, 10, 3, 5, 10, 4, 7, 12, 3, 7, 11], "answer": "3,4,7"}
{"prompt": "1,4|5,6|1,5|4,7/1,6=", "answer": "1,5,6"}
"""


def test_grouped_samples_are_the_same_draws_and_go_on_where_they_stopped(tmp_path):
    """One line per prompt: the completions of the plain file, in lists; cut in mid-line it is completed bit by bit."""
    folder = tmp_path / "model"
    build("gpt2").save(folder)
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": [{k}, 3], "id": {k}}}\n' for k in range(4)))
    args = ["sample", "model", "--prompts", "p.jsonl", "--n", "3", "--max-new-tokens", "4", "--batch-size", "6"]
    tiltlm(*args, "--out", "plain.jsonl", cwd=tmp_path)
    tiltlm(*args, "--out", "grouped.jsonl", "--grouped", cwd=tmp_path)
    plain, grouped = (
        [json.loads(x) for x in (tmp_path / f"{name}.jsonl").open()] for name in ("plain", "grouped")
    )
    assert [row["id"] for row in grouped] == [0, 1, 2, 3]
    for name in ("completion_ids", "log_q", "finished"):
        assert [x for row in grouped for x in row[name]] == [row[name] for row in plain]
    whole = (tmp_path / "grouped.jsonl").read_bytes()
    (tmp_path / "grouped.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    tiltlm(*args, "--out", "grouped.jsonl", "--grouped", cwd=tmp_path)
    assert (tmp_path / "grouped.jsonl").read_bytes() == whole


@pytest.mark.parametrize("stage", ["base", "q-sharp"])
def test_sample_and_score_any_run(tiny, stage, tmp_path):
    (tmp_path / "p.jsonl").write_text(PROMPTS)
    run = str(run_of(tiny, stage))
    tiltlm("sample", run, "--prompts", "p.jsonl", "--n", "2", "--out", "y.jsonl", cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "y.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(len(r["completion_ids"]) == 3 and r["log_q"] < 0 and r["finished"] for r in rows)
    tiltlm("score", "exact-answer", "y.jsonl", "--out", "s.jsonl", cwd=tmp_path)
    scored = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in scored] == [float(row["completion"] == row["answer"]) for row in rows]


def test_sampling_resumes_in_the_middle_and_does_not_depend_on_batch_size(tiny, tmp_path):
    (tmp_path / "p.jsonl").write_text(PROMPTS)
    args = ["sample", str(run_of(tiny, "base")), "--prompts", "p.jsonl", "--n", "3", "--out"]
    tiltlm(*args, "whole.jsonl", cwd=tmp_path)
    tiltlm(*args, "parts.jsonl", "--batch-size", "3", cwd=tmp_path)
    whole = (tmp_path / "whole.jsonl").read_text()
    rows = [[json.loads(x) for x in text.splitlines()] for text in (whole, (tmp_path / "parts.jsonl").read_text())]
    assert [r["completion_ids"] for r in rows[0]] == [r["completion_ids"] for r in rows[1]]
    (tmp_path / "whole.jsonl").write_text(whole[: len(whole) // 2])  # cut in the middle of a line
    tiltlm(*args, "whole.jsonl", cwd=tmp_path)
    again = [json.loads(line)["completion_ids"] for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert again == [r["completion_ids"] for r in rows[0]]
    done = tiltlm(*args, "whole.jsonl", "--seed", "5", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "begun with seed=0" in done.stderr


def test_a_bad_line_is_named(tiny, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "3,4"}\n{"prompt": oops}\n')
    args = ["--out", "y.jsonl", "--prompts", "p.jsonl"]
    done = tiltlm("sample", str(run_of(tiny, "base")), *args, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "p.jsonl:2: not JSON" in done.stderr
    (tmp_path / "p.jsonl").write_text('{"text": "3,4"}\n')
    done = tiltlm("sample", str(run_of(tiny, "base")), *args, cwd=tmp_path, check=False)
    assert "p.jsonl:1: column 'prompt' is missing; this line has text" in done.stderr


def test_score_with_a_function_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def length(prompts, completions):\n    return [len(y) for y in completions]\n"
    )
    (tmp_path / "y.jsonl").write_text('{"completion": "abc"}\n{"completion": ""}\n')
    tiltlm("score", "mine.py:length", "y.jsonl", "--out", "s.jsonl", cwd=tmp_path)
    assert [json.loads(x)["reward"] for x in (tmp_path / "s.jsonl").read_text().splitlines()] == [3.0, 0.0]
    done = tiltlm("score", "mine.py:lenght", "y.jsonl", "--out", "s.jsonl", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "it has length" in done.stderr
    done = tiltlm("score", "mine.py:length", "y.jsonl", "--out", "y.jsonl", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "never replace" in done.stderr


def test_over_seeds_by_hand():
    """Values 1, 2, 6: mean 3, standard deviation √7, standard error √(7/3) = 1.5275."""
    from tiltlm.ruler.table import over_seeds

    head = {"recipe": "r", "method": "m", "metric": "reward", "stderr": 0.1, "n": 9, "unit": "reward"}
    (row,) = over_seeds([{**head, "value": v, "seed": k} for k, v in enumerate([1.0, 2.0, 6.0])])
    assert (row["value"], row["n"]) == (3.0, 3) and row["stderr"] == pytest.approx(1.5275, abs=1e-4)


def test_what_varies_in_a_grid():
    points = grid(["--seed", "1,2", "--task.beta=0.5,1", "--task.world.reverse"])
    assert what_varies(points[3], points) == {"--seed": "--seed 2", "--task.beta": "--task.beta=1"}


def test_graphs_are_written_in_the_original_s_format_and_read_back(tmp_path):
    """`star-graph/graphs`, then a base pre-trained from that folder; a folder without the files is refused."""
    sizes = ["--task.world.pretrain", "64", "--task.world.posttrain", "80", "--task.world.test", "50"]
    tiltlm("run", "star-graph/graphs", *sizes, cwd=tmp_path)
    folder = run_of(tmp_path, "graphs")
    names = sorted(path.name for path in folder.glob("*.txt"))
    assert names == [f"deg_2_path_3_nodes_10_{split}.txt" for split in ("50_test", "64_pretrain", "80_posttrain")]
    tiltlm("run", "star-graph/rollouts", *TINY, "--task.world.folder", str(folder), cwd=tmp_path)
    pairs = (run_of(tmp_path, "rollouts") / "pairs.jsonl").read_text().splitlines()
    first = (folder / "deg_2_path_3_nodes_10_80_posttrain.txt").read_text().split("\n")[0]
    graph, path = first.split("=")
    row = json.loads(pairs[0])
    assert row["x"][-1] == 11 and row["y_pred_chosen"][-3:] == [int(node) for node in path.split(",")], graph
    done = tiltlm("run", "star-graph/base", *TINY, "--task.world.folder", str(tmp_path), cwd=tmp_path, check=False)
    assert done.returncode == 2 and "must hold one file deg_2_path_3_nodes_10*pretrain*.txt" in done.stderr


def test_sweep_runs_the_grid_and_finds_what_is_done(tmp_path):
    args = ["sweep", "tree/solve", "--seed", "1,2"]
    out = tiltlm(*args, cwd=tmp_path).stdout
    assert len(out.split("runs/tree/solve/")) == 3 and "--seed 2" in out and "mean over 2 seeds" in out
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("DONE"))
    tiltlm(*args, cwd=tmp_path)
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("DONE")) == before and len(before) == 2


def a_checkpoint_is_complete(folder: Path) -> bool:
    """Whether a checkpoint is whole; folders may come and go while one looks."""
    try:
        return bool(list(folder.rglob("checkpoint-*/COMPLETE")))
    except FileNotFoundError:
        return False


def test_a_killed_run_goes_on_and_ends_bit_for_bit_the_same(tmp_path):
    """Kill -9 at a random moment after the first checkpoint; the same command ends where an unkilled run does."""
    command = ["run", "star-graph/base", *TINY, "--task.network.dropout", "0.1", "--task.base.steps", "600"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    tiltlm(*command, cwd=whole)
    args = [sys.executable, "-m", "tiltlm.cli", *command]
    process = subprocess.Popen(
        args, cwd=cut, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not a_checkpoint_is_complete(cut) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random())
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed: give it more steps"
    tiltlm(*command, cwd=cut)
    files = ["checkpoint-600/model.safetensors", "metrics.jsonl"]
    for name in files:
        assert (run_of(whole, "base") / name).read_bytes() == (run_of(cut, "base") / name).read_bytes(), name
