"""From settings to a judge of texts: its networks, by a reward model or a second policy, and the judge itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiltlm.judges.base import Gold
from tiltlm.judges.discriminator import Discriminator
from tiltlm.judges.learning import LearningJudge
from tiltlm.judges.networks import LogRatio
from tiltlm.judges.settings import Judging
from tiltlm.models.body import body_of
from tiltlm.models.causal import CausalLM, steady
from tiltlm.models.ends import tokenizer_of
from tiltlm.models.hub import config_of
from tiltlm.models.reward_model import RewardModel
from tiltlm.models.unadapted import Unadapted
from tiltlm.seeds import Stream

ADAPTED = "all-linear"
"""The layers that adapters are put beside."""


def judge_on_texts(
    how: Judging, body: str | Path, gold: Gold | None, own: Stream, folder: Path, device: Any = "cpu",
    shard: bool = False,
) -> LearningJudge:  # fmt: skip
    """A judge of texts that begins as the model called `body`; the other arguments as `Discriminator` and `LearningJudge`
    take them."""
    networks = [network_on_texts(how, body, own.child("member", k), device) for k in range(how.members)]
    learner = Discriminator(networks, how.lr, how.batch_size, shard, how.micro_batch)
    return LearningJudge(learner, gold, how, own, folder)


def network_on_texts(how: Judging, body: str | Path, own: Stream, device: Any = "cpu") -> Any:
    """One member of a judge of texts, in evaluation mode. body: a language model's folder or hub name, or a reward model's;
    own: for first weights."""
    with torch.random.fork_rng(devices=[]):
        own.seed_everything()
        return (_log_ratio if how.kind == "dpo" else _reward_model)(how, body, own, device).eval()


def is_reward_model(name: str | Path) -> bool:
    """Whether a folder or hub name holds a sequence classifier (else a language model)."""
    return any("SequenceClassification" in each for each in config_of(name).architectures or ())


def _reward_model(how: Judging, body: str | Path, own: Stream, device: Any) -> RewardModel:
    if is_reward_model(body):
        model = RewardModel.load(body, most_tokens=how.most_tokens)
    else:
        model = RewardModel.from_body(body, seed=own.key & 0x7FFF_FFFF, most_tokens=how.most_tokens)
    if model.head is None:
        raise ValueError(f"{body} has no linear head on a causal body: a judge cannot be trained on it")
    if how.lora_rank:
        _adapt(body_of(model.classifier.model), how.lora_rank)
    return (model.with_checkpointing() if how.checkpointing else model).to(device)


def _log_ratio(how: Judging, body: str | Path, own: Stream, device: Any) -> LogRatio:
    base, tokenizer = CausalLM.load(body, device=device).requires_grad_(False), tokenizer_of(str(body))
    policy = steady(base)
    if how.lora_rank:
        policy = policy.with_lora(how.lora_rank, 4 * how.lora_rank)
    policy = policy.with_checkpointing() if how.checkpointing else policy
    policy.tokenizer = tokenizer
    return LogRatio(policy, Unadapted(policy) if how.lora_rank else base, how.dpo_beta, how.most_tokens)


def _adapt(body: Any, rank: int) -> None:
    """Adapters beside every linear layer of a body, in place; D2PO's alpha is four times the rank. The head on the body
    stays as it is, and is trained."""
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    get_peft_model(body, LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=ADAPTED))
