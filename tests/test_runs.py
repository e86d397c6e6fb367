"""`tiltlm runs`: what is there, what differs, and that nothing goes which is needed, being built, or elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from filelock import FileLock

import toy_world
from command import tiltlm
from tiltlm.commands import removing
from tiltlm.commands.folders import in_bytes, size

QUICK = ("--fit.steps", "3", "--ruler.n", "20")


@pytest.fixture(autouse=True)
def toy(monkeypatch) -> None:
    toy_world.install(monkeypatch)


@pytest.fixture
def trained(tmp_path) -> Path:
    """The folder of a small run of DPO; beside it stands the policy it measured."""
    return tmp_path / tiltlm("run", "toy/dpo", *QUICK, cwd=tmp_path).stdout.splitlines()[-1]


def policy_of(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "runs/toy/dpo-policy").iterdir()
    return found


def refused(*args: str, cwd: Path) -> str:
    found = tiltlm("runs", *args, cwd=cwd, check=False)
    assert found.returncode == 2 and found.stderr.count("\n") == 1, found
    return found.stderr


# ---- looking --------------------------------------------------------------------------------------------------------


def test_the_list_says_what_is_done_and_what_came_out(trained, tmp_path):
    (policy_of(tmp_path) / "DONE").unlink()
    lines = tiltlm("runs", "ls", cwd=tmp_path).stdout.splitlines()
    (own,) = [line for line in lines if trained.name in line]
    (policy,) = [line for line in lines if policy_of(tmp_path).name in line]
    (row,) = [row for row in json.loads((trained / "report.json").read_text()) if row["metric"] == "objective"]
    assert "toy/dpo " in own and " done " in own and f"J {row['value']:.3f}" in own and "min" in own
    assert "toy/dpo-policy" in policy and "half-way" in policy
    with FileLock(policy_of(tmp_path) / ".lock"):
        assert "being built" in tiltlm("runs", "ls", "policy", cwd=tmp_path).stdout
    assert "no runs in" in tiltlm("runs", "ls", "animals", cwd=tmp_path).stderr


def test_a_report_that_cannot_be_read_does_not_hide_the_others(trained, tmp_path):
    (trained / "report.json").write_text("{")
    assert "its report cannot be read" in tiltlm("runs", "ls", cwd=tmp_path).stdout


def test_what_differs_between_two_runs_is_named_with_dots(trained, tmp_path):
    other = tiltlm("run", "toy/dpo", *QUICK, "--task.beta", "0.25", cwd=tmp_path).stdout.splitlines()[-1]
    shown = tiltlm("runs", "diff", trained.name, other, cwd=tmp_path).stdout
    (line,) = [line.split() for line in shown.splitlines() if "task.beta" in line]
    assert line == ["task.beta", "0.5", "0.25"] and "fit.steps" not in shown and "torch" not in shown
    provenance = trained / "provenance.json"
    made = json.loads(provenance.read_text())
    provenance.write_text(json.dumps(made | {"commit": "abc", "versions": made["versions"] | {"torch": "1.0"}}))
    shown = tiltlm("runs", "diff", str(trained), other, cwd=tmp_path).stdout
    assert "abc" in shown and "version of torch" in shown
    assert "differ in nothing" in tiltlm("runs", "diff", other, other, cwd=tmp_path).stderr


def test_disk_use_is_the_sum_of_files(trained, tmp_path):
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    (trained / "link").symlink_to(tmp_path)
    shown = tiltlm("runs", "du", cwd=tmp_path).stdout.splitlines()
    assert size(tmp_path / "runs") == total
    assert [line.split()[:2] for line in shown if line.strip().startswith("all")] == [["all", "2"]]
    assert any(in_bytes(total) in line for line in shown)
    assert (in_bytes(1234), in_bytes(2_500_000), in_bytes(3 * 10**9)) == ("1.2 kB", "2.5 MB", "3.0 GB")


# ---- removing -------------------------------------------------------------------------------------------------------


def test_what_a_finished_run_needs_stays(trained, tmp_path):
    policy = policy_of(tmp_path)
    assert f"needs {policy}" in refused("rm", policy.name, "--yes", cwd=tmp_path)
    assert (policy / "DONE").is_file()
    tiltlm("runs", "rm", policy.name, "--yes", "--force", cwd=tmp_path)
    assert not policy.parent.exists() and trained.is_dir()


def test_what_is_needed_by_a_run_that_is_being_built_stays(trained, tmp_path):
    policy = policy_of(tmp_path)
    (trained / "DONE").unlink()
    with FileLock(trained / ".lock"):
        assert f"needs {policy}" in refused("rm", policy.name, "--yes", cwd=tmp_path)
    tiltlm("runs", "rm", policy.name, "--yes", cwd=tmp_path)  # half-way, it builds again what it needs


def test_a_model_that_a_run_names_by_its_folder_is_needed(trained, tmp_path):
    policy = policy_of(tmp_path)
    measured = tiltlm("run", "toy/model", "--method.model", str(policy), "--ruler.n", "20", cwd=tmp_path)
    tiltlm("runs", "rm", trained.name, "--yes", cwd=tmp_path)
    assert "toy/model" in measured.stdout and f"needs {policy}" in refused(
        "rm", policy.name, "--yes", cwd=tmp_path
    )


def test_runs_that_go_together_go_and_leave_no_empty_folders(trained, tmp_path):
    tiltlm("runs", "rm", trained.name, policy_of(tmp_path).name, "--yes", cwd=tmp_path)
    assert [*(tmp_path / "runs").iterdir()] == []


def test_nobody_is_asked_where_nobody_is(trained, tmp_path, monkeypatch):
    assert "say --yes" in refused("rm", trained.name, cwd=tmp_path)
    assert trained.is_dir()
    monkeypatch.setattr(removing.sys, "stdin", Terminal())
    for answer, gone in (("n", False), ("y", True)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        tiltlm("runs", "rm", trained.name, cwd=tmp_path)
        assert trained.exists() is not gone


class Terminal:
    def isatty(self) -> bool:
        return True


def test_nothing_outside_the_runs_folder_goes(trained, tmp_path):
    """A run of another folder, a link to one, and what is no run."""
    elsewhere = tmp_path / "other/toy/dpo/key"
    elsewhere.mkdir(parents=True)
    (elsewhere / "config.json").write_text("{}")
    (tmp_path / "runs/toy/dpo/linked").symlink_to(elsewhere)
    (tmp_path / "runs/linked").symlink_to(tmp_path / "other/toy")
    for name in (
        str(elsewhere),
        "runs/toy/dpo/linked",
        "runs/linked/dpo/key",
        f"{trained}/../../../../other/toy/dpo/key",
    ):
        assert "only those are removed" in refused("rm", name, "--yes", "--force", cwd=tmp_path), name
    assert (elsewhere / "config.json").is_file()
    assert "no key" in refused("rm", "runs", "--yes", cwd=tmp_path)
    assert "there are ls, diff, rm, du" in refused("remove", cwd=tmp_path)


def test_a_run_that_is_being_built_stays(trained, tmp_path):
    with FileLock(trained / ".lock"):
        assert "is being built" in tiltlm("runs", "rm", trained.name, "--yes", cwd=tmp_path, check=False).stderr
    assert (trained / "DONE").is_file()
