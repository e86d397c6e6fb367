"""A network of its configuration alone, made on torch's `meta` device, then put on tensors without numbers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tiltlm.models import lora
from tiltlm.models.backbone import fuse_activations
from tiltlm.models.body import body_of


@dataclass(frozen=True)
class Adapters:
    """LoRA, as `--net.lora-rank` and `--net.lora-modules` say it (None: PEFT's choice of layers)."""

    rank: int = 8
    modules: str | tuple[str, ...] | None = None


def made(config: Any, language: bool, adapters: Adapters | None) -> Any:
    """The network on the `meta` device."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForCausalLM if language else AutoModelForSequenceClassification
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's about some families' layers, which real adapters give again
        model = kind.from_config(config, dtype=torch.float32).eval()
        fuse_activations(model)
        if adapters is not None and language:
            lora.adapted(model, adapters.rank, adapters.rank, 0.0, target_modules=adapters.modules)
        elif adapters is not None:  # a judge's, whose head is trained as it is
            from peft import LoraConfig, get_peft_model

            chosen: Any = adapters.modules
            get_peft_model(body_of(model), LoraConfig(r=adapters.rank, target_modules=chosen))
    return model


def unnumbered(model: nn.Module, mode: FakeTensorMode) -> list[Tensor]:
    """Put tensors of a CPU that have no numbers in the place of those of no device, gradients with them; returns all."""
    found: dict[int, Tensor] = {}

    def fresh(x: Tensor) -> Tensor:
        if id(x) not in found:
            new = torch.empty(x.shape, dtype=x.dtype, device="cpu")
            if isinstance(x, nn.Parameter):
                new = nn.Parameter(new, requires_grad=x.requires_grad)
                if x.requires_grad:
                    new.grad = torch.empty_like(new)
            found[id(x)] = new
        return found[id(x)]

    with mode:
        for module in list(model.modules()):
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            for store in stores:
                store.update({name: fresh(x) for name, x in store.items() if isinstance(x, Tensor)})
    return [*found.values(), *(x.grad for x in found.values() if x.grad is not None)]
