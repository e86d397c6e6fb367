"""Devices by name: each is there, or one line says why not, before any work."""

from __future__ import annotations

import pytest
import torch

from tiltlm import device
from tiltlm.commands.models import load_decoder
from tiltlm.commands.options import parsed
from tiltlm.device import check_devices, device_of
from tiltlm.recipes import recipe
from tiltlm.run import ensure


def gpus(monkeypatch, count: int, built: str | None = "12.8", mps: bool = False) -> None:
    """A machine with `count` GPUs, as torch would see it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    device._best.cache_clear()


@pytest.fixture(autouse=True)
def forgetful():
    yield
    device._best.cache_clear()


def test_what_is_there_is_taken(monkeypatch):
    gpus(monkeypatch, 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert device_of(name) == torch.device(name)


@pytest.mark.parametrize(
    ("name", "count", "built", "said"),
    [
        ("cuda", 0, "12.8", "--device cuda: torch sees no GPU here; take cpu or auto"),
        ("cuda:1", 0, None, "--device cuda:1: the installed torch was built without CUDA; take cpu or auto"),
        ("cuda:7", 2, "12.8", "--device cuda:7: there are 2 GPUs, cuda:0 to cuda:1; take cpu or auto"),
        ("cuda:1", 1, "12.8", "--device cuda:1: there is 1 GPU, cuda:0; take cpu or auto"),
        ("mps", 2, "12.8", "--device mps: this machine has no Metal device that torch can use; take cpu or auto"),
    ],
)
def test_what_is_not_there_is_refused_with_the_reason(monkeypatch, name, count, built, said):
    gpus(monkeypatch, count, built)
    with pytest.raises(ValueError) as error:
        device_of(name)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("gpu", "cuda"), ("CUDA", "cuda"), ("cuda0", "cuda:0"), ("gpu:1", "cuda:1"), ("cpus", "cpu"), ("metal", "mps")],
)  # fmt: skip
def test_other_names_are_refused_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=rf"^--device {name}: there is no such device. Did you mean {nearest}\?"):
        device_of(name)


@pytest.mark.parametrize("name", ["", "meta", "xpu", "cuda:", "cuda:-1", "cuda:x", "mps:0"])
def test_every_other_name_is_refused_with_those_known(name):
    with pytest.raises(ValueError, match=r"there is no such device\..* Known: cpu, cuda, cuda:N, mps, auto$"):
        device_of(name)


def test_auto_takes_the_first_that_can_compute_and_says_it_once(monkeypatch, capsys):
    """cuda before mps before cpu; a Metal device counts only if it computes float64, which draws are kept in."""
    for count, mps, float64, wanted in [
        (1, True, True, "cuda"), (0, True, True, "mps"), (0, True, False, "cpu"), (0, False, False, "cpu")
    ]:  # fmt: skip
        gpus(monkeypatch, count, mps=mps)
        metal(monkeypatch, float64)
        assert {device_of("auto") for _ in range(3)} == {torch.device(wanted)}
        assert capsys.readouterr().err.splitlines() == [f"device: {wanted} (auto)"]
    gpus(monkeypatch, 0, mps=True)
    with pytest.raises(
        ValueError, match="--device mps: mps computes no float64, in which draws and weights are kept"
    ):
        device_of("mps")


def metal(monkeypatch, float64: bool) -> None:
    """What making a tensor on a Metal device does: fails for float64, as it does in torch."""

    def zeros(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        if device == "mps" and not float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return torch.empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(torch, "zeros", zeros)


# ---- before any work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "star-graph/evaluate",
        "star-graph/base",
        "animals/evaluate",
        "animals/log-z",
        "dialogues/evaluate",
        "dialogues/base",
    ],
)
def test_a_recipe_s_device_is_looked_at_before_anything_is_built(monkeypatch, tmp_path, name):
    gpus(monkeypatch, 0)
    value = recipe(name)
    wrong = parsed(value, ["--task.device", "cuda"])
    with pytest.raises(ValueError, match=r"^--task\.device cuda: torch sees no GPU here"):
        ensure(wrong, tmp_path)
    assert list(tmp_path.iterdir()) == []
    check_devices(value)


@pytest.mark.parametrize("jobs", [(), ("--jobs", "2")])
def test_a_sweep_s_devices_are_looked_at_before_its_first_point(monkeypatch, tmp_path, jobs, capsys):
    from tiltlm.cli import main

    gpus(monkeypatch, 0)
    monkeypatch.setenv("TILTLM_RUNS", str(tmp_path))
    assert main(["sweep", "star-graph/base", "--task.device", "cpu,cuda", *jobs]) == 2
    assert "--task.device cuda: torch sees no GPU here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args", [("sample", "M", "--prompts", "p.jsonl", "--out", "y.jsonl"), ("score", "toxicity", "y", "--out", "s")]
)  # fmt: skip
def test_a_command_s_device_is_looked_at_first(monkeypatch, capsys, args):
    """Neither the model nor the files are there: the device is what is said."""
    from tiltlm.cli import main

    gpus(monkeypatch, 0)
    assert main([*args, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("tiltlm: --device cuda: torch sees no GPU here")


def test_a_device_that_is_not_there_is_no_fault_of_the_model_s_name(monkeypatch):
    gpus(monkeypatch, 0)
    with pytest.raises(ValueError, match=r"^--device cuda: torch sees no GPU here; take cpu or auto$"):
        load_decoder("anything", "cuda", "float32")


@pytest.mark.parametrize("dtype", ["foo", "Tensor", "int8"])
def test_a_dtype_that_weights_cannot_have_is_refused_in_a_line(dtype):
    with pytest.raises(ValueError, match=f"^--dtype {dtype}: weights are of float32, float64, bfloat16, float16$"):
        load_decoder("anything", "cpu", dtype)
