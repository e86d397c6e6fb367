"""Several processes, as torchrun starts them, end where one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import ranked
from close import alike, close
from command import tiltlm
from families import build
from side_by_side import side_by_side
from tiltlm import parts, ranks
from tiltlm.device import device_of
from tiltlm.engine import Optim
from tiltlm.models import weights
from tiltlm.models.causal import CausalLM
from tiltlm.models.heads import ValueHead
from tiltlm.models.table import TableCritic
from tiltlm.policies.ppo import PPO
from tiltlm.sharded import why_not
from tiltlm.stages.cells import default_cell
from tiltlm.train import best_checkpoint, checkpoints
from toy import Toy

HERE = Path(__file__).resolve().parent
CASES = (
    *ranked.CASES, "dpo@2", "rloo@4", "ctl@3", *(f"{name}+shard" for name in ranked.DIVIDED), "dpo@7+shard",
    *(f"{name}+layers" for name in ("lora", "rloo", "ppo", "ctl", "served")),
)  # fmt: skip
"""Cases; @: of so many rows a micro-batch; +shard: every process holding a part of the weights; +layers: and drawing layer
by layer."""

COURSES = (
    "changing@2", "straight@6", "interrupted@3", "interrupted@6", "parts@2+shard", "halves@3+shard", "halves@6+shard",
    "sharded@6+shard",
)  # fmt: skip
"""Trainings in folders, to so many steps."""


def torchrun(*args: str | Path, cwd: Path, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine, of a script or, behind -m, a module."""
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *args]
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Every case, trained by two processes; courses of steps in folders."""
    folder = tmp_path_factory.mktemp("two")
    torchrun(HERE / "ranked.py", folder, *CASES, *COURSES, cwd=folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_end_where_one_does(name, two):
    """Losses, every other metric, drawn rows and weights of four steps; 15 rows, so that shares are unequal."""
    cases = ranked.DIVIDED if name.endswith(("+shard", "+layers")) else ranked.CASES
    alone = cases[name.partition("+")[0].partition("@")[0]](Optim(lr=1e-2))
    first, second = (torch.load(two / f"{name}-{k}.pt", weights_only=True) for k in range(2))
    assert torch.equal(first["weights"], second["weights"]) and first["metrics"] == second["metrics"]
    close(
        first["weights"], alone.weights
    )  # AdamW divides by a gradient's size: small ones show how they were rounded
    assert torch.equal(first["tokens"], alone.tokens) and torch.equal(second["tokens"], alone.tokens)
    for step, (got, expected) in enumerate(zip(first["metrics"], alone.metrics, strict=True)):
        some = {
            n: x for n, x in expected.items() if step or n != "reward_accuracy"
        }  # at first all rows tie, to rounding
        assert {n: got[n] for n in some} == pytest.approx(some, rel=1e-5, abs=1e-6, nan_ok=True)
    assert alone.metrics[-1]["loss"] != alone.metrics[0]["loss"]


def last(folder: Path) -> tuple[list[dict], list[dict], torch.Tensor]:
    """Metrics and evaluations step by step, and the weights of the last checkpoint."""
    logs = [
        [json.loads(line) for line in (folder / f"{n}.jsonl").read_text().splitlines()]
        for n in ("metrics", "evals")
    ]
    model = CausalLM.load(checkpoints(folder)[-1], dtype=torch.float64)
    return logs[0], logs[1], ranked.weights(model)


def test_a_run_goes_on_with_another_number_of_processes(two, tmp_path):
    """Two processes, one, two: the end of one alone, to rounding. Two, interrupted: that of two, to the bit."""
    for name in ("changing", "parts"):
        ranked.course(two / name, 4).run()
    torchrun(HERE / "ranked.py", two, "changing@6", "parts@6+shard", cwd=two)
    ranked.course(tmp_path, 6).run()
    expected = last(tmp_path)
    for name in ("changing", "parts", "straight", "sharded"):
        found = last(two / name)
        close(found[2], expected[2])
        assert [each["step"] for each in found[0]] == [each["step"] for each in expected[0]]
        for got, wanted in zip(found[0], expected[0], strict=True):
            assert got == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    for name, interrupted in (("straight", "interrupted"), ("sharded", "halves")):
        got, wanted = last(two / interrupted), last(two / name)
        assert torch.equal(got[2], wanted[2]) and got[0] == wanted[0]


def test_a_process_that_fails_ends_the_others_with_its_reason(tmp_path, capfd):
    assert side_by_side(lambda: ranked.main(tmp_path, ["broken"])) == [1, 1]
    told = capfd.readouterr().err
    assert "ValueError: planted" in told and "have lost each other" in told
    assert time.time() - (tmp_path / "planted").stat().st_mtime < 60


def test_the_command_line_builds_a_run_that_one_process_finds(tmp_path):
    """One report and one folder on standard output; what was trained is what one process trains; nothing is built again."""
    args = ("run", "tree/ctl", "--fit.steps", "4")
    done = torchrun("-m", "tiltlm", *args, cwd=tmp_path)
    assert done.stdout.count("KL(q‖pi*)") == done.stdout.count("runs/tree/ctl/") == 1
    (trained,) = (tmp_path / "runs" / "tree" / "ctl-twist").iterdir()
    assert json.loads((trained / "provenance.json").read_text())["processes"] == 2
    assert tiltlm(*args, cwd=tmp_path).stderr == ""
    (tmp_path / "alone").mkdir()
    tiltlm(*args, cwd=tmp_path / "alone")
    said = [next(here.glob("runs/tree/ctl/*/report.json")).read_text() for here in (tmp_path, tmp_path / "alone")]
    alike(json.loads(said[0]), json.loads(said[1]))
    alone = tmp_path / "alone" / trained.relative_to(tmp_path) / "metrics.jsonl"
    for got, wanted in zip(
        *(path.read_text().splitlines() for path in (trained / "metrics.jsonl", alone)), strict=True
    ):
        assert json.loads(got) == pytest.approx(json.loads(wanted), rel=1e-5, abs=1e-6)


@pytest.fixture
def second(monkeypatch) -> None:
    """As the second process of two."""
    monkeypatch.setattr(ranks, "_launched", lambda: (1, 2))
    monkeypatch.setenv("LOCAL_RANK", "1")


def test_what_several_processes_cannot_do_is_said(second, tmp_path):
    for args, told in (
        (["list"], "start it without torchrun"),
        (["run", "tree/ctl", "--jobs", "2"], "without torchrun"),
    ):
        done = tiltlm(*args, cwd=tmp_path, check=False)
        assert done.returncode == 2 and told in done.stderr and "process 1" in done.stderr
    with pytest.raises(ValueError, match="take cuda: each gets its own"):
        device_of("cuda:0")


def test_shares_cover_all_rows_once_and_alone_is_alone(second):
    assert ranks.share(15) == (7, 15) and ranks.share(1) == (0, 1) and ranks.others() == (1,)
    with ranks.alone():
        assert ranks.share(15) == (0, 15) and ranks.gathered([1]) == [1] and not ranks.is_first()


def test_checkpoints_in_parts_hold_what_is_read_of_them(two):
    """On the way parts alone; for others to read, a folder for `from_pretrained`; the last one has both."""
    seen = {step: names for step, names in json.loads((two / "sharded" / "seen.json").read_text()) if step}
    assert {"parts", "trainer.pt", "COMPLETE"} == set(seen[3])  # of the same names at every later look
    best, final = best_checkpoint(two / "sharded"), checkpoints(two / "sharded")[-1]
    assert final.name == "checkpoint-6" and {"parts", "model.safetensors", "config.json"} <= names_in(final)
    assert best != final and "model.safetensors" in names_in(best) and not {"parts", "trainer.pt"} & names_in(best)
    assert {path.name for path in checkpoints(two / "sharded")} == {best.name, final.name}
    with pytest.raises(ValueError, match="of another model"):
        head = ValueHead(ranked.network())
        parts.read(final, head, torch.optim.AdamW(head.parameters()))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_in_parts_is_read_as_any_folder(two):
    """By whatever reads a policy, its critic, a reward model, a head, adapters."""
    saved = {name: two / f"{name}+shard-saved" for name in ranked.DIVIDED}
    adapted, double = ranked.network().with_lora(2).double(), torch.float64
    adapted.restore(saved["lora"])
    judge = AutoModelForSequenceClassification.from_pretrained(saved["judge"], dtype=double)
    found = {
        "judge": [judge], "lora": [adapted],
        "ppo": [CausalLM.load(saved["ppo"], dtype=double), ValueHead.load(saved["ppo"] / "critic", dtype=double)],
        "head": [ValueHead.load(saved["head"], dtype=double)], "frozen": [ValueHead.load(saved["frozen"], dtype=double)],
    }  # fmt: skip
    for name, models in found.items():
        expected = torch.load(two / f"{name}+shard-0.pt", weights_only=True)["weights"]
        assert torch.equal(torch.cat([ranked.weights(model) for model in models]), expected), name


def test_a_large_model_is_written_a_file_at_a_time(tmp_path, monkeypatch):
    """Files, and what is in memory at once, of 3,000 bytes or one tensor; embedding and head are one."""
    model, asked = build("gpt2"), []

    def source(some):
        asked.append([x.numel() * 4 for x in some])
        return [x.detach().clone() for x in some]

    monkeypatch.setattr(weights, "FILE", 3000)
    with weights.weights_from(source):
        model.save(tmp_path)
    assert len(asked) > 3 and all(len(sizes) == 1 or sum(sizes) <= 3000 for sizes in asked)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == len(asked)
    assert torch.equal(ranked.weights(CausalLM.load(tmp_path)), ranked.weights(model))


def test_networks_that_cannot_be_divided_say_why():
    assert "TableCritic" in why_not(TableCritic(2, 3, 3)) and why_not(ValueHead(ranked.network())) == ""
    whole = default_cell(PPO(), Toy().facts())
    assert "--fit.shard" in (replace(whole, fit=replace(whole.fit, shard=True)).why_not(Toy().facts()) or "")


def test_with_one_process_nothing_is_set_up():
    """No group, no copy: lists, results and parameters are those that were given."""
    made, parameter = object(), torch.ones(2, requires_grad=True)
    ranks.sum_gradients([parameter])
    ranks.same_as_first([parameter])
    assert ranks.gathered([made])[0] is made and ranks.from_first(lambda: made) is made and parameter.grad is None
    assert (ranks.size(), ranks.number(), ranks.share(5), ranks.others()) == (1, 0, (0, 5), ())
    assert ranks._groups.cache_info().currsize == 0 and not torch.distributed.is_initialized()
