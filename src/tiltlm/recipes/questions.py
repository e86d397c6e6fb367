"""Questions whose answers can be checked: multiple choice and arithmetic, right answers worth 1 (STaR, Zelikman et al.
2022, arXiv:2203.14465, on the data sets that it and its successors use).

Tasks without a suffix carry the published settings and hub models (they want a GPU): Llama-3.1-8B-Instruct, adapters of
rank 16, 1024 new tokens. `mmlu-small` and `csqa-small` run on a laptop CPU, on real questions where the data folder has
them, answered by a letter alone.
"""

from __future__ import annotations

from collections.abc import Callable
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
from tiltlm.recipes.rounds import PUBLISHED as PUBLISHED_ROUNDS
from tiltlm.recipes.rounds import SMALL as SMALL_SUMS
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

LLAMA = replace(MODEL, model="unsloth/Meta-Llama-3.1-8B-Instruct", device="auto")


def preset(name: str) -> Preset:
    """The settings of a task of this system."""
    task = SMALL[name]() if name in SMALL else PUBLISHED[name]
    made = small(task) if name in SMALL else published(task)
    return replace(made, task=replace(made.task, name=name), methods=METHODS)  # type: ignore[type-var]


# ---- published --------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, OfDataSet] = {
    "mmlu": MMLU(LLAMA), "mmmlu": MMMLU(LLAMA), "afrimmlu": AfriMMLU(LLAMA), "gsm8k": GSM8K(LLAMA), "mgsm": MGSM(LLAMA),
    "csqa": CSQA(LLAMA),
}  # fmt: skip


def published(task: OfDataSet) -> Preset:
    """AdamW at 2e-4 with betas .9 and .95 and weight decay .01, five steps of warm-up, then linearly to 0; DPO at 1e-5 with
    beta_pi .1 and no decay of weights."""
    fit = Fit(
        lr=2e-4, epochs=1.0, batch_size=16, warmup=5, decay="linear", floor=0.0, betas=(0.9, 0.95), weight_decay=0.01,
        precision="bfloat16", micro_batch=4,
    )  # fmt: skip
    ruler = RulerSettings(n=4, batch_size=64, absolute=False)
    net = Net(policy="lora", lora_rank=16, checkpointing=True)
    scale = replace(PUBLISHED_ROUNDS, net=net)
    return Preset(task, cells(fit, 1e-5, net), ruler, log_z=NO_LOG_Z, variants=rounds(scale))


NO_LOG_Z = LogZSettings(by="none")


def cells(fit: Fit, dpo_lr: float, net: Net) -> dict[str, Cell]:
    """DPO on pairs of stored draws, right ones over wrong ones; the others on new draws."""
    new = replace(fit, steps=351, epochs=0.0)
    return {
        "sft": Cell(SFT(), Feed(), new, net),
        "rloo": Cell(Reinforce("leave_one_out", None), Feed(n=4), new, net),
        "dpo": Cell(
            DPO(0.1), Feed("stored", Draws(3), 3, "all"), replace(fit, lr=dpo_lr, weight_decay=0.0, warmup=45), net
        ),
    }


# ---- a laptop's CPU ---------------------------------------------------------------------------------------------

LETTER = replace(MODEL, model=found("models", "stories260K"), new_tokens=2)
"""A blank and a letter."""

SHORT = Asking("short", chat="none")

FEW = Portion(400, 100, 100, 250)


def data(folder: str, name: str) -> str:
    """A file of the data folder; its name, where there is none, so that errors and `--task.file` say what is meant."""
    return found(folder, name)


SMALL_ROUNDS = replace(
    SMALL_SUMS, fits={name: replace(fit, lr=fit.lr / 3) for name, fit in SMALL_SUMS.fits.items()}
)
"""The draws of the small sums, and a third of their rates: the stories model has learnt more than one thing."""

SMALL: dict[str, Callable[[], OfDataSet]] = {
    "mmlu-small": lambda: MMLU(LETTER, SHORT, FEW, found("mmlu", "mmlu_test.csv")),
    "csqa-small": lambda: CSQA(
        LETTER,
        SHORT,
        FEW,
        found("reasoning", "commonsenseqa_train.jsonl"),
        found("reasoning", "commonsenseqa_dev.jsonl"),
    ),
    "mcq": lambda: MCQ(MODEL),
}


def small(task: OfDataSet) -> Preset:
    """A laptop's numbers."""
    fit = Fit(lr=3e-4, steps=100, batch_size=64)
    return Preset(
        task,
        cells(fit, 1e-4, Net()),
        RulerSettings(prompts=100, n=20),
        log_z=LogZSettings(by="reference", draws=500, prompts=100),
        variants=rounds(SMALL_ROUNDS),
    )
