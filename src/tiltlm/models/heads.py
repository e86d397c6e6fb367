"""`ValueHead`: numbers per prefix on a causal LM's body, V-type or Q-type.

- **V-type** (`per_token=False`): a head of A outputs read at the position of the token being judged; K
  candidates cost one forward over K masked candidates.
- **Q-type** (`per_token=True`): a head of V·A outputs read at the prefix, entry v judging token v; all V
  candidates cost nothing beyond the prefix's own forward.

The head is linear, or an MLP with ReLU. Its last layer starts at zero, so a fresh value is 0 everywhere and
guides nothing. The body is a `CausalLM`, given as a copy (trained), shared, or frozen; it keeps its own output
head, so a language-modelling loss can be taken from the same forward pass.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tiltlm.models.backbone import BackboneState, hidden_of
from tiltlm.models.base import Values
from tiltlm.models.causal import CausalLM
from tiltlm.samples import Samples, Tokens


class ValueHead(Values):
    """A values of width A on `body`.

    Args: `width` = A; `per_token` = Q-type; `mlp_layers` hidden ReLU layers of the body's width (0: linear);
    `frozen` keeps the body's parameters out of training.
    """

    def __init__(
        self,
        body: CausalLM,
        *,
        width: int = 1,
        per_token: bool = False,
        mlp_layers: int = 0,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.body, self.width, self.per_token = body, width, per_token
        self.mlp_layers, self.frozen = mlp_layers, frozen
        size = body.head.weight.shape[1]
        layers: list[nn.Module] = []
        for _ in range(mlp_layers):
            layers += [nn.Linear(size, size), nn.ReLU()]
        out = nn.Linear(size, width * (body.vocab_size if per_token else 1))
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.head = nn.Sequential(*layers, out).to(device=body.device, dtype=body.model.dtype)
        if frozen:
            body.requires_grad_(False)

    def start(self, prompts: Tokens, capacity: int) -> ValueHeadState:
        return ValueHeadState(self, BackboneState(self.body.model, prompts, capacity))

    def values(self, samples: Samples) -> Tensor:
        return self.values_of_hidden(hidden_of(self.body.model, samples), samples)

    def values_of_hidden(self, states: Tensor, samples: Samples) -> Tensor:
        """`values` from the hidden states [N, L, D] of `samples.sequences()`."""
        rows, columns, place = samples.places(before=self.per_token)
        out = self.head(states[rows, place])
        if self.per_token:
            tokens = samples.tokens[rows, columns]
            out = out.unflatten(1, (-1, self.width))[torch.arange(len(out), device=out.device), tokens]
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return out.new_zeros(*samples.mask.shape, self.width).index_put((rows, columns), out)

    def values_and_log_prob(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Values [N, T, A] and the body's own log-probabilities [N, T], from one forward pass."""
        states = hidden_of(self.body.model, samples)
        return self.values_of_hidden(states, samples), self.body.log_prob_of_hidden(states, samples)

    def save(self, folder: str | Path) -> None:
        """Write body (`from_pretrained` folder), head.safetensors and head.json into `folder`."""
        self.body.save(folder)
        save_file(
            {name: x.detach().cpu().contiguous() for name, x in self.head.state_dict().items()},
            str(Path(folder) / "head.safetensors"),
        )
        shape = {"width": self.width, "per_token": self.per_token, "mlp_layers": self.mlp_layers}
        (Path(folder) / "head.json").write_text(json.dumps(shape))

    def restore(self, folder: str | Path) -> None:
        """Take the weights that `save` wrote to `folder` into this model, bit by bit."""
        self.body.restore(folder)
        self.head.load_state_dict(load_file(str(Path(folder) / "head.safetensors"), device=str(self.body.device)))

    @staticmethod
    def load(
        folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> ValueHead:
        """Read what `save` wrote."""
        body = CausalLM.load(folder, dtype=dtype, device=device)
        value = ValueHead(body, **json.loads((Path(folder) / "head.json").read_text()))
        value.head.load_state_dict(load_file(str(Path(folder) / "head.safetensors"), device=str(device)))
        return value.eval()


class ValueHeadState:
    """The decoding state of a `ValueHead`."""

    def __init__(self, model: ValueHead, state: BackboneState) -> None:
        self.model, self.state = model, state

    def peek(self, candidates: Tensor) -> Tensor:
        width = self.model.width
        if not self.model.per_token:
            return self.model.head(self.state.peek(candidates))
        rows = self.model.head(self.state.last).unflatten(1, (-1, width))  # [N, V, A]
        return rows.gather(1, candidates[:, :, None].expand(-1, -1, width))

    def append(self, tokens: Tensor) -> None:
        self.state.append(tokens)

    def select(self, index: Tensor) -> None:
        self.state.select(index)
