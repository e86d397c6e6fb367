"""Preference alignment end to end (Ji et al. 2024, arXiv:2402.00856, on Anthropic's HH): data, SFT, reward model,
generation, labels, alignment by thirteen methods, evaluation against one target.

Families without a suffix carry the published settings and hub models (they want a GPU); `-small` ones run on a laptop
CPU; `pairs` is for data of your own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tiltlm.policies.apo import APO
from tiltlm.policies.cdpo import CDPO
from tiltlm.policies.dpo import DPO
from tiltlm.policies.exo_pref import ExoPref
from tiltlm.policies.hinge import Hinge
from tiltlm.policies.kto import KTO
from tiltlm.policies.robust_dpo import RobustDPO
from tiltlm.policies.rpo import RPO
from tiltlm.recipes.preferences_data import BaseStage, DataStage
from tiltlm.recipes.preferences_policies import POLICIES
from tiltlm.recipes.preferences_report import MEASURED, Evaluate
from tiltlm.recipes.preferences_settings import Align, Base, Data, Draws, Goal, Judge, Test, Train
from tiltlm.recipes.preferences_stages import SFT, Generate, Label, RewardStage
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
        "base": Base(most_tokens=128, new_tokens=24, temperature=1.0, stop=("0",)),
        "sft": Train(epochs=1, batch_size=32, lr=1e-3, checkpoints=1, evaluations=4),
        "judge": Judge(Train(epochs=1, batch_size=32, lr=1e-3, checkpoints=1, evaluations=4)),
        "goal": Goal(beta_r=1.0, beta_pi=0.5),
        "draws": Draws(n=4, prompts=512, batch_size=256),
        "align": Align(train=Train(epochs=2, batch_size=16, lr=5e-4, checkpoints=4, evaluations=4)),
        "test": Test(prompts=128, n=4, checkpoints=4),
        **pair_methods(0.5),
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
            stop=("1",),
        ),
        "sft": Train(epochs=2, batch_size=16, lr=2e-3, checkpoints=1, evaluations=4),
        "judge": Judge(Train(epochs=2, batch_size=16, lr=1e-3, checkpoints=1, evaluations=8)),
        "goal": Goal(beta_r=0.2, beta_pi=0.25),
        "draws": Draws(n=4, batch_size=256),
        "align": Align(train=Train(epochs=1, batch_size=16, lr=7e-5, checkpoints=3, evaluations=3)),
        "test": Test(prompts=128, n=4, checkpoints=3),
        **pair_methods(0.25),
    }


def published(family: str) -> dict[str, Any]:
    """The settings of the original's scripts: batches are prompts per GPU × GPUs × accumulation, and training stops where
    theirs does (700 or 800 micro-steps), the cosine ending there too."""
    micro = {"micro_batch": 8, "precision": "bfloat16"}
    if family == "imdb":
        fine: dict[str, Any] = {"batch_size": 128, "lr": 1e-5, "checkpoints": 1, **micro}
        return {
            "data": Data(("stanfordnlp/imdb",), ("stanfordnlp/imdb",), "imdb", valid_rows=500, test_rows=0),
            "base": Base("gpt2-large", most_tokens=1012, new_tokens=500, device="auto", checkpointing=True),
            "sft": Train(epochs=5, **fine),
            "judge": Judge(Train(epochs=3, **fine)),
            "goal": Goal("log-odds:lvwerra/distilbert-imdb:POSITIVE", 0.1, 0.1),
            "draws": Draws(n=2, prompts=200 * 64, batch_size=32),
            "align": Align(train=Train(batch_size=64, lr=1e-6, **micro)),  # type: ignore[arg-type]
            "test": Test(batch_size=32),
            **pair_methods(0.1),
        }
    tldr = family == "tldr"
    hh, posts = "Anthropic/hh-rlhf:helpful-base", "trl-lib/tldr-preference"
    usual = Train(batch_size=128, lr=1e-5, checkpoints=1, **micro)  # type: ignore[arg-type]
    return {
        "data": Data((posts,), (), "auto", 500, 2000) if tldr else Data((hh,), (hh,), "hh", 500, 0),
        "base": Base(
            "EleutherAI/pythia-2.8b",
            most_tokens=650 if tldr else 512,
            new_tokens=75 if tldr else 200,
            device="auto",
            checkpointing=True,
        ),
        "sft": usual,
        "judge": Judge(usual),
        "draws": Draws(n=2, prompts=(200 if tldr else 175) * 128, batch_size=32),
        "align": Align(train=Train(batch_size=128, lr=1e-6, **micro)),  # type: ignore[arg-type]
        "test": Test(batch_size=32),
        **pair_methods(0.5),
    }


def pair_methods(beta: float) -> dict[str, Any]:
    """The methods on pairs that scale log-ratios, all with the same beta, as the paper's beta_pi."""
    return {
        "exo_pref": ExoPref(beta),
        "dpo_pref": DPO(beta),
        "cdpo": CDPO(beta),
        "robust_dpo": RobustDPO(beta),
        "hinge": Hinge(beta),
        "apo": APO(beta),
        "rpo": RPO(beta, normalise="mean"),
        "kto": KTO(beta),
    }


def recipe(name: str) -> Recipe:
    """The recipe called `family/stage`."""
    family, stage = name.split("/")
    presets = {"dialogues-small": dialogues_small, "hh-small": hh_small, "pairs": own_pairs}
    settings = presets[family]() if family in presets else published(family)
    kind = KINDS[stage]
    if family == "pairs" and stage in FROM_DATA:
        settings["align"] = replace(settings["align"], source="data")
    return kind(
        family=family, **{name: value for name, value in settings.items() if name in kind.__dataclass_fields__}
    )


FROM_DATA = ("kto", "kto-policy")
"""Stages that, on a user's own data, learn from that data where nothing else is said: verdicts need no draws, no labels."""


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
