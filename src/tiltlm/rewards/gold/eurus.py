"""Eurus-RM-7b, a reward model for reasoning and chat (Yuan et al. 2024, arXiv:2404.02078), on its own prompt template.

It is published as a Mistral body and a linear head called `regression_head`, with a class of its own that would have to be
run from the hub. It is read here as transformers' Mistral classifier, whose head is called `score`: no foreign code runs.
The head reads the last token of "[INST] prompt [\\INST] response", tokenised as one text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tiltlm.models.classifier import TextClassifier
from tiltlm.models.hub import config_of, network, pretrained
from tiltlm.models.selftest import examine
from tiltlm.rewards.of_texts import Column, OfTexts

NAMES: dict[str, str] = {"eurusrm": "the output of the reward model Eurus-RM-7b; eurusrm:MODEL, one of its make"}
NEEDS: dict[str, str] = {"eurusrm": "openbmb/Eurus-RM-7b of the hub (14 GB), and a GPU"}

MODEL = "openbmb/Eurus-RM-7b"
HEAD = {"^regression_head": "score"}
"""What its head is called -> what transformers' classifier calls its own."""


@dataclass(frozen=True)
class Eurus(OfTexts):
    """The scalar of `model`; `batch_size` texts at once."""

    model: str = MODEL
    device: str = "cpu"
    batch_size: int = 8

    @property
    def files(self) -> tuple[str, ...]:
        return (self.model,)

    def check(self) -> None:
        kind = config_of(self.model).model_type
        if kind != "mistral":
            raise ValueError(f"eurusrm reads a Mistral body with a regression_head; {self.model} is {kind}")

    @cached_property
    def network(self) -> TextClassifier:
        from transformers import AutoTokenizer, MistralForSequenceClassification

        model, found = network(
            MistralForSequenceClassification, self.model, self.device, examine, num_labels=1, key_mapping=HEAD,
            dtype=torch.bfloat16 if self.device.startswith("cuda") else torch.float32,
        )  # fmt: skip
        if found["missing_keys"]:
            raise ValueError(
                f"{self.model} lacks weights of a Mistral reward model: {sorted(found['missing_keys'])}"
            )
        return TextClassifier(model, pretrained(AutoTokenizer, self.model)).eval()

    def read(self) -> None:
        _ = self.network

    @torch.no_grad()
    def __call__(self, prompts: Column, completions: Column, columns: Mapping[str, Column]) -> Tensor:
        texts = [templated(*row) for row in zip(prompts, completions, strict=True)]
        order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
        found = torch.zeros(len(texts))
        for begin in range(0, len(order), self.batch_size):
            some = order[begin : begin + self.batch_size]
            found[some] = self.network.logits(*self.network.encode([texts[k] for k in some]))[:, 0].float().cpu()
        return found


def templated(prompt: str, response: str) -> str:
    """The text that the model was trained on; the backslash is part of it."""
    return f"[INST] {prompt} [\\INST] {response}"


def reward(name: str, argument: str, device: str) -> OfTexts:
    """The reward called `name`."""
    return Eurus(argument or MODEL, device)
