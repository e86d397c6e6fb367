"""A model trained by TRL's DPOTrainer on the very pairs that `dialogues/dpo` learns from, to be measured beside it.

    pip install -e '.[bench]'
    python bench/trl_folder.py --out trl-dpo      builds what dialogues/dpo needs, trains, and says how to measure

Both see the best and the worst of the same stored draws, with the same beta, learning rate, batch size and epochs; TRL's
order of the rows, its warm-up and its choice of the last checkpoint are its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tiltlm.commands.process import prepare, runs_root
from tiltlm.groups import best_and_worst
from tiltlm.recipes import recipe
from tiltlm.run import Run, ensure, find
from tiltlm.samples import Samples
from tiltlm.stages.sft import model_in


def rows(learn: Run[Any], problem: Any) -> list[dict[str, str]]:
    """The training pairs as texts."""
    from tiltlm.feeds import first_of

    label = learn.inputs["label"]
    groups = first_of(label.recipe.groups(label, problem, "train"), learn.recipe.feed.size)
    pairs = best_and_worst(groups)[0]
    asked, better = problem.encoder.texts(pairs.chosen)
    return [
        {"prompt": x, "chosen": c, "rejected": r}
        for x, c, r in zip(asked, better, texts(problem, pairs.rejected), strict=True)
    ]


def texts(problem: Any, samples: Samples) -> list[str]:
    found: list[str] = problem.encoder.texts(samples)[1]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("trl-dpo"))
    args = parser.parse_args()
    prepare()
    measured: Any = recipe("dialogues/dpo")
    run = ensure(measured, runs_root(), "python bench/trl_folder.py")
    learn = find(measured.learn(), runs_root())
    problem = learn.recipe.problem(learn)
    train(rows(learn, problem), model_in(learn.inputs["sft"]), learn.recipe, problem, args.out)
    print(f"tiltlm measure {run.folder} trl={args.out}")
    return 0


def train(data: list[dict[str, str]], start: Path, ours: Any, problem: Any, out: Path) -> None:
    """TRL's training, with the settings of `ours`."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(problem.reference.eos_ids[0])
    models = [AutoModelForCausalLM.from_pretrained(start) for _ in range(2)]
    config = trl.DPOConfig(
        output_dir=str(out), beta=ours.method.bound(problem.beta).beta, learning_rate=ours.fit.lr,
        per_device_train_batch_size=ours.fit.batch_size, num_train_epochs=ours.fit.epochs, lr_scheduler_type="cosine",
        adam_beta2=0.95, max_grad_norm=1.0, report_to="none", save_strategy="no", use_cpu=True, seed=0, bf16=False,
        gradient_checkpointing=False, logging_steps=50,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        models[0], models[1], args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model(str(out))


if __name__ == "__main__":
    sys.exit(main())
