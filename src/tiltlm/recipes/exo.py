"""Preference alignment end to end (Ji et al. 2024, arXiv:2402.00856, on Anthropic's HH): fine-tuning, a reward model, the
reference's labelled draws, and methods on groups or pairs against one target.

Tasks without a suffix carry the published settings and hub models (they want a GPU); `dialogues` and `hh-small` run on a
laptop CPU; `pairs` is for data of your own. The paper's beta is a product: the methods on groups have its second factor,
`beta_pi`, the methods on pairs it alone.
"""

from __future__ import annotations

from dataclasses import replace

from tiltlm.feeds import Draws, Feed
from tiltlm.fit import Fit
from tiltlm.methods import method
from tiltlm.nets import Net
from tiltlm.policies.apo import APO
from tiltlm.policies.cdpo import CDPO
from tiltlm.policies.dpo import DPO
from tiltlm.policies.dpo_rw import DpoRw
from tiltlm.policies.exo_pref import ExoPref
from tiltlm.policies.exo_rw import ExoRw
from tiltlm.policies.hinge import Hinge
from tiltlm.policies.ipo import IPO
from tiltlm.policies.kto import KTO
from tiltlm.policies.orpo import ORPO
from tiltlm.policies.robust_dpo import RobustDPO
from tiltlm.policies.rpo import RPO
from tiltlm.policies.simpo import SimPO
from tiltlm.recipes.preset import Preset
from tiltlm.stages.cells import Cell
from tiltlm.stages.data import Dataset
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import RulerSettings
from tiltlm.stages.reading import Reader
from tiltlm.stages.reward_model import Judge
from tiltlm.stages.sft import FIT, SftSettings
from tiltlm.tasks.language import found
from tiltlm.tasks.pairs import Pairs

TASKS: dict[str, str] = {
    "pairs": "preference alignment on data of your own: --task.data mine.jsonl --task.model gpt2",
    "dialogues": "dialogues of the project's own making with a planted preference, own model: nothing to download",
    "hh-small": "Anthropic's HH (helpful-base) with the 260K stories model, from the data folder",
    "hh": "Anthropic's HH (helpful-base), pythia-2.8b: the published settings (wants a GPU)",
    "tldr": "TL;DR summaries, pythia-2.8b: the published settings (wants a GPU)",
    "imdb": "IMDB reviews, gpt2-large, a classifier's log-odds as reward: the published settings (wants a GPU)",
}

METHODS = ("reference", "exo-rw", "dpo-rw", "exo-pref", "dpo", "rpo")
"""What a comparison takes where none are named."""

RULER = RulerSettings(prompts=512, n=4, batch_size=128, checkpoints=10)
ALIGN = replace(FIT, lr=1e-6, checkpoints=10)


def preset(name: str) -> Preset:
    """The task called `name` with its settings."""
    made: Preset = PRESETS[name]()
    return replace(made, task=replace(made.task, name=name), log_z=LogZSettings(by="none"), methods=METHODS)  # type: ignore[type-var]


def pairs() -> Preset:
    """A user's own data: moderate sizes, a model that fits a laptop with patience or any GPU."""
    fine = replace(FIT, batch_size=32, lr=2e-5, micro_batch=8)
    task = Pairs(
        reader=Reader("gpt2", temperature=1.0, device="auto", new_tokens=128),
        sft=SftSettings(fine),
        judge=Judge(fine),
    )
    feed, align = (
        Feed(draws=Draws(4, batch_size=128), size=4),
        replace(ALIGN, batch_size=32, lr=5e-6, micro_batch=8),
    )
    made = cells(0.5, feed, align)
    made["kto"] = replace(made["kto"], feed=replace(feed, source="own"))  # verdicts need no draws, no labels
    return Preset(task, made, replace(RULER, prompts=256, checkpoints=4))


def dialogues() -> Preset:
    """Own dialogues, own model."""
    fine = replace(FIT, batch_size=32, lr=1e-3, evaluations=4)
    task = Pairs(
        Dataset(own=1200), Reader(most_tokens=128, new_tokens=24, temperature=1.0, stop=("0",)), beta=0.5,
        sft=SftSettings(fine), judge=Judge(fine),
    )  # fmt: skip
    align = replace(ALIGN, epochs=2, batch_size=16, lr=5e-4, checkpoints=4, evaluations=4)
    made = cells(0.5, Feed(draws=Draws(4, 512, 256)), align)
    return Preset(task, made, replace(RULER, prompts=128, checkpoints=4))


def hh_small() -> Preset:
    """Anthropic's HH from the data folder."""
    fine = replace(FIT, epochs=2, batch_size=16, lr=2e-3, evaluations=4)
    task = Pairs(
        Dataset((found("hh", "helpful_base.jsonl") or "hh/helpful_base.jsonl",), format="hh"),
        Reader(found("models", "stories260K") or "models/stories260K", most_tokens=256, new_tokens=64, temperature=1.0,
               stop=("1",)),
        beta=0.05, beta_pi=0.25, sft=SftSettings(fine), judge=Judge(replace(fine, lr=1e-3, evaluations=8)),
    )  # fmt: skip
    align = replace(ALIGN, batch_size=16, lr=7e-5, checkpoints=3, evaluations=3)
    made = cells(0.25, Feed(draws=Draws(4, batch_size=256)), align)
    return Preset(task, made, replace(RULER, prompts=128, checkpoints=3))


# ---- published: batches are prompts per GPU × GPUs × accumulation, and training stops where the original's scripts do (700
# or 800 micro-steps), the cosine ending there too -----------------------------------------------------------------------

USUAL = replace(FIT, micro_batch=8, precision="bfloat16")


def hh() -> Preset:
    """HH, pythia-2.8b."""
    helpful = ("Anthropic/hh-rlhf:helpful-base",)
    return large(
        Dataset(helpful, helpful, "hh", 500, 0), Reader("EleutherAI/pythia-2.8b", device="auto"), 175 * 128
    )


def tldr() -> Preset:
    """TL;DR, pythia-2.8b."""
    reader = Reader("EleutherAI/pythia-2.8b", most_tokens=650, new_tokens=75, device="auto")
    return large(Dataset(("trl-lib/tldr-preference",), (), "auto", 500, 2000), reader, 200 * 128)


def large(dataset: Dataset, reader: Reader, prompts: int) -> Preset:
    """What HH and TL;DR share."""
    task = Pairs(dataset, reader, sft=SftSettings(USUAL, checkpointing=True), judge=Judge(USUAL))
    feed, align = Feed(draws=Draws(2, prompts, 32)), replace(USUAL, lr=1e-6, checkpoints=10)
    return Preset(task, cells(0.5, feed, align, checkpointing=True), replace(RULER, batch_size=32))


def imdb() -> Preset:
    """IMDB, gpt2-large."""
    reviews = ("stanfordnlp/imdb",)
    reader = Reader("gpt2-large", most_tokens=1012, new_tokens=500, device="auto")
    task = Pairs(
        Dataset(reviews, reviews, "imdb", valid_rows=500, test_rows=0), reader,
        "log-odds:lvwerra/distilbert-imdb:POSITIVE", 0.1 * 0.1, 0.1,
        sft=SftSettings(replace(USUAL, epochs=5), checkpointing=True), judge=Judge(replace(USUAL, epochs=3)),
    )  # fmt: skip
    feed, align = Feed(draws=Draws(2, 200 * 64, 32)), replace(USUAL, batch_size=64, lr=1e-6, checkpoints=10)
    return Preset(task, cells(0.1, feed, align, checkpointing=True), replace(RULER, batch_size=32))


PRESETS = {"pairs": pairs, "dialogues": dialogues, "hh-small": hh_small, "hh": hh, "tldr": tldr, "imdb": imdb}


def cells(beta_pi: float, feed: Feed, fit: Fit, checkpointing: bool = False) -> dict[str, Cell]:
    """Every method on the same rows, trained alike; on pairs log-ratios are scaled by the paper's beta_pi. Those that draw
    themselves take 200 steps of as many rows."""
    net = Net(checkpointing=checkpointing)
    live = replace(fit, epochs=0.0, steps=200)
    return {
        "exo-rw": Cell(ExoRw(beta_pi=beta_pi), feed, fit, net),
        "dpo-rw": Cell(DpoRw(beta_pi=beta_pi), feed, fit, net),
        "exo-pref": Cell(ExoPref(beta_pi), feed, fit, net),
        "dpo": Cell(DPO(beta_pi), feed, fit, net),
        "cdpo": Cell(CDPO(beta_pi), feed, fit, net),
        "robust-dpo": Cell(RobustDPO(beta_pi), feed, fit, net),
        "ipo": Cell(IPO(0.1), feed, fit, net),
        "hinge": Cell(Hinge(beta_pi), feed, fit, net),
        "apo": Cell(APO(beta_pi), feed, fit, net),
        "rpo": Cell(RPO(beta_pi, normalise="mean"), feed, fit, net),
        "simpo": Cell(SimPO(), feed, fit, net),
        "orpo": Cell(ORPO(), feed, fit, net),
        "kto": Cell(KTO(beta_pi), feed, fit, net),
        "sft": Cell(method("sft"), feed, fit, net),
        "reinforce": Cell(method("reinforce"), feed, live, net),
        "rloo": Cell(method("rloo"), feed, live, net),
        "ppo": Cell(method("ppo"), feed, live, net),
    }
