"""What happens around a run: two processes at once, signals, a full disk, a terminal without characters, equal runs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import tiltlm.train as train
from command import environment, tiltlm
from runs import BASE, files_of, started, wait_for
from tiltlm import cli
from tiltlm.commands.launch.order import Order
from tiltlm.commands.options import from_json
from tiltlm.lock import alone_in
from tiltlm.mistakes import one_line
from tiltlm.recipes import recipe
from tiltlm.ruler.measure import Measurement
from tiltlm.settings import ADDED, SPEED, hashed
from tiltlm.stopping import Stopped, held, listening
from tiltlm.tensors import load_tensors, notes_of, save_tensors


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    tiltlm(*BASE, "150", cwd=folder)
    return folder


@pytest.mark.parametrize(("number", "jobs"), [("SIGTERM", []), ("SIGUSR1", []), ("SIGTERM", ["--jobs", "2"])])
def test_a_signal_ends_training_with_a_checkpoint_and_the_same_command_goes_on(whole, tmp_path, number, jobs):
    """No checkpoint is due before the end: what is there afterwards is the signal's. The end is bit for bit the same."""
    process = started(*BASE, "150", *jobs, cwd=tmp_path)
    runs = tmp_path / "runs/star-graph/base"
    wait_for(lambda: list(runs.glob("*/metrics.jsonl")), process)
    time.sleep(0.3)
    process.send_signal(getattr(signal, number))
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + getattr(signal, number), err
    assert "goes on where it stopped" in err and "Traceback" not in err and not list(runs.glob("*/DONE"))
    (checkpoint,) = runs.glob("*/checkpoint-*")
    assert 0 < train.step_of(checkpoint) < 150
    tiltlm(*BASE, "150", cwd=tmp_path)
    assert files_of(tmp_path) == files_of(whole)


def test_a_signal_waits_for_work_that_holds_it_and_ends_all_other_at_once():
    seen = []
    with pytest.raises(Stopped) as stopped, listening():
        with held() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            seen.append(asked())
        seen.append("never")
    assert seen == [signal.SIGTERM] and stopped.value.status == 143
    with pytest.raises(Stopped), listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sampling_keeps_what_it_has_when_it_is_stopped(whole, tmp_path, monkeypatch):
    """Two prompts at a time: stopped after the first two, and completed by the same command."""
    (run,) = (whole / "runs/star-graph/base").iterdir()
    (tmp_path / "p.jsonl").write_text('{"prompt": [1, 2, 3]}\n' * 6)
    command = ["sample", str(run), "--prompts", "p.jsonl", "--batch-size", "2", "--out"]
    tiltlm(*command, "whole.jsonl", cwd=tmp_path)
    import tiltlm.commands.sample as module

    lines, calls = module._lines, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return lines(*args)

    monkeypatch.setattr(module, "_lines", interrupted)
    done = tiltlm(*command, "cut.jsonl", cwd=tmp_path, check=False)
    assert done.returncode == 143 and (tmp_path / "cut.jsonl").read_text().count("\n") == 2
    tiltlm(*command, "cut.jsonl", cwd=tmp_path)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---- two at once --------------------------------------------------------------------------------------------


def test_a_second_process_waits_and_finds_the_run_built(whole, tmp_path):
    first = started(*BASE, "150", cwd=tmp_path)
    runs = tmp_path / "runs/star-graph/base"
    wait_for(lambda: list(runs.glob("*/metrics.jsonl")), first)
    os.kill(first.pid, signal.SIGSTOP)  # it holds the folder for as long as we like
    second = started(*BASE, "150", cwd=tmp_path)
    heard = second.stderr.readline()
    os.kill(first.pid, signal.SIGCONT)
    assert f"process {first.pid} on " in heard and "waiting for it" in heard
    assert first.wait(60) == 0 and second.wait(60) == 0
    first.communicate(), second.communicate()
    assert files_of(tmp_path) == files_of(whole)  # neither a lock nor a second line in any file is left


def test_a_killed_process_leaves_no_lock(whole, tmp_path):
    process = started(*BASE, "150", cwd=tmp_path)
    wait_for(lambda: list((tmp_path / "runs/star-graph/base").glob("*/metrics.jsonl")), process)
    process.kill()
    process.communicate()
    done = tiltlm(*BASE, "150", cwd=tmp_path)
    assert "waiting" not in done.stderr
    assert files_of(tmp_path) == files_of(whole)


def test_the_lock_goes_with_its_holder_whatever_stands_beside_it(tmp_path):
    """A note of another host's, or of a process long gone, locks nothing."""
    (tmp_path / ".holder.json").write_text('{"pid": 1, "host": "elsewhere", "since": "1970"}')
    (tmp_path / ".lock").touch()
    with alone_in(tmp_path):
        assert json.loads((tmp_path / ".holder.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".holder.json").exists()


# ---- what the machine refuses -------------------------------------------------------------------------------


def test_a_full_disk_ends_in_one_line_and_nothing_is_lost(whole, tmp_path):
    """No file may grow beyond 20 kB, as if the disk were full: the first checkpoint cannot be written."""
    script = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
    script += "from tiltlm.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, *BASE, "150"], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )  # fmt: skip
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("tiltlm: ") and "cannot be written: File too large" in last and "same command" in last
    tiltlm(*BASE, "150", cwd=tmp_path)
    assert files_of(tmp_path) == files_of(whole)


def test_every_way_of_writing_says_which_file_has_no_room(tmp_path, monkeypatch):
    """torch, safetensors and plain files, each with its own error: all become the system's."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full on this system")

    def no_room(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("tiltlm.tensors.save_file", no_room)
    with pytest.raises(OSError) as error:
        save_tensors({"x": torch.zeros(3)}, tmp_path / "x")
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "x")
    with pytest.raises(OSError) as error, train.writing("trainer.pt"), full.open("wb") as file:
        torch.save({"x": torch.zeros(100_000)}, file)
    assert error.value.errno == errno.ENOSPC
    said = one_line(error.value)
    assert said.startswith("trainer.pt: cannot be written: No space left") and "same command goes on" in said


def test_no_right_to_write_is_one_line(tmp_path, monkeypatch):
    def refused(self, *args, **more):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    done = tiltlm("run", "tree/solve", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Permission denied" in done.stderr


@pytest.mark.parametrize(
    "args", [["--help"], ["list"], ["run", "tree/solve"], ["prepare", "é.jsonl", "--out", "o.jsonl"], ["run", "é"]]
)
def test_a_terminal_of_ascii_gets_question_marks(tmp_path, args):
    (tmp_path / "é.jsonl").write_text('{"prompt": "é", "chosen": " ü", "rejected": " 𝄞"}\n', encoding="utf-8")
    plain = {
        "LC_ALL": "C",
        "LANG": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tiltlm.cli", *args], cwd=tmp_path, capture_output=True, env=environment() | plain
    )
    assert done.returncode == (2 if args[-1] == "é" else 0), done.stderr
    assert b"Traceback" not in done.stderr and b"codec" not in done.stderr
    (done.stdout + done.stderr).decode("ascii")
    if args[0] == "prepare":
        assert "ü" in (tmp_path / "o.jsonl").read_text(encoding="utf-8")


def test_no_text_file_is_opened_in_the_machine_s_own_encoding():
    """On a machine whose encoding is ASCII, what another wrote could not be read."""
    source = Path(cli.__file__).parent
    bad = [
        f"{path.name}:{k}"
        for path in source.rglob("*.py")
        for k, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (".read_text()" in line or (".write_text(" in line and "encoding" not in line))
    ]
    assert not bad, bad


# ---- equal runs ---------------------------------------------------------------------------------------------


def test_equal_measurements_are_equal_files_and_old_ones_load(tmp_path):
    """Each process orders hashes its own way: several write the same."""
    script = "import torch, sys; from tiltlm.tensors import save_tensors\n"
    script += (
        "save_tensors({'b': torch.ones(2), 'a': torch.zeros(3)}, sys.argv[1], {'z': '1', 'log': '2', 'beta': '3'})"
    )
    for k in range(3):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / f"{k}")], check=True, env=environment())
    assert len({(tmp_path / f"{k}").read_bytes() for k in range(3)}) == 1
    assert notes_of(tmp_path / "0") == {"z": "1", "log": "2", "beta": "3"}
    from safetensors.torch import save_file

    save_file({"reward": torch.ones(4, dtype=torch.float64)}, tmp_path / "old", {"beta": "0.5", "log_z": "null"})
    old = Measurement.load(tmp_path / "old")
    assert old.beta == 0.5 and old.log_z is None and list(old.values) == ["reward"]
    old.save(tmp_path / "new")
    assert Measurement.load(tmp_path / "new").beta == 0.5


def test_whole_runs_are_equal_file_by_file(tmp_path):
    """Training, drawing and measuring twice, once in a process of its own: every file but the provenance."""
    args = [
        "run",
        "animals/ctl",
        "--task.model=",
        "--task.stories",
        "100",
        "--task.new-tokens",
        "4",
        "--exact.n",
        "10",
    ]
    args += ["--task.fit.steps", "4", "--task.fit.warmup", "1", "--ruler.n", "20", "--log-z.draws", "200"]
    args += ["--fit.steps", "2", "--feed.particles", "4", "--exact.batch-size", "100"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    other = started(*args, cwd=tmp_path / "two")
    tiltlm(*args, cwd=tmp_path / "one")
    assert other.wait(120) == 0, other.communicate()
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert set(one) == set(two) and any(name.endswith("measurement.safetensors") for name in one)
    assert [name for name in one if one[name] != two[name]] == []


@dataclass(frozen=True)
class Older:
    lr: float = 0.1


@dataclass(frozen=True)
class Newer:
    lr: float = 0.1
    warmup: int = field(default=0, metadata=ADDED)
    device: str = field(default="cpu", metadata=SPEED)


def test_settings_added_later_leave_older_keys_as_they_were():
    """At their defaults they are no part of what is hashed; set, they are; older configs are read without them."""
    assert hashed(Newer()) == hashed(Older()) | {"": "Newer"} == hashed(Newer(device="cuda"))
    assert hashed(Newer(warmup=5)) == {"": "Newer", "lr": 0.1, "warmup": 5}
    assert from_json(Newer(), asdict(Older(lr=0.2))) == Newer(lr=0.2)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_cut_safetensors_file_is_named(tmp_path, cut):
    save_tensors({"x": torch.zeros(100)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:cut])
    with pytest.raises(ValueError, match=r"x\.safetensors: not a whole safetensors file"):
        load_tensors(tmp_path / "x.safetensors")


def test_a_process_whose_files_changed_says_so_in_one_line(tmp_path, capsys):
    value = recipe("animals/reference")
    elsewhere = str(tmp_path / "runs" / value.name / "another")
    order = Order(value.name, json.dumps(asdict(value), default=str), elsewhere, "tiltlm run", str(tmp_path))
    with contextlib.chdir(tmp_path):
        assert order.carry_out() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "have changed since it was begun" in said
