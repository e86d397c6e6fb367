"""From settings to a judge's networks: on texts by a reward model or a second policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiltlm.judges.networks import LogRatio
from tiltlm.judges.settings import Judging
from tiltlm.models.causal import CausalLM
from tiltlm.models.ends import tokenizer_of
from tiltlm.models.hub import config_of
from tiltlm.models.reward_model import RewardModel
from tiltlm.seeds import Stream

ADAPTED = "all-linear"
"""The layers that adapters are put beside."""


def network_on_texts(how: Judging, body: str | Path, own: Stream, device: Any = "cpu") -> Any:
    """One member of a judge of texts, in evaluation mode. body: a language model's folder or hub name, or a reward model's;
    own: for first weights."""
    if how.kind == "dpo":
        return _log_ratio(how, body).to(device)
    seed = own.key & 0x7FFF_FFFF
    if is_reward_model(body):
        model = RewardModel.load(body, most_tokens=how.most_tokens)
    else:
        model = RewardModel.from_body(body, seed=seed, most_tokens=how.most_tokens)
    if how.lora_rank:
        own.seed_everything()
        _adapt(model.classifier.model, how.lora_rank, "SEQ_CLS")
    return model.to(device).eval()


def is_reward_model(name: str | Path) -> bool:
    """Whether a folder or hub name holds a sequence classifier (else a language model)."""
    return any("SequenceClassification" in each for each in config_of(name).architectures or ())


def _log_ratio(how: Judging, body: str | Path) -> LogRatio:
    base = CausalLM.load(body).requires_grad_(False)
    policy = CausalLM.load(body)
    policy.tokenizer = tokenizer_of(str(body))
    if how.lora_rank:
        policy = policy.with_lora(how.lora_rank, 4 * how.lora_rank)
        policy.tokenizer = tokenizer_of(str(body))
    return LogRatio(policy, base, how.dpo_beta, how.most_tokens).eval()


def _adapt(model: Any, rank: int, task: str) -> None:
    """Adapters beside every linear layer (the head stays trainable), in place; D2PO's alpha is four times the rank."""
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    get_peft_model(model, LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=ADAPTED, task_type=task))
