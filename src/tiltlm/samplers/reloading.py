"""New weights for a vLLM server, from a folder that it can read.

Whole models go in place by its worker's `reload_weights` (POST /collective_rpc, served with VLLM_SERVER_DEV_MODE=1), and
the cache of prefixes, which belongs to the old weights, is emptied. Adapters go by POST /v1/load_lora_adapter
(VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora), under the name that completions are asked of.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tiltlm.samplers.server import Server


def reload(server: Server, folder: Path) -> None:
    """Make `server` draw from the model in `folder`. Raises ValueError, with what it answered, where it does not."""
    if (folder / "adapter_config.json").is_file():
        told(server, "/v1/load_lora_adapter", adapters(server, folder))
        return
    told(server, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
    if '"success":false' in told(server, "/reset_prefix_cache", {}).replace(" ", ""):
        raise ValueError(
            f"{server.posting.shown} did not empty its cache of prefixes, which belongs to the old weights: let it draw "
            "for this run alone"
        )


def adapters(server: Server, folder: Path) -> dict[str, Any]:
    """The body of the request for adapters."""
    if not server.how.model:
        raise ValueError(
            "the server is given adapters under a name of their own: name it (draw.model), and not as the model is called"
        )
    return {"lora_name": server.how.model, "lora_path": str(folder), "load_inplace": True}


def told(server: Server, path: str, body: dict[str, Any]) -> str:
    """Send an order; what was answered. Raises ValueError where the server does not do it."""
    root = server.how.url.rstrip("/").removesuffix("/v1")
    posting = replace(server.posting, url=root + path)
    with posting.client() as client:
        return posting.tell(client, body)
