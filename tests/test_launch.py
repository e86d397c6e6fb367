"""Runs handed to schedulers: the options, the graph, what SLURM is told, a preempted job of submitit's own executor.

SLURM itself is asked in test_on_slurm.py, Ray in test_on_ray.py. Here stand-ins of sbatch and squeue write down what
they are told, behind the real submitit.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import submitit

from command import tiltlm
from runs import BASE, files_of
from tiltlm.commands.launch import slurm
from tiltlm.commands.launch.graph import apart, in_order, needs
from tiltlm.commands.launch.logs import LAST_LINES, tail
from tiltlm.commands.launch.order import Order
from tiltlm.commands.launch.settings import Launch, Ray, Slurm, launching
from tiltlm.commands.launch.slurm import ORDER, Work, dependency, parameters
from tiltlm.commands.run import parse
from tiltlm.run import Run, find

EVALUATE = ["star-graph/evaluate", "--methods", "q-sharp", "cd"]
SLURM = ["--on", "slurm", "--slurm.partition", "overcap"]


# ---- options ----------------------------------------------------------------------------------------------------


def test_options_of_launching_stand_anywhere_beside_those_of_the_recipe():
    args = [
        "--on",
        "slurm",
        "toy/dpo",
        "--slurm.time=2880",
        "--seed",
        "1,2",
        "--slurm.setup",
        "module load cuda",
        "date",
    ]
    args += ["--detach", "--fit.lr", "0.1", "--slurm.more", "constraint=a100", "--slurm.gpus", "a40:1"]
    rest, launch = launching(args)
    assert rest == ["toy/dpo", "--seed", "1,2", "--fit.lr", "0.1"]
    setup, more = ("module load cuda", "date"), ("constraint=a100",)
    assert launch == Launch("slurm", detach=True, slurm=Slurm(time=2880, setup=setup, more=more, gpus="a40:1"))
    assert launching(["toy/dpo", "--jobs", "2", "--seed", "3"]) == (["toy/dpo", "--seed", "3"], Launch(jobs=2))
    assert launching(["--on=ray", "--ray.cpus", "2"]) == ([], Launch("ray", ray=Ray(cpus=2.0)))


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--on", "slrum"], "--on is one of local, slurm, ray; got 'slrum'. Did you mean slurm?"),
        (["--on", "slurm", "--slurm.partitoin", "x"], "no option --slurm.partitoin. Did you mean --slurm.partition?"),
        (["--slurm.partition", "x"], "say --on slurm as well"),
        (["--on", "ray", "--slurm.time", "3"], "say --on slurm as well"),
        (["--on", "slurm", "--jobs", "2"], "--slurm.parallel"),
        (["--on", "ray", "--detach"], "say --on slurm"),
        (["--on", "slurm", "--slurm.time", "1-00:00"], "--slurm.time wants a whole number"),
        (["--on", "slurm", "--slurm.more", "exclusive"], "--slurm.more wants NAME=VALUE"),
        (["--on", "slurm", "--slurm.time", "0"], "time of Slurm must be 1 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(args, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        launching(args)


# ---- the graph --------------------------------------------------------------------------------------------------


def runs_of(*args: str, root: Path) -> Run:
    return find(parse(list(args), "run").recipe, root)


def test_every_run_comes_once_and_after_what_it_needs(tmp_path):
    """q-sharp and cd share the value model, the rollouts and the base: 1 + 2 + 3, not 1 + 2·4."""
    runs = in_order([runs_of(*EVALUATE, root=tmp_path)])
    names = [run.recipe.name.partition("/")[2] for run in runs]
    assert sorted(names) == ["base", "cd", "evaluate", "q-sharp", "rollouts", "value"]
    place = {run.folder: k for k, run in enumerate(runs)}
    assert all(place[before] < place[run.folder] for run in runs for before in needs(run))
    base = runs[names.index("base")]
    base.folder.mkdir(parents=True)
    (base.folder / "DONE").touch()
    left = in_order([runs_of(*EVALUATE, root=tmp_path)])
    assert base.folder not in {run.folder for run in left} and len(left) == 5
    failed, waited = apart(left)
    assert [run.recipe.name for run in failed] == ["star-graph/rollouts"] and len(waited) == 4


# ---- what SLURM is told ----------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """sbatch and squeue that write down what they are told and answer what `queue` holds."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    (folder / "queue").touch()
    sbatch = f'n=$(($(ls {folder} | grep -c script) + 1)); cp "$1" {folder}/script-$n; env > {folder}/env-$n\n'
    sbatch += 'echo "Submitted batch job $n"\n'
    for name, does in {"sbatch": sbatch, "squeue": f"cat {folder}/queue\n", "srun": "exit 1\n"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def scripts(cluster: Path) -> dict[str, str]:
    """What was submitted, by the job's name; equal names get their number."""
    found: dict[str, str] = {}
    for k in range(1, len(list(cluster.glob("script-*"))) + 1):
        text = (cluster / f"script-{k}").read_text()
        found[re.search(r"--job-name=tiltlm-star-graph-(\S+)", text)[1]] = text
    return found


def after(script: str) -> set[str]:
    said = re.search(r"--dependency=afterok:(\S+)", script)
    return set(said[1].split(":")) if said else set()


def test_each_run_is_a_job_that_waits_for_those_of_its_inputs(cluster, tmp_path):
    done = tiltlm("run", *EVALUATE, *SLURM, "--detach", "--task.device", "cuda", cwd=tmp_path)
    found = scripts(cluster)
    number = {name: str(k + 1) for k, name in enumerate(found)}
    assert len(found) == 6 and not after(found["base"]) and after(found["rollouts"]) == {number["base"]}
    assert after(found["evaluate"]) == {number["q-sharp"], number["cd"]}
    assert number["value"] in after(found["cd"]) & after(found["q-sharp"])
    assert all("--kill-on-invalid-dep=yes" in text and "--partition=overcap" in text for text in found.values())
    assert done.stderr.count(", log runs/star-graph/") == 6 and not done.stdout
    (cluster / "queue").write_text("".join(f"{k} PENDING\n" for k in range(1, 7)))
    again = tiltlm("run", *EVALUATE, *SLURM, "--detach", "--task.device", "cuda", cwd=tmp_path)
    assert len(scripts(cluster)) == 6 and again.stderr.count("(pending)") == 6


def test_a_job_that_is_gone_is_submitted_again_and_waits_for_those_that_are_queued(cluster, tmp_path):
    tiltlm("run", *EVALUATE, *SLURM, "--detach", cwd=tmp_path)
    (cluster / "queue").write_text("1 RUNNING\n")
    tiltlm("run", *EVALUATE, *SLURM, "--detach", cwd=tmp_path)
    assert len(list(cluster.glob("script-*"))) == 11
    assert after(scripts(cluster)["rollouts"]) == {"1"}


def test_the_words_of_a_hydra_launcher_have_their_counterparts(tmp_path):
    """docs/many_runs.md has the table: partition, qos, a40:1, 2880 minutes, requeue, 20 in parallel."""
    asked = "--on slurm --slurm.partition overcap --slurm.qos short --slurm.gpus a40:1 --slurm.time 2880 --slurm.cpus 6 "
    asked += "--slurm.mem 32G --slurm.warning 300 --slurm.more exclude=node7 --slurm.requeue 5 "
    asked += "--slurm.nodes 2 --slurm.processes 8"
    how = launching(asked.split())[1].slurm
    base, data = runs_of("star-graph/base", root=tmp_path), runs_of("dialogues/data", root=tmp_path)
    found = parameters(base, how, "afterok:7")
    text = slurm_script(found, tmp_path)
    for line in (
        "partition=overcap", "qos=short", "gpus-per-node=a40:1", "time=2880", "cpus-per-task=6", "mem=32G",
        "signal=USR1@300", "requeue", "exclude=node7", "dependency=afterok:7", "nodes=2", "ntasks-per-node=8",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text, line
    assert text.index("export SUBMITIT_PREEMPT_SIGNAL=USR1") < text.index("srun ")
    reading = parameters(data, how, "")  # asks no network, and trains nothing
    assert "gpus_per_node" not in reading and (reading["nodes"], reading["ntasks_per_node"]) == (1, 1)
    assert "#SBATCH --no-requeue\n" in slurm_script(parameters(base, Slurm(requeue=0), ""), tmp_path)


def slurm_script(found: dict, folder: Path) -> str:
    from submitit.slurm.slurm import _make_sbatch_string

    return _make_sbatch_string(command="python", folder=folder, **found)


def test_a_lane_lets_so_many_jobs_run_at_a_time(cluster, tmp_path):
    assert dependency(["1", "2"], "5") == "afterok:1:2,afterany:5" and dependency([], None) == ""
    args = ["sweep", *BASE[1:], "5", "--seed", "1,2,3,4,5", *SLURM, "--slurm.parallel", "2", "--detach"]
    tiltlm(*args, cwd=tmp_path)
    waits = [re.search(r"--dependency=(\S+)", (cluster / f"script-{k}").read_text()) for k in range(1, 6)]
    assert [said and said[1] for said in waits] == [None, None, "afterany:1", "afterany:2", "afterany:3"]


def test_credentials_are_in_no_file_and_reach_the_job_by_its_environment(cluster, tmp_path):
    secret = "https://me:hunter2@127.0.0.1:9/score?key=abcde"
    tiltlm("run", "dialogues/label", "--task.reward", secret, *SLURM, "--detach", cwd=tmp_path)
    written = b"".join(path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file())
    assert b"hunter2" not in written and b"abcde" not in written and ORDER not in os.environ
    for folder in (tmp_path / "runs/dialogues").glob("*/*"):
        job = json.loads((folder / "slurm/job.json").read_text())["job"]
        work = pickle.loads((folder / "slurm" / f"{job}_submitted.pkl").read_bytes()).function
        said = re.search(rf"^{ORDER}=(.*)$", (cluster / f"env-{job}").read_text(), re.M)
        if folder.parent.name == "label":
            assert work.order is None and "hunter2" in Order(**json.loads(said[1])).settings
        if folder.parent.name == "data":
            assert work.order.recipe == "dialogues/data" and said is None


def test_the_log_of_a_job_that_failed_is_shown_once_and_what_waits_on_it_named(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "FIRST_POLL", 0.01)
    monkeypatch.setattr(slurm, "SETTLING", 0.01)
    with (cluster / "sbatch").open("a") as sbatch:
        sbatch.write(
            'log=$(sed -n "s/^#SBATCH --output=//p" "$1" | sed "s/%j/$n/"); echo "Out of memory [oom]" > "$log"\n'
        )
    done = tiltlm("run", "star-graph/rollouts", *SLURM, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.count("Out of memory [oom]") == 1
    assert re.search(r"star-graph/base \w+: job 1 not done", done.stderr)
    assert re.search(
        r"runs/star-graph/base/\w+ failed \(see above; log runs/star-graph/base/\w+/slurm/1_0", done.stderr
    )
    assert re.search(
        r"not built, for they wait on it: runs/star-graph/rollouts/\w+\. The same command", done.stderr
    )


def test_a_log_s_end_is_a_few_lines_and_one_that_is_not_there_says_so(tmp_path):
    (tmp_path / "log").write_text("".join(f"line {k}\n" for k in range(100)) + "https://a:secret@host/x\n")
    shown = tail(tmp_path / "log")
    assert shown.count("\n") == LAST_LINES - 1 and "line 99" in shown and "secret" not in shown
    assert "no such file" in tail(tmp_path / "missing")


def test_slurm_that_takes_no_job_says_why(cluster, tmp_path):
    (cluster / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: overcap' >&2; exit 1\n"
    )
    done = tiltlm("run", *BASE[1:], "5", *SLURM, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "SLURM took no job: sbatch: error: invalid partition" in done.stderr


def test_slurm_that_stays_silent_is_given_up(cluster, tmp_path, monkeypatch):
    (cluster / "squeue").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(slurm, "FIRST_POLL", 0.01)
    monkeypatch.setattr(slurm, "PATIENCE", 0.1)
    done = tiltlm("run", *BASE[1:], "5", *SLURM, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "squeue) has not answered" in done.stderr and "scancel 1" in done.stderr


# ---- what is not there -----------------------------------------------------------------------------------------


def test_a_scheduler_that_is_not_there_is_named_with_what_to_do(tmp_path, monkeypatch):
    run = ["run", *BASE[1:], "5", "--on"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no sbatch on this machine" in tiltlm(*run, "slurm", cwd=tmp_path, check=False).stderr
    for name in ("submitit", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'tiltlm[slurm]'" in tiltlm(*run, "slurm", cwd=tmp_path, check=False).stderr
    assert "pip install 'tiltlm[ray]'" in tiltlm(*run, "ray", cwd=tmp_path, check=False).stderr
    assert not (tmp_path / "runs").exists()


# ---- a job ------------------------------------------------------------------------------------------------------


def test_a_job_that_is_preempted_is_requeued_and_ends_bit_for_bit_the_same(tmp_path, monkeypatch):
    """submitit's own executor for one machine: SIGUSR1 writes a checkpoint, and a second process goes on from it."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    tiltlm(*BASE, "150", cwd=tmp_path / "whole")
    monkeypatch.chdir(tmp_path / "cut")
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    run = find(parse([*BASE[1:], "150"], "run").recipe, Path("runs"))
    order = Order.of(run, "tiltlm run")
    monkeypatch.setenv(ORDER, json.dumps(asdict(order)))
    job = submitit.LocalExecutor(tmp_path / "cut/runs/slurm").submit(Work(None, True))
    wait(lambda: (run.folder / "metrics.jsonl").is_file(), job)
    time.sleep(0.3)
    os.kill(json.loads((run.folder / ".holder.json").read_text())["pid"], signal.SIGUSR1)
    job.result()
    assert (
        job.paths.stdout.read_text().count("Starting with") + job.paths.stderr.read_text().count("Starting with")
        == 2
    )
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def wait(look, job: submitit.Job) -> None:
    until = time.monotonic() + 120
    while not look():
        assert time.monotonic() < until and not job.done(), (job.stdout(), job.stderr())
        time.sleep(0.02)


def test_a_job_without_a_requeue_ends_with_the_signal_s_status(monkeypatch):
    monkeypatch.setattr(Order, "carry_out", lambda self: 128 + signal.SIGUSR1)
    with pytest.raises(SystemExit) as ended:
        Work(Order("", "", "", "", ""), requeue=False)()
    assert ended.value.code == 128 + signal.SIGUSR1
