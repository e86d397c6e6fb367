"""One training step of each kind: `Engine.update` against the trainers of TRL.

    sft      maximum likelihood of 16 completions           SFTTrainer, completion_only_loss
    reward   a reward model on 16 pairs, BradleyTerry       RewardTrainer
    dpo      DPO on 16 pairs with a live reference          DPOTrainer
    exo      EXO on the same pairs, labels smoothed         DPOTrainer, loss_type exo_pair

The work: 128 tokens a sequence (prompt 64, completion 64; chosen and rejected share the prompt); for dpo and exo the
reference's forward pass; forward and backward pass of the trained network, clipping to norm 1 and AdamW. Both sides
start from the same weights (the policy is a perturbed copy of the reference, so the loss is not just ln 2), see the
same ids, run in float32 without dropout and without gradient checkpointing, and write no logs. Each takes several
updates in a row; every loss of theirs must agree to 1e-4, or the script fails.

TRL's side is its own `training_step` (collator's batch in, loss computed, backward), then what its loop does
next: clip, step, zero the gradient. Its defaults bf16 and gradient checkpointing are switched off: the one would
change the numbers, the other would make it slower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import mkdtemp
from typing import Any

import torch

from common import LARGE, SMALL, Side, Size, Work, random_ids, ratio, run

ROWS, PROMPT, COMPLETION = 16, 64, 64
BETA, EPSILON, LR, CLIP = 0.1, 1e-3, 1e-5, 1.0


@dataclass(frozen=True)
class Case:
    """Both sides of a kind of step, a model's size, and what is asked of us: CPU-seconds and memory growth over the
    peer's."""

    ours: Callable[[Size], Work]
    trl: Callable[[Size], Work]
    size: Size
    cpu: str
    memory: str | None = None


def networks(size: Size) -> tuple[Any, Any]:
    """Policy and reference: the same random network, the policy with noise on every weight."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    reference = GPT2LMHeadModel(size.config()).eval()
    policy = GPT2LMHeadModel(size.config())
    policy.load_state_dict(reference.state_dict())
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.01 * torch.randn(p.shape)
    return policy, reference


def scorer(size: Size) -> Any:
    """A random reward model whose rewards differ by about one."""
    from transformers import GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = size.config()
    config.num_labels = 1
    network = GPT2ForSequenceClassification(config)
    torch.nn.init.normal_(network.score.weight, std=size.width**-0.5)
    return network


def ids(size: Size) -> list[torch.Tensor]:
    """Prompts, chosen and rejected completions, [16, 64] each, without the padding token 0."""
    return [
        1 + random_ids(seed, ROWS, width, size.vocab - 1) for seed, width in enumerate((PROMPT, *2 * [COMPLETION]))
    ]


def samples(size: Size) -> tuple[Any, Any]:
    """Chosen and rejected completions as `Samples` of the same prompts."""
    from tiltlm.samples import Samples, Tokens

    prompts, *completions = ids(size)
    asked, index = Tokens.full(prompts), torch.arange(ROWS)
    chosen, rejected = (Samples(asked, index, y, torch.ones_like(y, dtype=torch.bool)) for y in completions)
    return chosen, rejected


def updates(model: Any, objective: Any, batch: Callable[[], Any]) -> Work:
    """An update of `model` on `batch()`."""
    from tiltlm.engine import Engine, Optim

    engine = Engine(model.train(), Optim(lr=LR, clip=CLIP))
    return lambda: engine.update(objective, batch())["loss"]


def our_sft(size: Size) -> Work:
    from tiltlm.models.causal import CausalLM
    from tiltlm.policies.sft import SFT

    chosen, _ = samples(size)
    return updates(CausalLM(networks(size)[0]), SFT(), lambda: chosen)


def our_reward(size: Size) -> Work:
    from tiltlm.models.reward_model import RewardModel
    from tiltlm.rewards.bradley_terry import BradleyTerry, Comparisons
    from tiltlm.samples import Pairs

    batch = Comparisons(Pairs(*samples(size)), torch.zeros(ROWS))
    return updates(RewardModel(scorer(size), words(size.vocab)), BradleyTerry(), lambda: batch)


def our_dpo(size: Size) -> Work:
    from tiltlm.policies.dpo import DPO

    return our_pairs(size, DPO(BETA))


def our_exo(size: Size) -> Work:
    from tiltlm.policies.exo_pref import ExoPref

    return our_pairs(size, ExoPref(BETA, EPSILON))


def our_pairs(size: Size, objective: Any) -> Work:
    from tiltlm.experience import Offline, Referenced
    from tiltlm.models.causal import CausalLM
    from tiltlm.samples import Pairs
    from tiltlm.seeds import stream

    policy, reference = (CausalLM(network) for network in networks(size))
    experience = Referenced(Offline(Pairs(*samples(size)), ROWS, stream(0, "bench")), reference)
    return updates(policy, objective, lambda: experience.batch(0))


def trl_sft(size: Size) -> Work:
    from trl import SFTConfig, SFTTrainer

    prompts, completions, _ = (x.tolist() for x in ids(size))
    rows = [{"input_ids": x + y, "labels": [-100] * PROMPT + y} for x, y in zip(prompts, completions, strict=True)]
    text = {"prompt": "t1", "completion": " t2"}
    settings = SFTConfig(**SHARED, output_dir=mkdtemp(), completion_only_loss=True)
    return steps(trainer(SFTTrainer, settings, size, text, networks(size)[0]), rows)


def trl_reward(size: Size) -> Work:
    from trl import RewardConfig, RewardTrainer

    rows = [
        {"chosen_ids": x + better, "rejected_ids": x + worse}
        for x, better, worse in zip(*(x.tolist() for x in ids(size)), strict=True)
    ]
    settings = RewardConfig(**SHARED, output_dir=mkdtemp())
    return steps(trainer(RewardTrainer, settings, size, PAIR_OF_TEXTS, scorer(size)), rows)


def trl_dpo(size: Size) -> Work:
    return trl_pairs(size, loss_type="sigmoid")


def trl_exo(size: Size) -> Work:
    return trl_pairs(size, loss_type="exo_pair", label_smoothing=EPSILON)


def trl_pairs(size: Size, **loss: Any) -> Work:
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt_ids": x, "chosen_ids": better, "rejected_ids": worse}
        for x, better, worse in zip(*(x.tolist() for x in ids(size)), strict=True)
    ]
    settings = DPOConfig(**SHARED, output_dir=mkdtemp(), beta=BETA, **loss)
    return steps(trainer(DPOTrainer, settings, size, PAIR_OF_TEXTS, *networks(size)), rows)


SHARED: dict[str, Any] = {
    "learning_rate": LR,
    "weight_decay": 0.0,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": [],
    "max_length": None,
    "per_device_train_batch_size": ROWS,
}
"""Settings of every TRL trainer."""

PAIR_OF_TEXTS = {"prompt": "t1", "chosen": " t2", "rejected": " t3"}


def trainer(kind: Any, settings: Any, size: Size, text: dict[str, str], *models: Any) -> Any:
    """A TRL trainer; it wants a data set at birth, which the measured step never sees."""
    from datasets import Dataset

    rows = Dataset.from_list([text])
    return kind(*models, args=settings, train_dataset=rows, processing_class=words(size.vocab))


def steps(trainer: Any, rows: list[dict[str, Any]]) -> Work:
    """A training step on `rows`, already tokenized."""
    batch, optimizer = trainer.data_collator(rows), trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, optimizer)
    trainer.current_gradient_accumulation_steps = 1

    def work() -> float:
        loss = trainer.training_step(model, dict(batch))
        trainer.accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        model.zero_grad()
        return loss.item()

    return work


def words(vocab: int) -> Any:
    """A tokenizer of `vocab` words, which constructors want to see and the measured step never calls."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0", eos_token="t0")


def report(case: str, found: dict[str, Side]) -> list[str]:
    mine, theirs, asked = found["ours"], found["trl"], CASES[case]
    apart = max(abs(a - b) for a, b in zip(mine.results[0], theirs.results[0], strict=True))
    print(f"{case:12s} losses {[round(x, 5) for x in mine.results[0]]}, apart by at most {apart:.1e}")
    if not apart < 1e-4:
        raise SystemExit(f"{case}: not the same work: losses {mine.results[0]} and {theirs.results[0]}")
    print(f"{case:12s} total peak, libraries included: {mine.peak / theirs.peak:.2f} of the peer's")
    kind, size = case.split("-")
    lines = [ratio(f"{kind}-cpu-{size}", mine.cpu / theirs.cpu, asked.cpu)]
    if asked.memory is not None:
        lines.append(ratio(f"{kind}-memory-{size}", mine.growth / theirs.growth, asked.memory))
    return lines


CASES = {
    "sft-6x384": Case(our_sft, trl_sft, LARGE, "<=0.6", "<=0.55"),
    "reward-6x384": Case(our_reward, trl_reward, LARGE, "<=0.8"),
    "dpo-6x384": Case(our_dpo, trl_dpo, LARGE, "<=0.6", "<=0.55"),
    "exo-6x384": Case(our_exo, trl_exo, LARGE, "<=0.6", "<=0.55"),
    "dpo-4x128": Case(our_dpo, trl_dpo, SMALL, "<=0.75"),
}

SIDES = {"ours": lambda case: case.ours(case.size), "trl": lambda case: case.trl(case.size)}

if __name__ == "__main__":
    run(sys.modules[__name__], SIDES, CASES, report, rounds=2)
