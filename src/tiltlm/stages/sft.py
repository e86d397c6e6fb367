"""Supervised fine-tuning on the data's wanted responses: the reference of preference alignment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro

from tiltlm import ranks
from tiltlm.experience import Offline
from tiltlm.fit import Fit
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.policies.sft import SFT as Imitation
from tiltlm.run import Recipe, Run
from tiltlm.samples import Samples
from tiltlm.seeds import stream
from tiltlm.stages.base import begun, reading
from tiltlm.stages.data import encoded, wanted_answer
from tiltlm.stages.reading import Reading
from tiltlm.stages.reporting import row
from tiltlm.stages.task import OfTask
from tiltlm.stages.training import train
from tiltlm.train import best_checkpoint

FIT = Fit(
    lr=1e-5, epochs=1.0, batch_size=128, betas=(0.9, 0.95), clip=1.0, floor=0.0, checkpoints=1, evaluations=10
)
"""As published: Adam (0.9, 0.95), cosine to 0, clipped at 1; held-out rows choose the checkpoint."""


@dataclass(frozen=True)
class SftSettings:
    """How the reference is fine-tuned."""

    fit: Annotated[Fit, tyro.conf.arg(name="")] = FIT
    lora: int = 0
    """Rank of LoRA adapters, merged afterwards (0: train every weight)."""

    packing: bool = False
    """Several examples in one row, where that is exact for this model (it is tried out first)."""

    checkpointing: bool = False
    """Save memory: compute activations again in the backward pass."""


@dataclass(frozen=True)
class Sft(OfTask):
    """Supervised fine-tuning on the chosen responses: the reference of everything after it."""

    task: Any
    seed: int = 0
    stage: ClassVar[str] = "sft-model"
    together: ClassVar[bool] = True

    def counted(self) -> Sft:
        return Sft(self.task.only("dataset", "reader", "base", "sft"), self.seed)

    def inputs(self) -> dict[str, Recipe]:
        return begun(self.task, self.seed)

    def build(self, run: Run[Any]) -> None:
        read, own, s = reading(self.task, run.inputs), stream(self.seed, "preferences"), self.task.sft
        data, held = (self.answers(run, read, split) for split in ("train", "valid"))
        model = read.trainable(temperature=1.0, lora=s.lora, checkpointing=s.checkpointing)
        how = s.fit.of(len(data))
        if s.packing:
            model = model.with_packing()
        experience = Offline(data, how.batch_size, own.child("sft", "data"))
        watch = how.watching(lambda: {"nll_per_token": nll_per_token(model, held)}, best="nll_per_token")
        train(run, model, Imitation(), experience, how, read.device, own, watch=watch)
        if s.lora:
            ranks.first_then_others(lambda: self.merge(run, read))
        best = read.load(model_in(run), temperature=1.0)
        self.report(run, {"before SFT": read.load(temperature=1.0), "after SFT": best}, held)

    def answers(self, run: Run[Any], read: Reading, split: str) -> Samples:
        """What is imitated. Raises ValueError where there is nothing."""
        found = encoded(run.inputs["data"], split, read.encoder).answers(wanted_answer)
        if not len(found):
            raise ValueError("SFT imitates wanted answers, and those to train on or those to validate on have none: every "
                             "label says false (more --task.valid-rows may help)")  # fmt: skip
        return found.to(read.device)

    def report(self, run: Run[Any], models: dict[str, CausalLM], held: Samples) -> None:
        """The held-out responses' negative log-likelihood under each model, at temperature 1."""
        nll = {name: nll_per_token(model, held) for name, model in models.items()}
        run.write_json(
            "report.json",
            [row(self, name, "nll_per_token", value, None, len(held), "nats") for name, value in nll.items()],
        )

    def merge(self, run: Run[Any], read: Reading) -> None:
        """The best adapters merged into the base model: a folder like any other, that new adapters can be put on."""
        if (run.folder / "merged").is_dir():
            return
        here = replace(read, reader=replace(read.reader, device="cpu"))  # whole: a GPU may hold a part alone
        model = here.trainable(lora=self.task.sft.lora).eval()
        model.restore(best_checkpoint(run.folder))
        assert model.adapters is not None
        aside = run.folder / ".merged.tmp"
        model.model, model.adapters = model.adapters.merge_and_unload(), None
        model.save(aside)
        aside.rename(run.folder / "merged")

    def speech(self, run: Run[Any]) -> tuple[Any, int | None]:
        return reading(self.task, run.inputs).tokenizer, self.task.reader.new_tokens

    def room(self, run: Run[Any]) -> int | None:
        return int(self.task.reader.room)

    def decoder(self, run: Run[Any]) -> LanguageModel:
        return reading(self.task, run.inputs).load(model_in(run))


def model_in(run: Run[Any]) -> Path:
    """The folder of the best model of an SFT run."""
    merged = run.folder / "merged"
    return merged if merged.is_dir() else best_checkpoint(run.folder)


@torch.no_grad()
def nll_per_token(model: CausalLM, held: Samples) -> float:
    """Mean negative log-likelihood of a token of `held`, nats."""

    def sums(begin: int, end: int) -> list[float]:
        parts = [held.select(slice(k, min(k + 64, end))) for k in range(begin, end, 64)]
        return [float(model.log_prob(part).sum()) for part in parts]

    return -sum(ranks.in_shares(len(held), sums)) / int(held.mask.sum())
