"""`ValueHead`: numbers per prefix on a causal LM's body, V-type or Q-type.

- **V-type** (`per_token=False`): a head of A outputs read at the position of the token being judged; K
  candidates cost one forward over K masked candidates.
- **Q-type** (`per_token=True`): a head of V·A outputs read at the prefix, entry v judging token v; all V
  candidates cost nothing beyond the prefix's own forward. While training, only the rows of the head that belong
  to the drawn tokens are used: h·W[s] + b[s].

The head is linear, or an MLP with ReLU. Its last layer starts at zero, so a fresh value is 0 everywhere and
guides nothing. The body is a `CausalLM`, given as a copy (trained), shared, or frozen; it keeps its own output
head, so a language-modelling loss can be taken from the same forward pass.

A head may read the *condition* that a prompt carries (`samples.Conditioned`): the condition by itself is run
through the body, and its last state is laid beside every state of the prefix ("tokens"); or it is one class of
C, laid beside as a one-hot vector ("class").
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from tiltlm.jsonl import read_json
from tiltlm.models.backbone import BodyState, hidden, hidden_of
from tiltlm.models.base import LanguageModel, Values
from tiltlm.models.causal import CausalLM
from tiltlm.models.output import head_logits
from tiltlm.models.prefixes import body_state
from tiltlm.models.scoring import head_log_prob
from tiltlm.models.weights import load_state, save_state
from tiltlm.samples import Samples, Tokens, conditions_of
from tiltlm.tensors import load_tensors

Reads = Literal["nothing", "tokens", "class"]


class ValueHead(Values):
    """A values of width A on `body`.

    Args: `width` = A; `per_token` = Q-type; `mlp_layers` hidden ReLU layers (0: linear) of `mlp_factor` times the
    width of what the head reads; `frozen` keeps the body's parameters out of training; `reads` what it takes from
    the prompts' conditions, `classes` how many there are.
    """

    def __init__(
        self,
        body: CausalLM,
        *,
        width: int = 1,
        per_token: bool = False,
        mlp_layers: int = 0,
        mlp_factor: int = 1,
        frozen: bool = False,
        reads: Reads = "nothing",
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.body, self.width, self.per_token, self.frozen = body, width, per_token, frozen
        self.shape = {"mlp_layers": mlp_layers, "mlp_factor": mlp_factor, "reads": reads, "classes": classes}
        self.reads, self.classes = reads, classes
        size = body.head.weight.shape[1]
        inside = size + {"nothing": 0, "tokens": size, "class": classes}[reads]
        sizes = [inside] + [mlp_factor * inside] * mlp_layers
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        out = nn.Linear(sizes[-1], width * (body.vocab_size if per_token else 1))
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.head = nn.Sequential(*layers, out).to(device=body.device, dtype=body.model.dtype)
        if frozen:
            body.requires_grad_(False)

    def train(self, mode: bool = True) -> ValueHead:
        """As ever, but a frozen body stays as it is: it may be the reference itself, whose dropout must stay off."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self

    @property
    def out(self) -> nn.Linear:
        """The head's last layer."""
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        return last

    def start(self, prompts: Tokens, capacity: int) -> ValueHeadState:
        condition = self.condition(prompts)
        return ValueHeadState(self, body_state(self.body.model, prompts, capacity), condition)

    def condition(self, prompts: Tokens) -> Tensor | None:
        """What the head reads of every prompt's condition, [P, D'], or None."""
        if self.reads == "nothing":
            return None
        conditions = conditions_of(prompts)
        if self.reads == "class":
            if conditions.ids.shape[1] != 1 or int(conditions.ids.max()) >= self.classes:
                raise ValueError(
                    f"a condition must be one class below {self.classes}; got {conditions.lists()[:3]}"
                )
            one_hot = torch.nn.functional.one_hot(conditions.ids[:, 0], self.classes)
            return one_hot.to(self.out.weight.dtype)
        states = hidden(self.body.model, conditions)
        return states[torch.arange(len(states), device=states.device), conditions.lengths - 1]

    def before_out(self, states: Tensor, condition: Tensor | None) -> Tensor:
        """What the last layer reads, from hidden states [M, D] and conditions [M, D']."""
        read = states if condition is None else torch.cat([states, condition], -1)
        return self.head[:-1](read)

    def values(self, samples: Samples) -> Tensor:
        return self.values_of_hidden(hidden_of(self.body.model, samples), samples)

    def values_of_hidden(self, states: Tensor, samples: Samples, before: bool | None = None) -> Tensor:
        """`values` from the hidden states [N, L, D] of `samples.sequences()`.

        before: read in front of each token (default: where the head is Q-type).
        """
        rows, columns, place = samples.places(before=self.per_token if before is None else before)
        read = self.before_out(states[rows, place], self._condition_of(rows, samples))
        if self.per_token:
            tokens = samples.tokens[rows, columns]
            weight = nn.functional.embedding(tokens, self.out.weight.unflatten(0, (-1, self.width)).flatten(1))
            out = (read[:, None] * weight.unflatten(1, (self.width, -1))).sum(-1)
            out = out + self.out.bias.unflatten(0, (-1, self.width))[tokens]
        else:
            out = self.out(read)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        return out.new_zeros(*samples.mask.shape, self.width).index_put((rows, columns), out)

    def values_before(self, samples: Samples) -> Tensor:
        """V-type values of the prefix *in front of* every token, [N, T, A], 0 at padding: a critic's V(y_<t)."""
        if self.per_token:
            raise ValueError("a Q-type head judges tokens; values_before needs a V-type head (per_token=False)")
        return self.values_of_hidden(hidden_of(self.body.model, samples), samples, before=True)

    def _condition_of(self, rows: Tensor, samples: Samples) -> Tensor | None:
        condition = self.condition(samples.prompts)
        return None if condition is None else condition[samples.prompt_index[rows]]

    def values_and_log_prob(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Values [N, T, A] and the body's own log-probabilities [N, T], from one forward pass."""
        states = hidden_of(self.body.model, samples)
        return self.values_of_hidden(states, samples), self.body.log_prob_of_hidden(states, samples)

    def tilted_log_prob(self, reference: LanguageModel, samples: Samples) -> Tensor:
        """See `Values`; for a Q-type head over a `CausalLM` both logits are made tile by tile, in one pass."""
        if not (self.per_token and self.width == 1 and type(reference) is CausalLM):
            return super().tilted_log_prob(reference, samples)
        own = hidden_of(self.body.model, samples)
        with torch.no_grad():
            theirs = own if self.body.model is reference.model else hidden_of(reference.model, samples)
        rows, columns, before = samples.places(before=True)
        read = self.before_out(own[rows, before], self._condition_of(rows, samples))
        log_q = head_log_prob(read, self.out, samples.tokens[rows, columns], reference.fixed(theirs[rows, before]))
        return log_q.new_zeros(samples.mask.shape).index_put((rows, columns), log_q)

    def save(self, folder: str | Path) -> None:
        """Write body (`from_pretrained` folder), head.safetensors and head.json into `folder`."""
        self.body.save(folder)
        save_state(self.head, Path(folder) / "head.safetensors")
        shape = {"width": self.width, "per_token": self.per_token, **self.shape}
        (Path(folder) / "head.json").write_text(json.dumps(shape), encoding="utf-8")

    def restore(self, folder: str | Path) -> None:
        """Take the weights that `save` wrote to `folder` into this model, bit by bit."""
        self.body.restore(folder)
        load_state(self.head, lambda: load_tensors(Path(folder) / "head.safetensors", self.body.device))

    @staticmethod
    def load(
        folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> ValueHead:
        """Read what `save` wrote."""
        body = CausalLM.load(folder, dtype=dtype, device=device, eos_ids=())
        value = ValueHead(body, **read_json(Path(folder) / "head.json"))
        value.head.load_state_dict(load_tensors(Path(folder) / "head.safetensors", device))
        return value.eval()


class ValueHeadState:
    """The decoding state of a `ValueHead`."""

    def __init__(self, model: ValueHead, state: BodyState, condition: Tensor | None) -> None:
        self.model, self.state, self.condition = model, state, condition

    def peek(self, candidates: Tensor | None) -> Tensor:
        model, width = self.model, self.model.width
        if not model.per_token:
            return self._peek_behind(candidates)
        rows = head_logits(model.before_out(self.state.last, self.condition), model.out).unflatten(1, (-1, width))
        if candidates is None:
            return rows
        return rows.gather(1, candidates[:, :, None].expand(-1, -1, width))

    def _peek_behind(self, candidates: Tensor | None) -> Tensor:
        """Values of a V-type head, read behind every candidate."""
        n, size = len(self.state.lengths), self.model.body.vocab_size
        if candidates is None:
            candidates = torch.arange(size, device=self.state.last.device).expand(n, size)
        states, condition = self.state.peek(candidates), self.condition
        if condition is not None:
            condition = condition[:, None].expand(-1, states.shape[1], -1)
        return self.model.out(self.model.before_out(states, condition))

    def append(self, tokens: Tensor) -> None:
        self.state.append(tokens)

    def select(self, index: Tensor) -> None:
        self.state.select(index)
        self.condition = None if self.condition is None else self.condition[index]
