"""Questions whose answers can be checked (STaR, Zelikman et al. 2022, arXiv:2203.14465, and its successors).

A right answer is worth 1, any other 0.

Tasks without a suffix carry the published settings and hub models (they want a GPU): Llama-3.1-8B-Instruct, adapters of
rank 16, 1024 new tokens. `mmlu-small` and `csqa-small` run on a laptop CPU, on real questions where the data folder has
them, answered by a letter alone.
"""

from __future__ import annotations

from dataclasses import replace

from tiltlm.feeds import Draws, Feed
from tiltlm.fit import Fit
from tiltlm.nets import Net
from tiltlm.policies.dpo import DPO
from tiltlm.policies.reinforce import Reinforce
from tiltlm.policies.sft import SFT
from tiltlm.questions.splits import Portion
from tiltlm.questions.wording import Asking
from tiltlm.recipes.preset import Preset
from tiltlm.recipes.rounds import PUBLISHED as AS_PUBLISHED
from tiltlm.recipes.rounds import QUESTIONS as FEWER
from tiltlm.recipes.rounds import rounds
from tiltlm.stages.cells import Cell
from tiltlm.stages.log_z import LogZSettings
from tiltlm.stages.measure import RulerSettings
from tiltlm.tasks.afrimmlu import AfriMMLU
from tiltlm.tasks.csqa import CSQA
from tiltlm.tasks.data_set import MODEL, OfDataSet
from tiltlm.tasks.gsm8k import GSM8K
from tiltlm.tasks.language import found
from tiltlm.tasks.mcq import MCQ
from tiltlm.tasks.mgsm import MGSM
from tiltlm.tasks.mmlu import MMLU
from tiltlm.tasks.mmmlu import MMMLU

TASKS: dict[str, str] = {
    "mcq": "multiple choice questions of your own: --task.file my.csv",
    "mmlu-small": "real questions of MMLU to a small model, answered by a letter alone",
    "csqa-small": "real questions of common sense to a small model, answered by a letter alone",
    "mmlu": "MMLU, Llama-3.1-8B-Instruct: the published settings (wants a GPU)",
    "mmmlu": "MMLU in fourteen languages, Yoruba first: the published settings (wants a GPU)",
    "afrimmlu": "MMLU in African languages: the published settings (wants a GPU)",
    "gsm8k": "grade school mathematics in words: the published settings (wants a GPU)",
    "mgsm": "the same in eleven languages: the published settings (wants a GPU)",
    "csqa": "CommonsenseQA, five options: the published settings (wants a GPU)",
}

METHODS = ("reference", "rloo", "dpo", "sft")
"""What a comparison takes where none are named."""


def preset(name: str) -> Preset:
    """The settings of a task of this system."""
    made = small(SMALL[name]) if name in SMALL else published(PUBLISHED[name])
    return replace(made, task=replace(made.task, name=name), methods=METHODS)  # type: ignore[type-var]


def cells(fit: Fit, dpo: Fit, net: Net) -> dict[str, Cell]:
    """DPO on pairs of three stored draws, every right one over every wrong one; the others on new draws."""
    return {
        "sft": Cell(SFT(), Feed(), fit, net),
        "rloo": Cell(Reinforce("leave_one_out", None), Feed(n=4), fit, net),
        "dpo": Cell(DPO(0.1), Feed("stored", Draws(3), 3, "all"), dpo, net),
    }


# ---- published --------------------------------------------------------------------------------------------------

LLAMA = replace(MODEL, model="unsloth/Meta-Llama-3.1-8B-Instruct", device="auto")

PUBLISHED: dict[str, OfDataSet] = {
    "mmlu": MMLU(LLAMA), "mmmlu": MMMLU(LLAMA), "afrimmlu": AfriMMLU(LLAMA), "gsm8k": GSM8K(LLAMA), "mgsm": MGSM(LLAMA),
    "csqa": CSQA(LLAMA),
}  # fmt: skip


def published(task: OfDataSet) -> Preset:
    """The original STaR on MMLU: AdamW at 2e-4, betas .9 and .95, weight decay .01, five steps of warm-up, then linearly to
    0, adapters of rank and alpha 16 beside all seven projections; its DPO at 1e-5, six pairs a step, 45 steps of warm-up,
    no weight decay."""
    fit = Fit(
        lr=2e-4, steps=500, batch_size=16, warmup=5, decay="linear", floor=0.0, betas=(0.9, 0.95), weight_decay=0.01,
        precision="bfloat16", micro_batch=4,
    )  # fmt: skip
    dpo = replace(fit, lr=1e-5, epochs=1.0, batch_size=6, warmup=45, weight_decay=0.0, micro_batch=2)
    return Preset(
        task,
        cells(fit, dpo, AS_PUBLISHED.net),
        RulerSettings(n=4, batch_size=64, absolute=False),
        log_z=LogZSettings(by="none"),
        variants=rounds(AS_PUBLISHED),
    )


# ---- a laptop's CPU ---------------------------------------------------------------------------------------------

LETTER = replace(MODEL, model=found("models", "stories260K"), new_tokens=2)
"""A blank and a letter."""

SHORT = Asking("short", chat="none")

FEW = Portion(400, 100, 100, longest=250)

CSQA_FILES = found("reasoning", "commonsenseqa_train.jsonl"), found("reasoning", "commonsenseqa_dev.jsonl")

SMALL: dict[str, OfDataSet] = {
    "mmlu-small": MMLU(LETTER, SHORT, FEW, found("mmlu", "mmlu_test.csv")),
    "csqa-small": CSQA(LETTER, SHORT, FEW, *CSQA_FILES),
    "mcq": MCQ(replace(MODEL, new_tokens=256)),
}


def small(task: OfDataSet) -> Preset:
    """A laptop's numbers."""
    fit = Fit(lr=3e-4, steps=100, batch_size=64)
    log_z = LogZSettings(by="reference", draws=500, prompts=100)
    ruler, dpo = RulerSettings(prompts=100, n=20), replace(fit, lr=1e-4)
    return Preset(task, cells(fit, dpo, Net()), ruler, log_z=log_z, variants=rounds(FEWER))
