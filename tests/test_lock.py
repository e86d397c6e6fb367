"""One process at a time in a folder, among machines too: what another machine's lock looks like, on this one."""

from __future__ import annotations

import errno
import fcntl
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiltlm.lock as lock
from command import environment

ELSEWHERE = """\
import signal, socket, sys, time
from pathlib import Path
socket.gethostname = lambda: "node7"  # filelock and tiltlm ask this for the machine's name
import fcntl
fcntl.flock = lambda *args: None  # a file system whose flock holds on one machine alone
import tiltlm.lock as lock
lock.LEASE_SECONDS, lock.BEAT_SECONDS = 2.0, 0.2
signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[3:] else signal.default_int_handler)
try:
    with lock.alone_in(Path(sys.argv[1])):
        print("inside", flush=True)
        for _ in range(int(10 * float(sys.argv[2]))):  # work, in many steps
            time.sleep(0.1)
except KeyboardInterrupt:
    sys.exit(3)
"""


def elsewhere(folder: Path, seconds: float, *more: str) -> subprocess.Popen[str]:
    """A process that another machine could run: another host's name, and a flock that this machine does not see."""
    program = [sys.executable, "-c", ELSEWHERE, str(folder), str(seconds), *more]
    process = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None and process.stdout.readline() == "inside\n", process.communicate()
    return process


@pytest.fixture(autouse=True)
def short_lease(monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)


def test_a_process_elsewhere_is_waited_for_as_long_as_it_lives(tmp_path, capsys):
    """It holds the folder for longer than a lease: the lease goes on with its heartbeat."""
    process = elsewhere(tmp_path, 4.0)
    began = time.monotonic()
    with lock.alone_in(tmp_path):
        waited = time.monotonic() - began
    assert waited > 3 and process.wait(10) == 0
    assert f"is being built by process {process.pid} on node7" in " ".join(capsys.readouterr().err.split())


def test_the_folder_of_a_machine_that_is_gone_is_taken_over_once_its_lease_stands_still(tmp_path):
    process = elsewhere(tmp_path, 60.0)
    process.kill()
    process.communicate()
    began = time.monotonic()
    with lock.alone_in(tmp_path):
        assert 1.5 < time.monotonic() - began < 10
    assert not list(tmp_path.glob(".lease*"))


@pytest.mark.parametrize("ignored", [(), ("ignored",)], ids=["Ctrl-C", "Ctrl-C ignored"])
def test_who_stood_still_and_lost_the_folder_stops(tmp_path, ignored):
    """Suspended for longer than a lease, then woken while another works there; in the background of a script, too."""
    process = elsewhere(tmp_path, 60.0, *ignored)
    process.send_signal(signal.SIGSTOP)
    with lock.alone_in(tmp_path):
        process.send_signal(signal.SIGCONT)
        err = process.communicate(timeout=10)[1]
        assert process.returncode == 3 and "has taken over: it stops here" in err
        assert (tmp_path / ".lease").is_file() and (tmp_path / ".holder.json").is_file()  # those of who is inside


def test_a_dead_process_of_this_machine_holds_nothing_for_a_moment(tmp_path, monkeypatch):
    """Its pid says so, even where there is no flock and the lease is a long one."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 60.0)

    def no_flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    script = "import fcntl, errno, os, sys\nfrom pathlib import Path\nimport tiltlm.lock as lock\n"
    script += "def no_flock(*args):\n    raise OSError(errno.ENOSYS, '')\nfcntl.flock = no_flock\n"
    script += "lock.LEASE_SECONDS, lock.BEAT_SECONDS = 60.0, 0.2\n"
    script += "inside = lock.alone_in(Path(sys.argv[1]))\ninside.__enter__()\nos._exit(0)\n"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment())
    assert (tmp_path / ".lease").is_file()
    began = time.monotonic()
    with lock.alone_in(tmp_path):
        assert time.monotonic() - began < 5
        (tmp_path / "DONE").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["DONE"]
