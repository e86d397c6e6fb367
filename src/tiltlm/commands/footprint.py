"""From a stage that trains to the networks that a process holds, and what it does with them (`memory`).

Rows are taken to be as long as they may be: a bound, where data is shorter. Prompts that several rows answer count for
each of them. Left out: evaluation on the way, dropout's masks, and networks that a task's own reward may bring along.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from tiltlm.feeds import Feed, TwistFeed, source_of
from tiltlm.feeds.available import rows_drawn
from tiltlm.feeds.settings import NEW
from tiltlm.fit import Fit
from tiltlm.judges.settings import Judging
from tiltlm.memory.making import Adapters
from tiltlm.memory.network import Network, Outputs, Pass, Trains
from tiltlm.memory.process import Held, Process, Use
from tiltlm.models.ends import tokenizer_of
from tiltlm.models.folders import located
from tiltlm.models.hub import pretrained
from tiltlm.nets import Net
from tiltlm.rewards.by_name import of_texts
from tiltlm.rewards.of_texts import LogProbabilityOf, RewardOf
from tiltlm.rewards.terms import terms_of
from tiltlm.samples import A_PASS
from tiltlm.stages.learn import Learn
from tiltlm.stages.reference import BYTES, LAYERS, own_config
from tiltlm.stages.reward_model import TrainJudge
from tiltlm.stages.rounds import Round
from tiltlm.stages.sft import Sft
from tiltlm.tasks.language import OfLanguage
from tiltlm.tasks.mine import Mine
from tiltlm.tasks.pairs import Pairs

TOGETHER = 64
"""Rows that a reward model or a judge scores at once, and that fine-tuning is validated on."""

UNKNOWN_PROMPT = 256
"""Tokens of a prompt, where a task only has its prompts once it is built."""


@dataclass(frozen=True)
class Named:
    """A network by the name of its model; empty: one of the project's own, of so many tokens and layers."""

    name: str
    vocabulary: int = 512
    layers: int = LAYERS

    @property
    def config(self) -> Any:
        return _config(self.name) if self.name else own_config(self.vocabulary, self.layers)


@cache
def _config(name: str) -> Any:
    """A model's configuration; its weights need not be there. Raises ValueError where there is none."""
    from transformers import AutoConfig

    return pretrained(AutoConfig, located(name))


@cache
def network(
    named: Named, trains: Trains = "nothing", outputs: Outputs = "none", *, language: bool = True, labels: int = 0,
    adapters: Adapters | None = None, recomputes: bool = False,
) -> Network:  # fmt: skip
    """A network without weights. labels: of a classifier (0: as its configuration says)."""
    config = named.config
    if labels:
        config = copy.deepcopy(config)
        config.num_labels = labels
    return Network(
        config, trains=trains, outputs=outputs, language=language, adapters=adapters, recomputes=recomputes
    )


def footprint(recipe: Any, processes: int = 1, by_layers: bool = False) -> Process:
    """What one of `processes` holds while it builds `recipe`; by_layers: with `--shard`. Raises ValueError, with the
    reason, where nobody knows."""
    by_layers = by_layers and processes > 1
    if isinstance(recipe, Learn | Round):
        return Process(tuple(Learning.of(recipe, processes, by_layers).held()))
    if isinstance(recipe, Sft):
        return _fine_tuning(recipe, processes, by_layers)
    if isinstance(recipe, TrainJudge):
        return _reward_model(recipe, processes, by_layers)
    raise ValueError("not counted: it trains nothing, or the project's own small model")


@dataclass(frozen=True)
class Rows:
    """How long they are, in tokens."""

    prompt: int
    new: int
    gpu: bool = False

    def batch(self, rows: int, bfloat16: bool = False) -> Pass:
        return Pass(rows, self.prompt + self.new, self.new, bfloat16, self.gpu)


def reference_of(task: Any) -> Named:
    """The network that a task's reference is. Raises ValueError where it is no transformer that is named."""
    if isinstance(task, Pairs):
        return Named(task.reader.named)
    if isinstance(task, OfLanguage):
        lm = task.language
        return Named(lm.model, BYTES if lm.text == "arithmetic" else 512, lm.layers)
    raise ValueError("not counted: the task's reference is no transformer of a name")


def lengths_of(task: Any) -> Rows:
    """The longest rows of a task of `reference_of`, and whether a GPU runs them."""
    device = (task.reader if isinstance(task, Pairs) else task.language).device
    return replace(_lengths(task), gpu=device != "cpu" and (device != "auto" or torch.cuda.is_available()))


def _lengths(task: Any) -> Rows:
    if isinstance(task, Pairs):
        return Rows(task.reader.room, task.reader.new_tokens)
    new = task.language.new_tokens
    if isinstance(task, Mine) and task.several():
        longest = max((_tokens(task, row.prompt) for row in task.rows("train")), default=1)
        return Rows(min(longest, task.prompt_tokens or longest), new)
    if task.facts().prompts == "one":
        return Rows(len(task.language.prompt_ids) or _tokens(task, task.language.prompt), new)
    return Rows(UNKNOWN_PROMPT, new)


def _tokens(task: Any, prompt: Any) -> int:
    """Tokens of a prompt; of a text without its tokenizer at hand its bytes, than which there are never more."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        return len(prompt)
    text = prompt if isinstance(prompt, str) else " ".join(str(each) for each in prompt)
    try:
        tokenizer = tokenizer_of(task.language.model)
    except (ValueError, OSError):
        tokenizer = None
    return len(text.encode()) if tokenizer is None else len(tokenizer(text)["input_ids"])


def rewards_of(task: Any) -> list[tuple[str, Network]]:
    """The networks that a task's reward asks, by name."""
    if isinstance(task, Pairs) and not task.reward:
        return [("reward model", network(Named(task.judge.body or task.reader.named), language=False, labels=1))]
    if not isinstance(task, Pairs | Mine) or task.reward in ("", "none"):
        return []
    asked = [of_texts(term.name) for term in terms_of(task.reward)]
    models = [each.model for each in asked if isinstance(each, RewardOf | LogProbabilityOf)]
    return [(f"reward {name}", network(Named(name), language=False)) for name in dict.fromkeys(models)]


def _share(rows: int, processes: int) -> int:
    return -(-rows // processes)


def _micro(fit: Fit, units: int, processes: int) -> int:
    """Rows, pairs or groups that a process runs at once."""
    share = _share(units, processes)
    return min(fit.micro_batch or share, share)


# ---- the stages -------------------------------------------------------------------------------------------------


def _fine_tuning(recipe: Sft, processes: int, by_layers: bool) -> Process:
    task, how = recipe.task, recipe.task.sft
    adapters = Adapters(how.lora) if how.lora else None
    trains: Trains = "adapters" if how.lora else "all"
    model = network(reference_of(task), trains, adapters=adapters, recomputes=how.checkpointing)
    fit, rows = how.fit, lengths_of(task)
    uses = [
        Use("an update", "update", rows.batch(_micro(fit, fit.batch_size, processes), fit.precision == "bfloat16"))
    ]
    if fit.evaluations:
        uses.append(Use("validation", "score", rows.batch(TOGETHER)))
    parts = processes if fit.shard or by_layers else 1
    return Process((Held("model", model, tuple(uses), parts, by_layers=by_layers),))


def _reward_model(recipe: TrainJudge, processes: int, by_layers: bool) -> Process:
    task, fit = recipe.task, recipe.task.judge.fit
    model = network(Named(task.judge.body or task.reader.named), "all", language=False, labels=1)
    rows, each = lengths_of(task), 1 if "label" in task.columns() else 2
    batch = rows.batch(each * _micro(fit, fit.batch_size, processes), fit.precision == "bfloat16")
    uses = [Use("an update", "update", batch)]
    if fit.evaluations:
        uses.append(Use("validation", "score", rows.batch(each * TOGETHER)))
    parts = processes if fit.shard or by_layers else 1
    return Process((Held("reward model", model, tuple(uses), parts, by_layers=by_layers),))


@dataclass(frozen=True)
class Learning:
    """A method that learns."""

    task: Any
    method: Any
    feed: Feed | TwistFeed
    fit: Fit
    net: Net
    processes: int
    by_layers: bool

    @staticmethod
    def of(recipe: Learn | Round, processes: int, by_layers: bool) -> Learning:
        return Learning(recipe.task, recipe.method, recipe.feed, recipe.fit, recipe.net, processes, by_layers)

    def held(self) -> list[Held]:
        """Every network of a process."""
        learns = self.policies() if self.method.trains == "policy" else self.values()
        found = [*learns, *self.scorers()]
        if self.by_layers:  # what is not trained, too
            return [replace(each, processes=self.processes, by_layers=True) for each in found]
        return found

    # ---- rows -----------------------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        return source_of(self.task.facts(), self.method, self.feed)

    @property
    def new(self) -> bool:
        """Whether every step draws its rows."""
        return self.source in NEW

    @property
    def parts(self) -> int:
        """Processes that hold a part of what is trained each."""
        return self.processes if self.fit.shard or self.by_layers else 1

    @property
    def updated(self) -> Pass:
        """What goes through a trained network at once."""
        if isinstance(self.feed, TwistFeed):
            drawn = self.feed.particles * self.feed.prompts
            units, each = (2 if self.feed.wants_exact else 1) * drawn, 1
        else:
            units, each = self.fit.batch_size, {"pairs": 2, "groups": self.feed.size}.get(self.method.fed, 1)
        rows = each * _micro(self.fit, units, self.processes)
        return lengths_of(self.task).batch(rows, self.fit.precision == "bfloat16")

    @property
    def drawn(self) -> int:
        """Rows that a process draws and scores for a step; 0 where they are fixed."""
        if isinstance(self.feed, TwistFeed):
            return self.feed.particles * _share(self.feed.prompts, self.processes)  # whole populations
        if not self.new or self.method.fed == "answers":
            return 0
        rows = rows_drawn(self.task.facts(), self.method, self.feed, self.fit.batch_size, self.fit.batch_size)
        return _share(rows, self.processes)

    def uses(self, *, draws: bool = False, scores: str = "", updates: bool = False) -> tuple[Use, ...]:
        """What a step does with a network: draw the new rows, score them under that name, learn from the batch."""
        rows, found = lengths_of(self.task), []
        here = isinstance(self.feed, TwistFeed) or not self.feed.draw.url
        if draws and self.drawn and here:
            narrow = not isinstance(self.feed, TwistFeed) and self.feed.draw.precision == "bfloat16"
            found.append(Use("drawing", "draw", rows.batch(self.drawn, narrow)))
        if scores and self.drawn:
            found.append(Use(f"scoring by the {scores}", "score", rows.batch(self.drawn)))
        return (*found, *((Use("an update", "update", self.updated),) if updates else ()))

    # ---- networks -------------------------------------------------------------------------------------------------

    def policies(self) -> list[Held]:
        """Policy, reference and critic."""
        named, live = reference_of(self.task), self.source == "live"
        wanted = "reference" if live and (self.method.wants_reference or self._judging.kind != "none") else ""
        if self.net.policy == "head":
            if self.net.judges == "last":
                raise ValueError(
                    "not counted: a head that reads tokens reads the whole vocabulary behind every prefix"
                )
            return [*self.values(), *self._critic(named)]
        lora = self.net.policy == "lora"
        policy = network(
            named, "adapters" if lora else "all", adapters=self._adapters if lora else None,
            recomputes=self.net.checkpointing,
        )  # fmt: skip
        within = lora and not self.net.weights  # the reference is the policy without its adapters
        own = self.uses(draws=live or within, scores=wanted if within else "", updates=True)
        found = [Held("policy", policy, own, self.parts)]
        if not within:
            found.append(Held("reference", network(named), self.uses(draws=not live, scores=wanted)))
        return found + self._critic(named)

    def values(self) -> list[Held]:
        """A head on the reference's body, a copy of it or its own, and the reference."""
        named, net = reference_of(self.task), self.net
        kinds: dict[str, Trains] = {"copy": "all", "frozen": "head", "lora": "adapters"}
        outputs: Outputs = "vocabulary" if net.judges == "next" else "number"
        adapters = self._adapters if net.body == "lora" else None
        recomputes = net.checkpointing and net.body != "frozen"
        values = network(named, kinds[net.body], outputs, adapters=adapters, recomputes=recomputes)
        guided = self.method.trains == "twist" or self.source == "live"
        return [
            Held("head" if net.body == "frozen" else "head and body", values,
                 self.uses(draws=guided, updates=True), self.parts, inside=net.body == "frozen"),
            Held("reference", network(named), self.uses(draws=True)),
        ]  # fmt: skip

    def _critic(self, named: Named) -> list[Held]:
        if not self.method.critic:
            return []
        return [
            Held("critic", network(named, "all", "number", recomputes=self.net.checkpointing),
                 self.uses(scores="critic", updates=True), self.parts)
        ]  # fmt: skip

    @property
    def _adapters(self) -> Adapters:
        modules = self.net.lora_modules
        return Adapters(self.net.lora_rank, None if modules == "default" else modules)

    @property
    def _judging(self) -> Judging:
        return Judging() if isinstance(self.feed, TwistFeed) else self.feed.judge

    def scorers(self) -> list[Held]:
        """What gives new rows their rewards: the task's reward, and a judge that learns it."""
        lengths = lengths_of(self.task)
        most = max(1, A_PASS // (lengths.prompt + lengths.new))
        rows = lengths.batch(min(TOGETHER, most, max(1, self.drawn)))
        found = []
        if self.new and self.method.fed != "answers":
            found = [
                Held(name, net, (Use("scoring by the reward", "score", rows),))
                for name, net in rewards_of(self.task)
            ]
        return found + (self._judges(rows) if self._judging.learns else [])

    def _judges(self, scored: Pass) -> list[Held]:
        how = self._judging
        named = Named(how.start) if how.start else reference_of(self.task)
        adapters = Adapters(how.lora_rank, "all-linear") if how.lora_rank else None
        length = min(how.most_tokens, scored.length) if how.start == "" else how.most_tokens
        share = _share(how.batch_size, self.processes)
        batch = Pass(2 * min(share, how.micro_batch or share), length, min(length, scored.read))
        uses = (Use("scoring by the judge", "score", replace(batch, rows=scored.rows)),
                Use("an update of the judge", "update", batch))  # fmt: skip
        pair = how.kind == "dpo"
        judge = network(
            named,
            "adapters" if how.lora_rank else "all",
            adapters=adapters,
            language=pair,
            labels=0 if pair else 1,
            recomputes=how.checkpointing,
        )
        found = [Held("judge", judge, uses, self.parts, copies=how.members, apart=True)]
        if pair and not how.lora_rank:
            found.append(Held("judge's start", network(named), (uses[0],), copies=how.members))
        return found
