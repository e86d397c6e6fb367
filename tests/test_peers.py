"""What README.md says of TRL is so in the release that it names (skipped where TRL is not installed)."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[bench]'")
if trl.__version__ not in README:
    pytest.skip(f"README.md speaks of another release than {trl.__version__}", allow_module_level=True)
SOURCE = Path(str(find_spec("trl").origin)).parent  # type: ignore[union-attr]


def text(*folders: str) -> str:
    return "\n".join(
        path.read_text(encoding="utf-8") for folder in folders for path in (SOURCE / folder).rglob("*.py")
    )


def trainers(folder: str) -> set[str]:
    return set(re.findall(r"^class (\w+)Trainer\(", text(folder), re.M))


def row(name: str) -> str:
    """TRL's cell in the row of that name."""
    line = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
    return line.split("|")[3]


def test_which_methods_it_trains():
    assert {"GRPO", "RLOO", "DPO", "KTO", "SFT", "Reward"} <= trainers("trainer")
    assert {"CPO", "ORPO", "OnlineDPO"} <= trainers("experimental")
    assert "PPO" not in trainers("trainer") | trainers("experimental") and "no PPO" in row("GRPO and its kin")
    listed = (
        text("trainer").split("Type of loss to use. Possible values are: `'sigmoid'`")[1].split("If multiple")[0]
    )
    assert 1 + len(re.findall(r"`'\w+'`", listed)) == 15 and "DPO in 15 variants" in row("preferences")
    assert "simpo" in text("experimental/cpo")


def test_what_it_offers_that_is_not_here():
    assert {"fsdp2.yaml", "zero3.yaml"} <= {path.name for path in (SOURCE / "accelerate_configs").iterdir()}
    grpo = (SOURCE / "trainer" / "grpo_trainer.py").read_text(encoding="utf-8")
    assert all(
        word in grpo for word in ("vllm", "tools", "environment_factory", "structured_outputs_regex", "image")
    )


def test_what_is_not_found_there():
    """No log Z of a target, no twist, no SMC, no best of n; KL to the reference is a logged metric."""
    everything = text("trainer", "experimental")
    for word in (
        "partition function",
        "sequential Monte Carlo",
        "particle",
        "twist",
        "BestOfN",
        "rejection sampling",
    ):
        assert word.lower() not in everything.lower(), word
    assert '["kl"].append' in everything and "kl_to_target" not in everything
