"""A Hugging Face network below its output head: which part that is, how it is called, and what it may be trusted with.

Not every body takes the same arguments: some number positions themselves and take none, some keep no cache. Its
signature says so and is read here, once a class; everything else calls `run_body` and need not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

SCATTERED = "tiltlm_scattered"
"""The attribute of a network whose layers are scattered (`scattered`): it runs once for a batch, whatever its rows."""


@dataclass(frozen=True)
class Trust:
    """Which ways of running a body give what one plain forward pass of a single row gives; see `selftest.py`.

    positions  position ids may be passed (else the network numbers positions itself)
    padding    right-padded rows are as those rows alone (else rows of one length are run together)
    cache      keys and values kept from step to step are (else every step runs the whole prefix)
    peek       several candidates behind one prefix in one pass are (else each gets a row)
    sharing    prompts run once for several rows are
    reach      tokens of a row, padding included, up to which the last three hold (None: any number)
    why        what went wrong where the cache is not trusted
    refused    why the network cannot be used at all; empty where it can
    """

    positions: bool = True
    padding: bool = True
    cache: bool = True
    peek: bool = True
    sharing: bool = True
    reach: int | None = None
    why: str = ""
    refused: str = ""

    def caches(self, width: int) -> bool:
        """Whether rows of `width` tokens may be run with a cache."""
        return self.cache and (self.reach is None or width <= self.reach)


def trust_of(model: PreTrainedModel) -> Trust:
    """What the self-test found; copies of a model carry it with them. Untested models are trusted."""
    found = vars(model).get("tiltlm_trust")
    trust = found if isinstance(found, Trust) else Trust()
    return replace(trust, sharing=False) if SCATTERED in vars(model) else trust


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a network's body: its longest list of modules, none that lies within another (experts, say)."""
    lists = {name: x for name, x in body_of(model).named_modules() if isinstance(x, nn.ModuleList)}
    outer = [x for name, x in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return list(max(outer, key=len, default=()))


def recomputes(model: nn.Module) -> bool:
    """Whether the backward pass of training computes layers again (checkpointing) instead of keeping what they made."""
    return model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def body_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM below its output head."""
    body = model.base_model  # by the prefix of its class; some classes name a part that they do not have
    if body is not model:
        return body
    from transformers import PreTrainedModel

    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)


@cache
def _taken(forward: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The names of the arguments that `forward` takes, and whether it takes any others as well."""
    parameters = inspect.signature(forward).parameters
    return frozenset(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def call(module: nn.Module, **arguments: Any) -> Any:
    """`module` called with those of `arguments` that are not None and that its forward takes."""
    names, others = _taken(type(module).forward)
    return module(**{k: v for k, v in arguments.items() if v is not None and (others or k in names)})


def run_body(
    body: nn.Module,
    ids: Tensor,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden states [N, L, D]; `cache`, where given, is read and written."""
    output = call(
        body,
        input_ids=ids,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state


def attention_window(config: Any) -> int | None:
    """The narrowest attention window of any layer, in tokens, or None where every layer sees everything."""
    config = config.get_text_config()
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's name for it
        return int(config.window_size)
    if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
        return int(config.sliding_window)
    return None


def most_positions(model: PreTrainedModel) -> int | None:
    """The longest row that the network has positions for, or None where it says nothing."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit is not None and limit > 0 else None
