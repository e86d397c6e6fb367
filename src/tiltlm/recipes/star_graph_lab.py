"""The bench that the star-graph recipes share: graphs, tokens, networks, fitting, and one ruler for all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tiltlm.data.star_graph import Graphs, generate, random_arms, read_lines
from tiltlm.data.star_graph_tokens import AnswerKey, BPETokenizer, GraphTokenizer, NumeralTokenizer, check, forced
from tiltlm.device import device_of
from tiltlm.exact import log_density
from tiltlm.experience import Experience, Generated, Offline
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.models.heads import ValueHead
from tiltlm.models.hub import pretrained
from tiltlm.models.teacherless import Teacherless
from tiltlm.recipes.star_graph_settings import Network, Test, World
from tiltlm.rewards.exact_answer import ExactAnswer
from tiltlm.ruler.log_z import BinaryTarget
from tiltlm.ruler.measure import Check, Measurement, Ruler
from tiltlm.run import Run
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import Stream, stream
from tiltlm.target import Target
from tiltlm.twists.value import value_loss

Split = Literal["pretrain", "posttrain", "test"]


@dataclass(frozen=True)
class Lab:
    """World, network and seed, and everything the stages make of them."""

    world: World
    network: Network
    seed: int

    @property
    def stream(self) -> Stream:
        return stream(self.seed, "star-graph")

    @property
    def device(self) -> torch.device:
        return device_of(self.network.device, "--network.device")

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

    def graphs(self, split: Split) -> Graphs:
        """The graphs of a split: read from the world's folder, or generated from the seed."""
        sizes = {"pretrain": self.world.pretrain, "posttrain": self.world.posttrain, "test": self.world.test}
        count = sizes[split]
        if self.world.folder:
            return self._read(split).select(slice(0, count or None))
        return generate(self.world.graph, count, self.stream.child("graphs", split).numpy())

    def all_graphs(self) -> dict[Split, Graphs]:
        """Every split that has graphs, as the stages use it."""
        splits: tuple[Split, ...] = ("pretrain", "posttrain", "test")
        found = {split: self.graphs(split) for split in splits}
        return {split: graphs for split, graphs in found.items() if len(graphs)}

    def _read(self, split: Split) -> Graphs:
        pattern = f"{self.world.graph.file_stem}*{split}*.txt"
        found = sorted(Path(self.world.folder).glob(pattern))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise ValueError(f"{self.world.folder} must hold one file {pattern}; found {names}")
        return read_lines(found[0], self.world.graph)

    def prompts(self, split: Split, most: int | None = None) -> tuple[Tokens, AnswerKey]:
        """Prompts of a split (the first `most`) and the key to their answers, on the network's device."""
        graphs = self.graphs(split)
        graphs = graphs.select(slice(0, most))
        return self.tokenizer.prompts(graphs).to(self.device), self.tokenizer.key(graphs)

    def pretraining(self, batch_size: int) -> Experience:
        """What the base model imitates, batch by batch."""
        if self.world.pretrain == 0 and not self.world.folder:
            return Generated(
                lambda s: self._imitation(generate(self.world.graph, batch_size, s.numpy()), s), self._base()
            )
        return Offline(self._imitation(self.graphs("pretrain"), self._base()), batch_size, self._base())

    def _base(self) -> Stream:
        return self.stream.child("base", "data")

    def _imitation(self, graphs: Graphs, s: Stream) -> Samples:
        paths: np.ndarray = graphs.path
        if self.world.imitate == "random_arm":
            paths = random_arms(graphs, s.child("arm").numpy())
        completions = self.tokenizer.completions(paths)
        index = torch.arange(len(graphs))
        return Samples(self.tokenizer.prompts(graphs), index, completions.ids, completions.mask).to(self.device)

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

    def ruler(self, reference: LanguageModel, beta: float, test: Test) -> Ruler:
        """The ruler every method is held to: test graphs, exact log Z, exact expected reward."""
        prompts, key = self.prompts("test", test.graphs)
        answers = Samples(
            prompts, torch.arange(len(prompts), device=self.device), key.answers.ids, key.answers.mask
        )

        def right(q: LanguageModel) -> Tensor:
            return log_density(q, answers, test.batch_size).exp()

        return Ruler(
            Target(reference, ExactAnswer(key.answers), beta),
            prompts,
            self.width,
            self.stream.child("measure"),
            n=test.n,
            batch_size=test.batch_size,
            log_z=BinaryTarget(log_density(reference, answers, test.batch_size), beta).log_z,
            checks=checks(key, self.width),
            expected_reward=right,
        )

    def forced(self, policy: LanguageModel, test: Test) -> dict[str, Tensor]:
        """Teacher-forced loss (nats per answer) and accuracy of every answer token, per test graph."""
        prompts, key = self.prompts("test", test.graphs)
        index = torch.arange(len(prompts), device=self.device)
        answers = Samples(prompts, index, key.answers.ids, key.answers.mask)
        loss, right = forced(policy, answers, batch_size=test.batch_size)
        each = {f"forced_token_{t + 1}": right[:, t].double() for t in range(right.shape[1])}
        return {"forced_loss": loss.sum(1).double(), "forced_accuracy": right.all(1).double(), **each}

    def base_log_odds(self, reference: LanguageModel) -> float:
        """logit of the reference's success rate on post-training graphs: what a value learned on pairs lacks."""
        prompts, key = self.prompts("posttrain", 1000)
        index = torch.arange(len(prompts), device=self.device)
        answers = Samples(prompts, index, key.answers.ids, key.answers.mask)
        rate = log_density(reference, answers, 512).exp().mean()
        return float(torch.logit(rate.clamp(1e-6, 1 - 1e-6)))

    def keep(self, run: Run[Any], measured: Measurement, samples: Samples, most: int = 200) -> None:
        """Store a measurement with the first samples it was taken on."""
        measured.save(run.folder / "measurement.safetensors")
        samples.save(run.folder / "samples.safetensors")
        run.write_jsonl("samples.jsonl", list(self._readable(samples.select(slice(0, most)))))

    def value_report(self, value: ValueHead, reference: LanguageModel, test: Test) -> dict[str, Tensor]:
        """How good the value is on fresh rollouts of test graphs: loss and stated p at every token.

        `p_right_t`, `p_wrong_t`: the stated success probability after token t, among completions that turn out
        right, and those that turn out wrong; a calibrated value before the first hop states p₀ in both.
        """
        prompts, key = self.prompts("test", test.graphs)
        s, b = self.stream.child("value-test"), test.batch_size
        drawn = draw_in_batches(reference, prompts, max_new_tokens=self.width, stream=s, batch_size=b)
        right = ExactAnswer(key.answers)(drawn)
        with torch.no_grad():
            values = torch.cat([value.values(drawn.select(slice(k, k + b))) for k in range(0, len(drawn), b)])
        loss, p = value_loss(values, right).double(), values[..., 0].sigmoid().double()
        out = {f"value_loss_{t + 1}": loss[:, t] for t in range(self.width)}
        out |= {f"p_right_{t + 1}": p[right == 1, t] for t in range(self.width) if (right == 1).any()}
        return out | {f"p_wrong_{t + 1}": p[right == 0, t] for t in range(self.width) if (right == 0).any()}

    def _readable(self, samples: Samples) -> Iterable[dict[str, Any]]:
        prompts = self.tokenizer.decode(samples.row_prompts)
        completions = self.tokenizer.decode(samples.completions)
        assert samples.reward is not None and samples.log_q is not None
        numbers = zip(samples.reward.tolist(), samples.log_q.sum(1).tolist(), strict=True)
        for prompt, completion, (reward, log_q) in zip(prompts, completions, numbers, strict=True):
            yield {"prompt": prompt, "completion": completion, "reward": reward, "log_q": log_q}


def checks(key: AnswerKey, width: int) -> dict[str, Check]:
    """Star graph's own rates: whole paths, valid arms, malformed answers, and every token on its own."""

    def token(t: int) -> Check:
        return lambda samples: check(samples, key).per_token[:, t]

    return {
        "accuracy": lambda samples: check(samples, key).exact,
        "valid_rate": lambda samples: check(samples, key).valid_arm,
        "format_error": lambda samples: check(samples, key).format_error,
        **{f"token_{t + 1}": token(t) for t in range(width)},
    }
