"""What the tasks on text share: a reference model with its prompt, and a problem of one target on it.

`Language` is the group of settings, `OfLanguage` what such a task answers: a task that has `language` among its fields says
what its reward is (`judged`) and what is known of it (`facts`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro

from tiltlm.device import device_of
from tiltlm.fit import Fit
from tiltlm.models.causal import CausalLM, steady
from tiltlm.models.ends import ends_of
from tiltlm.models.hub import config_of, pretrained
from tiltlm.problem import Check, Problem, without_ends
from tiltlm.rewards.by_name import TextReward
from tiltlm.run import Recipe, Run
from tiltlm.samples import Tokens
from tiltlm.seeds import stream
from tiltlm.settings import ADDED, SPEED, at_least_one
from tiltlm.stages.reference import FIT, LAYERS, OWN_TOKENS, Reference
from tiltlm.stages.task import Task
from tiltlm.target import Reward, Target
from tiltlm.train import best_checkpoint

DATA = Path(os.environ.get("TILTLM_DATA", "../shared/data"))
"""Where the small presets look for a pretrained stories model and for labelled text ($TILTLM_DATA)."""

AUTO = ("auto",)
"""The setting `stop` that takes the tokens which the model's own files name."""


def found(*parts: str) -> str:
    """A path under DATA, or "" where there is no such thing: the project then makes its own."""
    path = DATA.joinpath(*parts)
    return str(path) if path.exists() else ""


@dataclass(frozen=True)
class Language:
    """The reference model and what it is asked."""

    model: str = ""
    """A hub name or folder; empty: a small Llama that the stage `base` trains on text of its own making."""

    prompt: str = "Once upon a time, there was a"
    prompt_ids: tuple[int, ...] = ()
    """Token ids to use instead of the prompt's text."""

    new_tokens: int = 12
    """T: every completion has this many tokens, as published; with `stop`, at most."""

    stop: tuple[str, ...] = ()
    """Tokens that end a completion before that, by id or text (default: none, whatever the model's files name; auto: those
    that they name)."""

    device: str = field(default="cpu", metadata=SPEED)
    """cpu, cuda, cuda:N, mps, or auto: the first of cuda, mps and cpu that is there."""

    stories: int = 6000
    """Stories, or worked solutions, that the own model is trained on."""

    fit: Fit = FIT
    """How the own model is trained."""

    text: Literal["stories", "arithmetic"] = field(default="stories", metadata=ADDED)
    """What the own model is trained on: stories, or arithmetic worked out step by step, one token a character."""

    layers: int = field(default=LAYERS, metadata=ADDED)
    """Layers of the own model."""

    def __post_init__(self) -> None:
        at_least_one(self, "new_tokens", "stories", "layers")

    def base(self, task: str, seed: int) -> Reference:
        """The stage that trains the project's own model."""
        return Reference(self.stories, self.fit, self.text, self.layers, self.device, task, seed)

    def check(self) -> None:
        """Raise ValueError where prompt and completions do not fit into the model."""
        most = self.positions()
        if self.new_tokens >= most:
            raise ValueError(f"the reference holds {most} tokens: lower --task.new-tokens, now {self.new_tokens}")

    def positions(self) -> float:
        """How many tokens the reference holds, prompt and completion together (infinite: no limit)."""
        if not self.model:
            return OWN_TOKENS
        # an attribute that some families call otherwise, and that some do not have
        return getattr(config_of(self.model).get_text_config(), "max_position_embeddings", None) or math.inf

    def place(self, runs: Mapping[str, Run[Any]]) -> str | Path:
        """Folder or hub name of the reference."""
        return self.model or best_checkpoint(runs["base"].folder)

    def tokenizer(self, runs: Mapping[str, Run[Any]]) -> Any:
        from transformers import AutoTokenizer

        return pretrained(AutoTokenizer, self.place(runs))

    def reference(self, runs: Mapping[str, Run[Any]]) -> CausalLM:
        """The reference, frozen, with its tokenizer; completions have the length of the settings, or end where these
        say."""
        place = self.place(runs)
        named = () if self.stop == AUTO else self.stop
        eos_ids = ends_of(place, named, "--task.stop") if self.stop else ()
        model = CausalLM.load(place, device=device_of(self.device, "--task.device"), eos_ids=eos_ids)
        model.tokenizer = self.tokenizer(runs)
        return model.requires_grad_(False)

    def asked(self, reference: CausalLM) -> Tokens:
        """The prompt, Tokens [1, L]. Raises ValueError where there is none, or it does not fit the model."""
        ids = list(self.prompt_ids) or reference.tokenizer(self.prompt)["input_ids"]
        if not ids:
            raise ValueError("the prompt is empty: give --task.prompt a text")
        odd = [i for i in ids if not 0 <= i < reference.vocab_size]
        if odd:
            raise ValueError(f"the prompt has token {odd[0]}, and the model knows 0 to {reference.vocab_size - 1}")
        most = self.positions()
        if len(ids) + self.new_tokens > most:
            both = f"{len(ids)} tokens of a prompt and {self.new_tokens} new ones"
            raise ValueError(f"{both} are more than the {most} that the reference holds: lower --task.new-tokens")
        return Tokens.of([ids], reference.device)


Flat = Annotated[Language, tyro.conf.arg(name="")]
"""The same, its settings beside the task's own on the command line: --task.model, --task.prompt, …"""


class OfLanguage(Task):
    """A task on text: one prompt, and a reward of its completions."""

    language: Flat
    shows: ClassVar[tuple[str, ...]] = ("language.model", "language.prompt", "language.new_tokens", "beta")

    def judged(self, reference: CausalLM, runs: Mapping[str, Run[Any]]) -> Reward:
        """r(x, y)."""
        raise NotImplementedError

    def needs(self, seed: int) -> dict[str, Recipe]:
        return {} if self.language.model else {"base": self.language.base(self.name, seed)}

    def stages(self, seed: int) -> dict[str, Recipe]:
        return {"base": self.language.base(self.name, seed)} | self.needs(seed)

    def files(self) -> list[str]:
        return [self.language.model]

    def check(self) -> None:
        self.language.check()

    def speech(self, runs: Mapping[str, Run[Any]]) -> tuple[Any, int | None, int | None]:
        return self.language.tokenizer(runs), self.language.new_tokens, None

    def at_length(self, new_tokens: int) -> Self:
        """This task with completions of another length."""
        return replace(self, language=replace(self.language, new_tokens=new_tokens))  # type: ignore[type-var]

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        reference = self.language.reference(runs)
        prompt = self.language.asked(reference)
        reward = self.judged(reference, runs)
        return Problem(
            Target(reference, reward, self.beta), {"train": prompt, "test": prompt}, self.language.new_tokens,
            stream(seed, "twisted"), self.facts(), reference.tokenizer, begin=lambda: steady(reference),
        )  # fmt: skip


def reward_terms(reward: Callable[..., Any], reference: CausalLM) -> dict[str, Check]:
    """Every term of a sum of rewards by name, unweighted, by the name that reports have for it; none where there is no
    sum. For `Problem.checks`."""
    parts = reward.parts() if isinstance(reward, TextReward) else {}
    return {name: without_ends(part, reference.eos_ids) for name, part in parts.items()}
