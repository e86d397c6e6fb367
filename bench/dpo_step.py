"""One DPO update with a live reference: `Engine.update` against TRL's `DPOTrainer`.

The work: 16 pairs, 128 tokens a sequence (prompt 64, completion 64; chosen and rejected share the prompt); the
reference's forward pass, the policy's forward and backward pass, clipping to norm 1 and AdamW. Both sides start
from the same weights (the policy is a perturbed copy of the reference, so the loss is not just ln 2), see the
same ids, run in float32 without dropout and without gradient checkpointing, and write no logs. Each takes several
updates in a row; every loss of theirs must agree to 1e-4, or the script fails.

TRL's side is its own `training_step` (collator's batch in, loss computed, backward), then what its loop does
next: clip, step, zero the gradient. Its defaults bf16 and gradient checkpointing are switched off: the one would
change the numbers, the other would make it slower.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from tempfile import mkdtemp
from typing import Any

import torch

from common import LARGE, SMALL, Side, Size, Work, random_ids, ratio, run

PAIRS, PROMPT, COMPLETION = 16, 64, 64
BETA, LR, CLIP = 0.1, 1e-5, 1.0


@dataclass(frozen=True)
class Case:
    """A model's size and what is asked of us there: CPU-seconds and memory growth over the peer's."""

    size: Size
    cpu: str
    memory: str | None


CASES = {"6x384": Case(LARGE, "<=0.6", "<=0.55"), "4x128": Case(SMALL, "<=0.75", None)}


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


def ids(size: Size) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts, chosen and rejected completions."""
    prompts = random_ids(1, PAIRS, PROMPT, size.vocab)
    chosen, rejected = (random_ids(seed, PAIRS, COMPLETION, size.vocab) for seed in (2, 3))
    return prompts, chosen, rejected


def ours(case: Case) -> Work:
    from tiltlm.engine import Engine, Optim
    from tiltlm.experience import Offline, Referenced
    from tiltlm.models.causal import CausalLM
    from tiltlm.policies.dpo import DPO
    from tiltlm.samples import Pairs, Samples, Tokens
    from tiltlm.seeds import stream

    prompts, chosen, rejected = ids(case.size)
    sides = [
        Samples(Tokens.full(prompts), torch.arange(PAIRS), y, torch.ones_like(y, dtype=torch.bool))
        for y in (chosen, rejected)
    ]
    policy, reference = (CausalLM(network) for network in networks(case.size))
    experience = Referenced(Offline(Pairs(*sides), PAIRS, stream(0, "bench")), reference)
    engine = Engine(policy.train(), Optim(lr=LR, clip=CLIP))

    def work() -> float:
        return engine.update(DPO(BETA), experience.batch(0))["loss"]

    return work


def trl(case: Case) -> Work:
    trainer = _trainer(case.size)
    prompts, chosen, rejected = (x.tolist() for x in ids(case.size))
    batch = trainer.data_collator(
        [
            {"prompt_ids": prompt, "chosen_ids": better, "rejected_ids": worse}
            for prompt, better, worse in zip(prompts, chosen, rejected, strict=True)
        ]
    )
    optimizer = trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, optimizer)

    def work() -> float:
        loss = trainer.training_step(model, dict(batch))
        trainer.accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        model.zero_grad()
        return loss.item()

    return work


def _trainer(size: Size) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    policy, reference = networks(size)
    settings = DPOConfig(
        output_dir=mkdtemp(),
        beta=BETA,
        learning_rate=LR,
        weight_decay=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        max_length=None,
        per_device_train_batch_size=PAIRS,
    )
    rows = Dataset.from_list([{"prompt": "t1", "chosen": " t2", "rejected": " t3"}])
    trainer = DPOTrainer(policy, reference, settings, train_dataset=rows, processing_class=_words(size.vocab))
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _words(vocab: int) -> Any:
    """A tokenizer of `vocab` words, which the trainer wants to see and the measured step never calls."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0", eos_token="t0")


def report(case: str, found: dict[str, Side]) -> list[str]:
    mine, theirs = found["ours"], found["trl"]
    apart = max(abs(a - b) for a, b in zip(mine.results[0], theirs.results[0], strict=True))
    print(f"{case:9s} losses {[round(x, 5) for x in mine.results[0]]}, apart by at most {apart:.1e}")
    if not apart < 1e-4:
        raise SystemExit(f"not the same work: losses {mine.results[0]} and {theirs.results[0]}")
    print(f"{case:9s} total peak, libraries included: {mine.peak / theirs.peak:.2f} of the peer's")
    lines = [ratio(f"dpo-cpu-{case}", mine.cpu / theirs.cpu, CASES[case].cpu)]
    if CASES[case].memory is not None:
        lines.append(ratio(f"dpo-memory-{case}", mine.growth / theirs.growth, CASES[case].memory))
    return lines


if __name__ == "__main__":
    run(sys.modules[__name__], {"ours": ours, "trl": trl}, CASES, report, rounds=2)
