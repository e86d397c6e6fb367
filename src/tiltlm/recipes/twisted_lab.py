"""The bench that the twisted-SMC recipes share: reference, reward, prompts, exact draws, and one ruler for all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tiltlm.device import device_of
from tiltlm.models.base import LanguageModel, is_end, without_end
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.classifier import TextClassifier
from tiltlm.models.ends import ends_of
from tiltlm.models.heads import ValueHead
from tiltlm.models.hub import pretrained
from tiltlm.recipes.twisted_settings import Goal, Language, Test, Twist
from tiltlm.rewards.by_name import TextReward
from tiltlm.rewards.classifier import ClassProbability, LogOdds, Threshold
from tiltlm.rewards.continuation import Continuation
from tiltlm.rewards.words import WordHits
from tiltlm.ruler.log_z import LogZ
from tiltlm.ruler.measure import Check, Ruler
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.rejection import reject
from tiltlm.samplers.scenes import Supply, infilling
from tiltlm.samples import Pairs, Samples, Tokens, conditions_of
from tiltlm.seeds import Stream, stream
from tiltlm.target import Reward, Target


@dataclass(frozen=True)
class Lab:
    """Language, goal and seed, and everything the stages make of them.

    model: folder or hub name of the reference; classifier: of the classifier, where the goal has one.
    """

    language: Language
    goal: Goal
    seed: int
    model: str | Path
    classifier: str | Path = ""

    @property
    def stream(self) -> Stream:
        return stream(self.seed, "twisted")

    @property
    def device(self) -> torch.device:
        return device_of(self.language.device, "--language.device")

    @property
    def width(self) -> int:
        return self.language.new_tokens

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return pretrained(AutoTokenizer, self.model)

    @cached_property
    def reference(self) -> CausalLM:
        """The reference, with its tokenizer; completions have the length of the settings, or end where these say."""
        return self.load(self.model)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a completion: the settings' stop alone."""
        return ends_of(self.model, self.language.stop, "--language.stop") if self.language.stop else ()

    def load(self, name: str | Path) -> CausalLM:
        model = CausalLM.load(name, device=self.device, eos_ids=self.eos_ids)
        model.tokenizer = self.tokenizer
        return model.requires_grad_(False)

    @cached_property
    def prompt(self) -> Tokens:
        """The prompt, Tokens [1, L]."""
        ids = list(self.language.prompt_ids) or self.tokenizer(self.language.prompt)["input_ids"]
        if not ids:
            raise ValueError("the prompt is empty: give --language.prompt a text")
        return Tokens.of([ids], self.device)

    @property
    def conditioned(self) -> bool:
        """Whether every row has a condition of its own."""
        return self.goal.reward == "infill"

    @cached_property
    def target(self) -> Target:
        return Target(self.reference, self.reward, self.goal.beta)

    @property
    def reward(self) -> Reward:
        """r(x, y), of the completion without what ended it."""
        return self._judged if isinstance(self._judged, Continuation) else self._without_end(self._judged)

    def _without_end(self, verdict: Reward) -> Reward:
        if not self.eos_ids:
            return verdict
        return lambda samples: verdict(samples.with_(mask=samples.mask & ~is_end(samples.tokens, self.eos_ids)))

    @cached_property
    def _judged(self) -> Reward:
        goal = self.goal
        if goal.reward == "words":
            return WordHits(self.goal.words, self.tokenizer)
        if goal.reward == "infill":
            return Continuation(self.reference, kind=goal.kind)
        if goal.reward == "continuation":
            ids = self.tokenizer(goal.continuation, add_special_tokens=False)["input_ids"]
            return Continuation(self.reference, Tokens.of([ids], self.device), kind=goal.kind)
        if goal.reward == "file":
            return TextReward(goal.file, self.tokenizer, str(self.device))
        return self._classified()

    def _classified(self) -> Reward:
        classifier = TextClassifier.load(self.classifier, device=self.device)
        own = ClassProbability(classifier, self.tokenizer, self.goal.label)
        if self.goal.threshold is None:
            return own
        return Threshold(LogOdds(own), self.goal.threshold, above=self.goal.above)

    def terms(self) -> dict[str, Check]:
        """Every term of a sum of rewards, unweighted, by the name that reports have for it; none where there is no sum."""
        found = self._judged.parts() if isinstance(self._judged, TextReward) else {}
        return {name: self._without_end(part) for name, part in found.items()}

    # ---- prompts and exact draws ----------------------------------------------------------------------------

    def conditions(self, n: int, purpose: str) -> tuple[Tokens, Samples]:
        """`n` conditions with an exact draw for each."""
        own = self.stream.child("conditions", purpose)
        return infilling(self.reference, self.prompt, n, self.width, self.goal.condition_tokens, own)

    def fresh_exact(self, n: int, batch_size: int) -> Supply:
        """A supply of `n` exact draws of pi*, found by a fresh search every time."""

        def fresh(own: Stream) -> Samples:
            return reject(
                self.target,
                self.prompt,
                n=n,
                max_new_tokens=self.width,
                stream=own,
                r_max=self.goal.bound(),
                batch_size=batch_size,
                pilot=False,
            )

        return fresh

    def copy(self) -> CausalLM:
        """A copy of the reference to train, without dropout: it would make ratios to what was drawn noisy."""
        copied = copy_of(self.reference).requires_grad_(True)
        for module in copied.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return copied

    def fresh_twist(self, net: Twist) -> ValueHead:
        """A twist that says nothing yet."""
        return self.head_on(self.body(net), net)

    def fresh_value(self, net: Twist, width: int) -> ValueHead:
        """A value of `width` numbers per token that says nothing yet."""
        return self.head_on(self.body(net), net, width=width)

    def body(self, net: Twist) -> CausalLM:
        """What a head stands on, as the settings say."""
        if net.body == "frozen":
            return self.reference
        return self.copy().with_lora(net.lora_rank) if net.body == "lora" else self.copy()

    def rollouts(self, n: int, conditions: int, own: Stream) -> Samples:
        """`n` fresh draws of the reference, scored; infill: shared out among fresh conditions."""
        prompts, count = self.prompt, n
        if self.conditioned:
            width, follow = self.width, self.goal.condition_tokens
            prompts = infilling(self.reference, self.prompt, conditions, width, follow, own.child("conditions"))[0]
            count = n // conditions
        drawn = draw(self.reference, prompts, n=count, max_new_tokens=self.width, stream=own)
        return self.target.scored(drawn.with_(log_ref=drawn.log_q))

    def head_on(self, body: CausalLM, net: Twist, **options: Any) -> ValueHead:
        """A head on `body` as the settings say; `options` go to the head."""
        settings = {"per_token": True, **options}
        return ValueHead(
            body,
            mlp_layers=net.mlp_layers,
            mlp_factor=net.mlp_factor,
            frozen=net.body == "frozen",
            reads="tokens" if self.conditioned else "nothing",
            **settings,
        )

    # ---- the ruler ------------------------------------------------------------------------------------------

    def ruler(self, test: Test, exact: Samples | None, log_z: LogZ | Tensor | None) -> Ruler:
        """The ruler every method is held to: the same prompts, exact draws and log Z (where there are any)."""
        exact, prompts = None if exact is None else exact.to(self.device), self.prompt
        if self.conditioned:
            if exact is None:
                raise ValueError("infill: conditions and exact draws come together; leave test.absolute on")
            exact = self.first(exact, test.conditions)
            prompts = exact.prompts
        return Ruler(
            self.target,
            prompts,
            self.width,
            self.stream.child("measure"),
            n=test.n,
            batch_size=test.batch_size,
            log_z=log_z,
            checks=self.terms(),
            exact=exact if self.conditioned or exact is None else exact.select(slice(0, test.exact)),
        )

    def first(self, exact: Samples, n: int) -> Samples:
        """The first `n` conditions with their exact draws."""
        few = min(n, len(exact))
        return replace(exact.select(slice(0, few)), prompts=exact.prompts.select(slice(0, few)))

    def readable(self, samples: Samples) -> Iterable[dict[str, Any]]:
        """Rows for samples.jsonl: texts and whatever numbers are known."""
        rows = [without_end(row, self.eos_ids) for row in samples.completions.lists()]
        texts = self.tokenizer.batch_decode(rows)
        prompts = self.tokenizer.batch_decode(samples.row_prompts.lists(), skip_special_tokens=True)
        columns = {name: x for name, x in samples.optional().items() if x.is_floating_point()}
        numbers = {name: (x.sum(1) if x.ndim == 2 else x).tolist() for name, x in columns.items()}
        follow = None
        if self.conditioned:
            wanted = conditions_of(samples.prompts).select(samples.prompt_index)
            follow = self.tokenizer.batch_decode(wanted.lists())
        for k, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            row = {"prompt": prompt, "completion": text}
            if follow is not None:
                row["must follow"] = follow[k]
            yield {**row, **{name: values[k] for name, values in numbers.items()}}


def preferences(model: LanguageModel, target: Target, prompt: Tokens, n: int, width: int, own: Stream) -> Pairs:
    """`n` pairs drawn from `model`, the winner by a Bradley-Terry coin of the reward: P(first) = σ(r_1 − r_2)."""
    drawn = draw(model, prompt, n=2 * n, max_new_tokens=width, stream=own)
    drawn = target.scored(drawn.with_(log_ref=drawn.log_q))
    assert drawn.reward is not None
    gap = drawn.reward[:n] - drawn.reward[n:]
    first = own.child("coin").uniform(range(n), 1)[:, 0].to(gap.device) < logsigmoid(gap.double()).exp()
    rows = torch.arange(n, device=gap.device)
    return Pairs(
        drawn.select(torch.where(first, rows, rows + n)), drawn.select(torch.where(first, rows + n, rows))
    )
