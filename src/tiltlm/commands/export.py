"""`tiltlm export RUN --out FOLDER`: what a run trained as a plain model, with a card that says what it is.

The folder loads by AutoModelForCausalLM and AutoTokenizer, and serves as it stands (`vllm serve FOLDER`): adapters are
merged, and generation_config draws from the policy itself, nothing bent (do_sample, its temperature, no top-k, no top-p).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from tiltlm.commands.arguments import settings_from
from tiltlm.commands.card import card
from tiltlm.commands.models import dtype_called, load_run, new_folder
from tiltlm.commands.process import prepare
from tiltlm.models.causal import CausalLM
from tiltlm.progress import note
from tiltlm.run import Run

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Export:
    """Write a run's policy as a plain model with tokenizer and card; --push sends it to the hub."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of a finished run that trained a policy, or that measured one (then the card has its numbers)."""

    out: Path
    """The folder to write. It must not be there yet."""

    dtype: str = "float32"
    """Of the weights that are written: float32, bfloat16, float16, float64. Adapters are merged in float32."""

    push: str = ""
    """owner/name: send the folder to that repository of the Hugging Face hub, made private if it is new. The hub's own
    client logs in (`hf auth login`, $HF_TOKEN)."""


def export(args: list[str]) -> int:
    """Run the command."""
    settings = settings_from(args, Export, "export")
    aside, dtype = new_folder(settings.out), dtype_called(settings.dtype)
    if settings.push and not HUB_NAME.fullmatch(settings.push):
        raise ValueError(f"--push wants owner/name of a repository on the hub; got {settings.push!r}")
    prepare()
    run = load_run(Path(settings.run))
    weights = written(run, aside, dtype)
    (aside / "README.md").write_text(card(run, settings.push or settings.out.name), encoding="utf-8")
    aside.rename(settings.out)
    note(f"{settings.out}: a plain model with tokenizer and card, {weights:,} weights; vllm serve {settings.out}")
    if settings.push:
        pushed(settings.out, settings.push)
    return 0


def written(run: Run[Any], folder: Path, dtype: torch.dtype) -> int:
    """Write the run's policy to `folder`; how many weights it has. Raises ValueError where it has no plain one."""
    policy = run.recipe.decoder(run)
    if not isinstance(policy, CausalLM):
        raise ValueError(
            f"{run.folder} decodes with a {type(policy).__name__}, which is no plain transformers model: train one "
            "(--net.policy full or lora), or decode by tl.generate_with"
        )
    model: Any = policy.model if policy.adapters is None else policy.adapters.merge_and_unload(safe_merge=True)
    tokenizer, most_new = run.recipe.speech(run)
    model.to(dtype).generation_config.update(
        do_sample=True, temperature=policy.temperature, top_k=0, top_p=1.0, max_new_tokens=most_new,
        eos_token_id=list(policy.eos_ids) or None,
    )  # fmt: skip
    model.save_pretrained(str(folder))
    tokenizer = policy.tokenizer or tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    return int(model.num_parameters())


def pushed(folder: Path, name: str) -> None:
    """Send a folder to the hub."""
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(name, private=True, exist_ok=True)
    hub.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Exported by tiltlm")
    note(f"https://huggingface.co/{name}")
