"""LoRA (Hu et al. 2021, arXiv:2106.09685): adapters beside linear layers, W x + (alpha / rank) B A x."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tiltlm.jsonl import read_json
from tiltlm.models.merging import CONFIG, WEIGHTS
from tiltlm.models.scattered import shaped
from tiltlm.models.weights import put
from tiltlm.tensors import load_tensors

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

EVERY = "all-linear"
"""PEFT's word for every linear layer but the output head."""


def adapted(model: PreTrainedModel, rank: int, alpha: float, dropout: float, **options: Any) -> PeftModel:
    """New adapters in `model`, in place; its own weights are frozen.

    options: PEFT's; of these, target_modules are the layers (None: those that PEFT takes for such a network). Raises
    ValueError for layers that the model does not have, and where PEFT knows none.
    """
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    _refuse_unknown(model, options.get("target_modules"))
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]
    with shaped(model):  # some layers are asked for their weight's shape
        return get_peft_model(model, config)


def restore(adapters: PeftModel, folder: str | Path, device: torch.device) -> None:
    """Take the adapters' weights that were saved to `folder`, bit by bit.

    Raises ValueError for adapters of another rank or alpha, or beside other layers.
    """
    from peft import get_peft_model_state_dict

    saved, own = read_json(Path(folder) / CONFIG), adapters.peft_config["default"]
    for name in ("r", "lora_alpha"):
        if saved[name] != getattr(own, name):
            raise ValueError(
                f"the adapters in {folder} have {name} {saved[name]}, this model's {getattr(own, name)}"
            )
    there, found = get_peft_model_state_dict(adapters), load_tensors(Path(folder) / WEIGHTS, device)
    if other := sorted(there.keys() ^ found.keys()):
        raise ValueError(f"the adapters in {folder} stand beside other layers than this model's: {other[0]}")
    put(there, found)


def _refuse_unknown(model: PreTrainedModel, layers: Any) -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind, there = model.config.model_type, _linear(model)
    short = ", ".join(sorted({name.rpartition(".")[2] for name in there}))
    if layers is None and kind not in KNOWN:
        raise ValueError(f"PEFT names no layers for adapters in a {kind}: name some of {short}, or take {EVERY}")
    for layer in () if layers is None or isinstance(layers, str) else layers:
        if not any(f".{name}".endswith(f".{layer}") for name in there):
            raise ValueError(
                f"no linear layer of the body is called {layer!r}: name some of {short}, or take {EVERY}"
            )


def _linear(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers, less the output head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [name for name, x in model.named_modules() if isinstance(x, nn.Linear | Conv1D) and x is not head]
