"""Preference alignment end to end (Ji et al. 2024, arXiv:2402.00856, on Anthropic's HH): data, SFT, reward model,
generation, labels, alignment by thirteen methods, evaluation against one target.

Families without a suffix carry the published settings and hub models (they want a GPU); `-small` ones run on a laptop
CPU; `pairs` is for data of your own.
"""

from __future__ import annotations

from typing import Any

from tiltlm.policies.dpo import DPO
from tiltlm.policies.exo_pref import ExoPref
from tiltlm.policies.rpo import RPO
from tiltlm.recipes.preferences_policies import POLICIES
from tiltlm.recipes.preferences_report import MEASURED, Evaluate
from tiltlm.recipes.preferences_settings import Align, Base, Data, Draws, Goal, Judge, Test, Train
from tiltlm.recipes.preferences_stages import SFT, BaseStage, DataStage, Generate, Label, RewardStage
from tiltlm.recipes.twisted_settings import found
from tiltlm.run import Recipe

FAMILIES: dict[str, str] = {
    "pairs": "preference alignment on data of your own: --data.train mine.jsonl --base.model gpt2",
    "dialogues-small": "dialogues of the project's own making with a planted preference, own model: nothing to download",
    "hh-small": "Anthropic's HH (helpful-base) with the 260K stories model, from the data folder",
    "hh": "Anthropic's HH (helpful-base), pythia-2.8b: the published settings (wants a GPU)",
    "tldr": "TL;DR summaries, pythia-2.8b: the published settings (wants a GPU)",
    "imdb": "IMDB reviews, gpt2-large, a classifier's log-odds as reward: the published settings (wants a GPU)",
}

STAGES: dict[str, str] = {
    "data": "read, split and divide; say what was dropped and why",
    "base": "train the small base model (only where none is named)",
    "sft": "supervised fine-tuning on the chosen responses: the reference",
    "reward-model": "train a reward model on the pairs; accuracy beside the length rule",
    "generate": "K completions of the reference for every prompt",
    "label": "the reward of every completion",
    "exo-rw-policy": "train by EXO on rewards",
    "dpo-rw-policy": "train by DPO on rewards",
    "exo-pref-policy": "train by EXO on pairs",
    "dpo-pref-policy": "train by DPO on pairs",
    "cdpo-policy": "train by DPO with smoothed labels",
    "robust-dpo-policy": "train by DPO for noisy labels",
    "ipo-policy": "train by IPO",
    "hinge-policy": "train by the hinge loss",
    "apo-policy": "train by anchored preference optimisation",
    "rpo-policy": "train by DPO plus likelihood",
    "simpo-policy": "train by SimPO",
    "orpo-policy": "train by ORPO",
    "kto-policy": "train by KTO",
    "reference": "measure the reference, and the data's responses",
    "exo-rw": "measure EXO on rewards",
    "dpo-rw": "measure DPO on rewards",
    "exo-pref": "measure EXO on pairs",
    "dpo-pref": "measure DPO on pairs",
    "cdpo": "measure DPO with smoothed labels",
    "robust-dpo": "measure DPO for noisy labels",
    "ipo": "measure IPO",
    "hinge": "measure the hinge loss",
    "apo": "measure anchored preference optimisation",
    "rpo": "measure DPO plus likelihood",
    "simpo": "measure SimPO",
    "orpo": "measure ORPO",
    "kto": "measure KTO",
    "evaluate": "methods side by side: the table, and the frontier over checkpoints",
}

KINDS: dict[str, type[Recipe]] = {
    kind.stage: kind for kind in (DataStage, BaseStage, SFT, RewardStage, Generate, Label, Evaluate)
}
KINDS |= {kind.stage: kind for kind in (*POLICIES.values(), *MEASURED.values())}


def dialogues_small() -> dict[str, Any]:
    """Own dialogues, own model."""
    return {
        "data": Data(own=1200),
        "base": Base(most_tokens=128, new_tokens=24, temperature=1.0, stop_id=0),
        "sft": Train(epochs=1, batch_size=32, lr=1e-3, checkpoints=1, evaluations=4),
        "judge": Judge(Train(epochs=1, batch_size=32, lr=1e-3, checkpoints=1, evaluations=4)),
        "goal": Goal(beta_r=1.0, beta_pi=0.5),
        "draws": Draws(n=4, prompts=512, batch_size=256),
        "align": Align(train=Train(epochs=2, batch_size=16, lr=5e-4, checkpoints=4, evaluations=4)),
        "test": Test(prompts=128, n=4, checkpoints=4),
    }


def hh_small() -> dict[str, Any]:
    """Anthropic's HH from the data folder."""
    data = found("hh", "helpful_base.jsonl")
    return {
        "data": Data(train=(data or "hh/helpful_base.jsonl",), format="hh"),
        "base": Base(
            found("models", "stories260K") or "models/stories260K",
            most_tokens=256,
            new_tokens=64,
            temperature=1.0,
            stop_id=1,
        ),
        "sft": Train(epochs=2, batch_size=16, lr=2e-3, checkpoints=1, evaluations=4),
        "judge": Judge(Train(epochs=2, batch_size=16, lr=1e-3, checkpoints=1, evaluations=8)),
        "goal": Goal(beta_r=1.0, beta_pi=0.25),
        "draws": Draws(n=4, batch_size=256),
        "align": Align(train=Train(epochs=1, batch_size=16, lr=5e-5, checkpoints=3, evaluations=3)),
        "exo_pref": ExoPref(beta=0.25),
        "dpo_pref": DPO(beta=0.25),
        "rpo": RPO(beta=0.25, normalise="mean"),
        "test": Test(prompts=128, n=4, checkpoints=3),
    }


def published(family: str) -> dict[str, Any]:
    """The settings of the original's scripts (its README and `exp/*/train_*.sh`): batches are prompts per GPU × GPUs ×
    accumulation."""
    pythia = "EleutherAI/pythia-2.8b"
    micro = {"micro_batch": 8, "precision": "bfloat16"}
    usual = Train(batch_size=128, lr=1e-5, **micro)  # type: ignore[arg-type]
    if family == "imdb":
        base = Base("gpt2-large", most_tokens=1012, new_tokens=500, device="auto", checkpointing=True)
        fine = {"batch_size": 128, "lr": 1e-5, "epochs": 5.0, **micro}
        return {
            "data": Data(("stanfordnlp/imdb",), ("stanfordnlp/imdb",), "imdb", valid_rows=500, test_rows=0),
            "base": base,
            "sft": Train(**fine),  # type: ignore[arg-type]
            "judge": Judge(Train(**{**fine, "epochs": 3.0})),  # type: ignore[arg-type]
            "goal": Goal("log-odds:lvwerra/distilbert-imdb:POSITIVE", 0.1, 0.1),
            "draws": Draws(n=2, batch_size=256),
            "align": Align(train=Train(batch_size=64, lr=1e-6, checkpoints=20, **micro)),  # type: ignore[arg-type]
        }
    tldr = family == "tldr"
    source = ("openai/summarize_from_feedback:comparisons",) if tldr else ("Anthropic/hh-rlhf:helpful-base",)
    return {
        "data": Data(source, source, "tldr" if tldr else "hh", valid_rows=500, test_rows=0),
        "base": Base(
            pythia,
            most_tokens=650 if tldr else 512,
            new_tokens=75 if tldr else 200,
            device="auto",
            checkpointing=True,
        ),
        "sft": usual,
        "judge": Judge(usual),
        "draws": Draws(n=2, batch_size=256),
        "align": Align(train=Train(batch_size=128, lr=1e-6, checkpoints=20, **micro)),  # type: ignore[arg-type]
    }


def recipe(name: str) -> Recipe:
    """The recipe called `family/stage`."""
    family, stage = name.split("/")
    presets = {"dialogues-small": dialogues_small, "hh-small": hh_small, "pairs": own_pairs}
    settings = presets[family]() if family in presets else published(family)
    kind = KINDS[stage]
    return kind(
        family=family, **{name: value for name, value in settings.items() if name in kind.__dataclass_fields__}
    )


def own_pairs() -> dict[str, Any]:
    """A user's own data: moderate sizes, a model that fits a laptop with patience or any GPU."""
    return {
        "base": Base("gpt2", temperature=1.0, device="auto", new_tokens=128),
        "sft": Train(batch_size=32, lr=2e-5, micro_batch=8, checkpoints=1),
        "judge": Judge(Train(batch_size=32, lr=2e-5, micro_batch=8, checkpoints=1)),
        "draws": Draws(n=4, batch_size=128),
        "align": Align(size=4, train=Train(batch_size=32, lr=5e-6, micro_batch=8)),
        "test": Test(prompts=256, checkpoints=4),
    }
