"""Adapters merged into the model that they were trained beside: a folder like any other.

Language models and classifiers (reward models) alike; a head that was trained with the adapters comes along. Weights are
read from safetensors alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tiltlm.models.folders import located
from tiltlm.models.hub import pretrained
from tiltlm.tensors import load_tensors

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Merged:
    """A plain model, and the tokenizer that belongs to it."""

    model: PreTrainedModel
    tokenizer: Any

    def save(self, folder: Path) -> None:
        """Write a folder that `from_pretrained` reads, tokenizer included."""
        self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))


def merged(name: str | Path, base: str = "", dtype: torch.dtype = torch.float32) -> Merged:
    """The adapters of a folder, or of a run that trained some, in the model that they belong to.

    base: that model (folder, hub name or run); empty: the one that the adapters' own settings name. dtype: of the weights,
    while they are added up and afterwards. Raises ValueError where there are no adapters, or they do not fit the model.
    """
    folder = adapters_of(name)
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    config = PeftConfig.from_pretrained(str(folder))
    base = base or str(config.base_model_name_or_path or "")
    if not base:
        raise ValueError(
            f"{folder}/{CONFIG} does not say which model its adapters belong to: name it, --base MODEL"
        )
    model = base_of(folder, config, base, dtype)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), config=config)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the adapters of {folder} do not fit {base}: {str(error).strip().splitlines()[-1]}"
        ) from None
    own = (folder / "tokenizer_config.json").is_file()
    return Merged(adapted.merge_and_unload(safe_merge=True), pretrained(AutoTokenizer, folder if own else base))


def adapters_of(name: str | Path) -> Path:
    """The folder with the adapters that `name`, a folder or a run, stands for. Raises ValueError where it has none."""
    folder = Path(located(name))
    if not folder.is_dir():
        raise ValueError(
            f"{name} is no folder: adapters are merged from a folder, or from a run that trained some"
        )
    missing = [each for each in (CONFIG, WEIGHTS) if not (folder / each).is_file()]
    if missing:
        raise ValueError(f"{name} holds no adapters to merge: {folder} has no {' and no '.join(missing)}")
    return folder


def base_of(folder: Path, config: PeftConfig, base: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its adapters; a classifier's with as many outputs as the head trained beside them has."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if config.task_type != "SEQ_CLS":
        model: PreTrainedModel = pretrained(AutoModelForCausalLM, base, dtype=dtype)
        return model
    heads = [x for name, x in load_tensors(folder / WEIGHTS, "cpu").items() if name.endswith("score.weight")]
    labels = {"num_labels": len(heads[0])} if heads else {}
    model = pretrained(AutoModelForSequenceClassification, base, dtype=dtype, **labels)
    return model
