"""What STaR's code (jakob-bjorner/star) calls a run: the name its loggers show, for finding a run of ours among older ones.

    training     {run_type}[_prompt=_qs=][_beta=_samples=]_ts=_ds=_lr=_wd=_lora=_gaccum=_warmup=_gnorm=_shuff=_seed=
                 [_resetModel=]
    evaluating   {run_type}_lr=_wd=_lora=[_beta=_samples=]_name=

The prompt is there in runs of type prompt_perf, beta and samples where the strategy is a DPO, resetModel where there are
several rounds. Unlike settings may share a name (batch size, data and starting model of a training are not in it); our
folders are keyed by all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiltlm.feeds import Feed
from tiltlm.policies.dpo import DPO
from tiltlm.policies.sft import SFT


@dataclass(frozen=True)
class StarRun:
    """The settings there that are part of a name, and their defaults."""

    run_type: str = "train"
    train_strategy: str = "reinforce"
    dataset_name: str = "mmlu_YO-NG"
    dpo_beta: float = 0.1
    samples_per_train_question: int = 1
    lr: float = 2e-4
    weight_decay: float = 0.01
    lora_r: int = 16
    train_gradient_accumulation_steps: int = 1
    warmup: int = 5
    max_grad_norm: float = 1.0
    shuffle_dataloader: bool = False
    seed: int = 2
    max_epochs: int = 10
    reset_model_every_star_epoch: bool = True
    meta_prompt_to_preamble: str = "Think step by step before answering."
    num_train_questions: int = -1
    model_name: str = "unsloth/Meta-Llama-3.1-8B-Instruct"

    @property
    def name(self) -> str:
        own = {"lr": self.lr, "wd": self.weight_decay, "lora": self.lora_r}
        pairs = {"beta": self.dpo_beta, "samples": self.samples_per_train_question}
        drawn = pairs if "dpo" in self.train_strategy else {}
        if self.run_type.startswith("eval"):
            return self._joined(own | drawn | {"name": self.model_name})
        asked = {"prompt": self.meta_prompt_to_preamble, "qs": self.num_train_questions}
        return self._joined(
            (asked if "prompt_perf" in self.run_type else {})
            | drawn
            | {"ts": self.train_strategy, "ds": self.dataset_name}
            | own
            | {
                "gaccum": self.train_gradient_accumulation_steps,
                "warmup": self.warmup,
                "gnorm": self.max_grad_norm,
            }
            | {"shuff": self.shuffle_dataloader, "seed": self.seed}
            | ({"resetModel": self.reset_model_every_star_epoch} if self.max_epochs > 1 else {})
        )

    def _joined(self, parts: dict[str, Any]) -> str:
        return "_".join([self.run_type, *(f"{name}={value}" for name, value in parts.items())])


def old_name(recipe: Any, run_type: str = "train", dataset_name: str = "") -> str:
    """What a training of ours (a recipe with method, feed, fit and net: SFT or DPO in rounds) would be called there.

    dataset_name: default the task's name. Raises ValueError for what has no counterpart there.
    """
    method, feed, fit, net = recipe.method, recipe.feed, recipe.fit, recipe.net
    if not isinstance(method, SFT | DPO) or not isinstance(feed, Feed):
        raise ValueError(f"{recipe.name}: runs there are SFT on right answers (reinforce) or DPO; this is neither")
    rounds, strategy, beta = feed.rounds, "reinforce", StarRun.dpo_beta
    if isinstance(method, DPO):
        strategy, beta = "dpo", recipe.task.beta if method.beta is None else method.beta
    return StarRun(
        run_type, strategy, dataset_name or recipe.task.name, beta, rounds.n, fit.lr,
        fit.weight_decay, net.lora_rank, max(1, fit.batch_size // (fit.micro_batch or fit.batch_size)), fit.warmup,
        fit.clip, True, recipe.seed, rounds.count, rounds.start == "base",
    ).name  # fmt: skip
