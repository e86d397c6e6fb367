"""Small judges for tests: on a table of values, with a gold reward that counts how often it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.judges.discriminator import Discriminator
from tiltlm.judges.learning import LearningJudge
from tiltlm.judges.networks import LastValue
from tiltlm.judges.settings import Judging
from tiltlm.models.causal import CausalLM
from tiltlm.models.table import TableValues
from tiltlm.seeds import stream

VOCABULARY, LENGTH = 4, 3


@dataclass
class Counting:
    """Gold: the sum of a completion's ids, or 0 where `ties`. `asked` is every row it was asked about."""

    ties: bool = False
    asked: list[Any] = field(default_factory=list)

    def __call__(self, prompts: Any, completions: Any) -> list[float]:
        self.asked += list(zip(map(tuple, prompts), map(tuple, completions), strict=True))
        return [0.0 if self.ties else float(sum(ids)) for ids in completions]


def table_judge(folder: Path, gold: Any, seed: int = 0, **settings: Any) -> LearningJudge:
    how = Judging("reward-model", **({"lr": 0.1} | settings))
    networks = [LastValue(TableValues(2, VOCABULARY, LENGTH)) for _ in range(how.members)]
    own = stream(seed, "judge")
    return LearningJudge(Discriminator(networks, how.lr, how.batch_size), gold, how, own, folder)


def rows(step: int, n: int = 8) -> tuple[list[list[int]], list[list[int]]]:
    """n rows of step `step`: pairs side by side."""
    uniform = stream(step, "rows").uniform(range(n), LENGTH)
    completions = (uniform * VOCABULARY).to(torch.int64).tolist()
    return [[k // 2 % 2] for k in range(n)], completions


def text_body(folder: Path, **settings: Any) -> Path:
    """A GPT-2 of two layers, its padding token its end token, and a tokenizer, as a folder."""
    tokenizer = train_tokenizer(stories(100, stream(0, "test-judges")), 300)
    size = {"vocab_size": len(tokenizer), "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64}
    config = GPT2Config(**size, **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **settings})
    torch.manual_seed(3)
    model = CausalLM(GPT2LMHeadModel(config), () if config.eos_token_id is None else (0,))
    model.tokenizer = tokenizer
    model.save(folder)
    return folder
