"""What bfloat16 means here.

torch's autocast: matrix products of float32 weights are made in 16 bits and added up in float32; residuals, norms and
softmaxes are float32, and weights stay as they are. On a CPU attention is float32, too: its kernels for 16 bits take
longer, backward about twice as long.

Checkpointed layers are computed again in the backward pass, which knows nothing of that: their attention stays in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from tiltlm.models.body import recomputes

Precision = Literal["float32", "bfloat16"]


def autocast(device: torch.device, precision: str, keeps: bool = True) -> torch.autocast:
    """Within, matrix products are made in `precision`; keeps: rounded copies of trained weights stay for later products."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=keeps)


def wide_attention(model: nn.Module, device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Within, attention in half precision is computed in float32, where `model` would gain by it and can."""
    gains = precision == "bfloat16" and device.type == "cpu" and not recomputes(model)
    return _WideAttention() if gains else nullcontext()


@contextmanager
def computing_in(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Both: to score what is trained, to draw from it, or to compare with it."""
    with (
        wide_attention(model, device, precision),
        autocast(device, precision, keeps=False),
    ):  # a pass uses a weight once
        yield


class _WideAttention(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is not scaled_dot_product_attention:
            return func(*args, **given)
        query, key = (args[k] if k < len(args) else given[name] for k, name in enumerate(("query", "key")))
        dtype = torch.promote_types(query.dtype, key.dtype)
        wide = [_wide(x) for x in args], {name: _wide(x) for name, x in given.items()}
        with torch.autocast("cpu", enabled=False):
            return func(*wide[0], **wide[1]).to(dtype)


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x
