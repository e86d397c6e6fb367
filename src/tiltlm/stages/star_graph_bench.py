"""The bench that the star-graph stages and the task share: graphs as tokens, and networks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from tiltlm.data.star_graph import Graphs, generate, random_arms
from tiltlm.data.star_graph_tokens import BPETokenizer, GraphTokenizer, NumeralTokenizer
from tiltlm.data.star_graph_world import SPLITS, Split, World
from tiltlm.device import device_of
from tiltlm.experience import Experience, Generated, Offline
from tiltlm.models.causal import CausalLM
from tiltlm.models.hub import pretrained
from tiltlm.models.teacherless import Teacherless
from tiltlm.samples import Conditioned, Samples
from tiltlm.seeds import Stream, stream


@dataclass(frozen=True)
class Network:
    """The language model: by name, or a GPT-2 from scratch."""

    name: str = ""
    """A hub name or folder; empty: from scratch, with the sizes below."""

    tokenizer: str = ""
    """A hub name or folder; empty: one token per node."""

    layers: int = 3
    width: int = 64
    heads: int = 4
    mlp: int = 128
    """Width of the feed-forward layers."""

    activation: str = "relu"
    init_std: float = 0.08
    """Standard deviation of the first weights."""

    dropout: float = 0.0


@dataclass(frozen=True)
class Bench:
    """World, network, device and seed, and everything that is made of them."""

    world: World
    network: Network
    device_name: str
    seed: int

    @property
    def stream(self) -> Stream:
        return stream(self.seed, "star-graph")

    @property
    def device(self) -> torch.device:
        return device_of(self.device_name, "--task.device")

    @cached_property
    def tokenizer(self) -> GraphTokenizer:
        if not self.network.tokenizer:
            return NumeralTokenizer(self.world.graph)
        from transformers import AutoTokenizer

        return BPETokenizer(self.world.graph, pretrained(AutoTokenizer, self.network.tokenizer))

    @property
    def width(self) -> int:
        """Tokens of an answer."""
        return self.tokenizer.target_length

    # ---- graphs -----------------------------------------------------------------------------------------------

    def graphs(self, split: Split) -> Graphs:
        return self.world.graphs(split, self.stream)

    def all_graphs(self) -> dict[Split, Graphs]:
        """Every split that has graphs."""
        found = {split: self.graphs(split) for split in SPLITS}
        return {split: graphs for split, graphs in found.items() if len(graphs)}

    def prompts(self, graphs: Graphs) -> Conditioned:
        """The graphs as prompts, each with the tokens of its answer, on the network's device."""
        prompts, answers = (x.to(self.device) for x in self.tokenizer.encode(graphs))
        return Conditioned(prompts.ids, prompts.mask, answers)

    def pretraining(self, batch_size: int) -> Experience:
        """What the base model imitates, batch by batch."""
        own = self.stream.child("base", "data")
        if self.world.pretrain == 0 and not self.world.folder:
            return Generated(lambda s: self._imitation(generate(self.world.graph, batch_size, s.numpy()), s), own)
        return Offline(self._imitation(self.graphs("pretrain"), own), batch_size, own)

    def _imitation(self, graphs: Graphs, s: Stream) -> Samples:
        paths: np.ndarray = graphs.path
        if self.world.imitate == "random_arm":
            paths = random_arms(graphs, s.child("arm").numpy())
        completions = self.tokenizer.completions(paths)
        index = torch.arange(len(graphs))
        return Samples(self.tokenizer.prompts(graphs), index, completions.ids, completions.mask).to(self.device)

    # ---- networks -----------------------------------------------------------------------------------------------

    def fresh_network(self) -> CausalLM:
        """The network before any training here: the named one's weights, or new ones from the seed."""
        if self.network.name:
            return self.load(self.network.name)
        from transformers import GPT2Config

        n, rate = self.network, self.network.dropout
        config = GPT2Config(
            vocab_size=self.tokenizer.vocab_size, n_positions=self.tokenizer.prompt_length + self.width,
            n_layer=n.layers, n_embd=n.width, n_head=n.heads, n_inner=n.mlp, activation_function=n.activation,
            resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate, initializer_range=n.init_std,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return self._own(CausalLM.from_config(config, seed=self.stream.child("init").generator()).to(self.device))

    def load(self, name: str | Path) -> CausalLM:
        """The causal LM in a folder or of a hub name, with this world's tokenizer."""
        return self._own(CausalLM.load(name, device=self.device, eos_ids=()))

    def _own(self, model: CausalLM) -> CausalLM:
        """The model as this world speaks to it, with its tokenizer."""
        if self.world.teacherless:
            model = Teacherless(model.model, self.tokenizer.alphabet.dummy).train(model.training)
        model.tokenizer = self.tokenizer.hf
        return model
