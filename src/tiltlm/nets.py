"""The networks that methods train: a copy of the reference as a policy, a head on its body as a twist or a value.

What is trained, saved and drawn from is a `Learner`; the same settings make it fresh or read it from a checkpoint.
Tables (`models.table`) have tables in the place of heads.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field, replace
from os.path import exists
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tiltlm import ranks
from tiltlm.jsonl import read_json
from tiltlm.judges.base import Judge
from tiltlm.judges.discriminator import Discriminator
from tiltlm.judges.learning import LearningJudge
from tiltlm.judges.making import judge_on_texts
from tiltlm.judges.networks import LastValue
from tiltlm.judges.settings import Judging
from tiltlm.method import Learner, Method
from tiltlm.models.base import LanguageModel
from tiltlm.models.causal import CausalLM
from tiltlm.models.folders import located
from tiltlm.models.heads import ValueHead
from tiltlm.models.merging import merged
from tiltlm.models.table import TableCritic, TableLM, TableValues
from tiltlm.models.unadapted import Unadapted
from tiltlm.models.weights import load_state
from tiltlm.problem import Facts, Problem
from tiltlm.seeds import Stream
from tiltlm.settings import ADDED, at_least_one
from tiltlm.twists.learned import TiltedPolicy
from tiltlm.twists.value import ValueLearning


@dataclass(frozen=True)
class Net:
    """What is trained of the reference."""

    policy: Literal["full", "head", "lora"] = "full"
    """A policy is the whole model, the reference with a trained head (which sees conditions), or LoRA adapters."""

    body: Literal["copy", "frozen", "lora"] = "copy"
    """What a head stands on: a trained copy of the reference's body, the reference's own (frozen), or one with adapters."""

    start: Literal["reference", "untrained"] = "reference"
    """The body's first weights: the reference's, or those of the network that it began as."""

    judges: Literal["next", "last"] = "next"
    """A head judges every next token at once, or reads a token and judges it (a policy's: the whole vocabulary)."""

    mlp_layers: int = 0
    """Hidden layers of the head (0: linear)."""

    mlp_factor: int = 1
    """Width of the hidden layers, in widths of what the head reads."""

    lora_rank: int = 8
    lora_alpha: float = field(default=0.0, metadata=ADDED)
    """Adapters are scaled by alpha / rank (0: twice the rank)."""

    lora_modules: Literal["default", "all-linear"] | tuple[str, ...] = field(default="default", metadata=ADDED)
    """Layers that adapters stand beside: PEFT's choice for such a network, every linear one but the head, or these."""

    checkpointing: bool = False
    """Save memory: compute activations again in the backward pass."""

    weights: str = field(default="", metadata=ADDED)
    """What a policy begins as, where that is not the reference: a run that trained one, a folder or a hub name. Log-ratios
    stay those to the reference."""

    def __post_init__(self) -> None:
        at_least_one(self, "mlp_factor", "lora_rank")
        if self.mlp_layers < 0:
            raise ValueError(f"mlp_layers are hidden layers, 0 or more; got {self.mlp_layers}")
        if not 0 <= self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha is positive, or 0 for twice the rank; got {self.lora_alpha}")
        if not self.lora_modules:
            raise ValueError(
                "lora_modules names no layer: take default, all-linear, or names such as q_proj v_proj"
            )

    def adapted(self, model: CausalLM) -> CausalLM:
        """The model with such adapters, at the temperature and with the tokenizer that it had."""
        layers = None if self.lora_modules == "default" else self.lora_modules
        found = model.with_lora(self.lora_rank, self.lora_alpha or 2 * self.lora_rank, target_modules=layers)
        found.tokenizer = model.tokenizer
        return found.at(model.temperature)

    def why_not(self, method: Method, facts: Facts) -> str | None:
        """Why such a network is of no use to a method on such a problem, or None."""
        if method.trains == "policy" and facts.conditioned and self.policy != "head":
            return "a plain language model does not see what must follow: take --net.policy head, or a twist"
        if not facts.network and "lora" in (self.policy if method.trains == "policy" else self.body,):
            return "a table has no weights to put adapters beside"
        if self.start == "untrained" and not facts.untrained and method.trains != "nothing":
            return "what the reference was before it was trained is not known here: --net.start reference"
        return self._no_weights(method) if self.weights else None

    def _no_weights(self, method: Method) -> str | None:
        if method.trains != "policy":
            return "weights to begin with are a policy's: leave --net.weights out"
        if self.policy == "head":
            return "a head begins at the reference, which stays as it is: take --net.policy full or lora, or no weights"
        where = self.weights.startswith((".", "/", "~")) or self.weights.count("/") > 1
        if where and not exists(self.weights):
            return f"{self.weights}: no such folder (--net.weights)"
        return None

    def files(self) -> list[str]:
        """Files and folders that settings name and whose content decides the result."""
        return [self.weights]


def learner(problem: Problem, method: Method, net: Net, own: Stream) -> tuple[Problem, Learner]:
    """A fresh learner, and the problem (with adapters, its reference is the model without them). own: for first weights."""
    with torch.random.fork_rng(devices=[]):
        own.seed_everything()
        if method.trains == "policy":
            return _policy(problem, method, net)
        return problem, _values(problem, method, net)


def loaded(problem: Problem, method: Method, net: Net, folder: Path, own: Stream) -> Learner:
    """The learner that a checkpoint holds, frozen."""
    if method.trains == "policy" and net.policy == "full":
        return Learner(None, policy=problem.loaded(folder))
    plain = net if net.body != "frozen" else replace(net, body="copy")  # the folder has the body too
    _, found = learner(problem, method, plain, own)
    part = found.module.policy if method.critic else found.module
    part.eval()
    part.restore(folder)
    part.requires_grad_(False)
    return found


def _policy(problem: Problem, method: Method, net: Net) -> tuple[Problem, Learner]:
    start = problem
    if net.policy == "head":
        tilted = TiltedPolicy(problem.reference, head(problem, net))
        module, policy = tilted, tilted.decoder()
    else:
        problem, module = _whole(problem, net)
        policy = module
    if not method.critic:
        return problem, Learner(module, policy)
    from tiltlm.policies.ppo import ActorCritic

    critic = _critic(start, net)  # its body is a copy of the reference, not of what now has adapters
    return problem, Learner(ActorCritic(module, critic), policy, critic=critic)


def _whole(problem: Problem, net: Net) -> tuple[Problem, Any]:
    """The whole model as a policy; with adapters on the reference, that is the same network without them."""
    if net.policy == "full":
        model = trainable(problem, net.weights) if net.weights else problem.copy()
        return problem, model.with_checkpointing() if net.checkpointing else model
    adapted = _adapters(net.weights)
    model = trainable(problem, net.weights) if net.weights and not adapted else problem.copy()
    under = model.model.name_or_path
    model = net.adapted(model)
    if adapted:
        _refuse_other_adapters(adapted, under, net)
        model.restore(adapted)
    if net.checkpointing:
        model = model.with_checkpointing()
    if net.weights and not adapted:  # without its adapters it would be those weights, not the reference
        return problem, model
    return replace(problem, target=replace(problem.target, reference=Unadapted(model))), model


def begun(problem: Problem, name: str) -> LanguageModel:
    """The policy that a run trained, or that a folder or the hub has, frozen."""
    policy: LanguageModel = trainable(problem, name).eval().requires_grad_(False)
    return policy


def trainable(problem: Problem, name: str) -> Any:
    """A copy of the reference with those weights instead, ready to train; adapters are merged into the model that they were
    trained beside. Raises ValueError where they are not the weights of a model like the reference."""
    problem.refuse_other_words(name)
    model, folder = problem.copy(), _adapters(name)
    try:
        if folder is None:
            model.restore(located(name))
        else:
            load_state(model.model, lambda: merged(folder, dtype=model.model.dtype).model.state_dict())
    except (RuntimeError, OSError) as error:
        why = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
        raise ValueError(f"{name} holds no weights of a model like the reference: {why}") from None
    if isinstance(model, CausalLM):
        model.model.name_or_path = located(name)  # what adapters say that they belong to
    return model


def _adapters(name: str) -> Path | None:
    """The folder of the adapters that `name` stands for; None where it is a whole model, or nothing."""
    folder = Path(located(name)) if name else None
    return folder if folder is not None and (folder / "adapter_config.json").is_file() else None


def _refuse_other_adapters(folder: Path, under: str, net: Net) -> None:
    """Raise ValueError for adapters that training cannot go on with: of another rank, or beside another model than the one
    called `under`."""
    said = read_json(folder / "adapter_config.json")
    rank, base = said.get("r"), str(said.get("base_model_name_or_path") or "")
    if base != under and Path(base).resolve() != Path(under).resolve():
        why = f"belong to {base}, and the reference is {under}"
    elif (rank, said.get("lora_alpha")) != (net.lora_rank, 2 * net.lora_rank):
        why = f"have rank {rank}, and those to train --net.lora-rank {net.lora_rank}"
    else:
        return
    raise ValueError(
        f"the adapters of {folder} {why}: merge them first, `tiltlm merge {folder} --out FOLDER`, and take "
        "--net.weights FOLDER; or train every weight, --net.policy full"
    )


def _values(problem: Problem, method: Method, net: Net) -> Learner:
    width = method.objective(problem).width if isinstance(method, ValueLearning) else 1
    values = head(problem, net, width)
    return Learner(values, values=values)


def head(problem: Problem, net: Net, width: int = 1) -> Any:
    """Values that say nothing yet, of `width` numbers."""
    reference = problem.reference
    if isinstance(reference, TableLM):
        return TableValues(reference.n_prompts, reference.vocab_size, reference.horizon, width)
    return ValueHead(
        _body(problem, net), width=width, per_token=net.judges == "next", mlp_layers=net.mlp_layers,
        mlp_factor=net.mlp_factor, frozen=net.body == "frozen", reads=_reads(problem),
    )  # fmt: skip


def judge_of(problem: Problem, how: Judging, own: Stream, folder: Path, shard: bool = False) -> Judge:
    """The judge that the settings describe, its journal in `folder`; own: for first weights, and for what it chooses.
    shard: several processes hold a part of it each.

    Without a model of its own it begins as the reference's body: on texts where the problem has a tokenizer, else on ids.
    """
    if how.url:
        from tiltlm.judges.client import RemoteJudge

        return RemoteJudge(how.url, called=f"{folder.parent.name}-{folder.name}/")  # runs may share a judge
    if how.kind == "self":
        return LearningJudge(None, problem.reward_of_texts, how, own, folder)
    if how.allocation == "pool" and problem.reward_of_texts is None:
        raise ValueError(
            "a pool is bought out of later: it wants a reward of texts; take --feed.judge.allocation spread"
        )
    if problem.tokenizer is None:
        networks = [_last_value(problem, how, own.child("member", k)) for k in range(how.members)]
        discriminator = Discriminator(networks, how.lr, how.batch_size, shard, how.micro_batch)
        return LearningJudge(discriminator, problem.reward_of_texts, how, own, folder)
    body = how.start or _written(problem, folder)
    return judge_on_texts(how, body, problem.reward_of_texts, own, folder, problem.device, shard)


def _last_value(problem: Problem, how: Judging, own: Stream) -> LastValue:
    if how.kind == "dpo":
        raise ValueError(
            "a second policy judges texts, and here there are none: take --feed.judge.kind reward-model"
        )
    with torch.random.fork_rng(devices=[]):
        own.seed_everything()
        return LastValue(head(problem, Net(judges="last", checkpointing=how.checkpointing)))


def _written(problem: Problem, folder: Path) -> Path:
    """The reference as a folder, for a judge to begin with. (With adapters, problem.reference is no model of its own.)"""
    body, aside = folder / "body", folder / ".body.tmp"

    def write(model: Any) -> None:
        shutil.rmtree(aside, ignore_errors=True)
        model.save(aside)
        aside.rename(body)

    if not ranks.from_first(body.is_dir):
        model = problem.copy()  # by every process: what is in parts is copied by all
        ranks.from_first(lambda: write(model))
    return body


def _reads(problem: Problem) -> Literal["tokens", "nothing"]:
    return "tokens" if problem.facts.conditioned else "nothing"


def _body(problem: Problem, net: Net) -> CausalLM:
    reference: Any = problem.reference
    if net.body == "frozen":
        return reference
    if net.start == "untrained":
        if problem.untrained is None:
            raise ValueError(
                "what the reference was before it was trained is not known here: --net.start reference"
            )
        body: Any = problem.untrained()
    else:
        body = problem.copy()
    body = net.adapted(body) if net.body == "lora" else body
    return body.with_checkpointing() if net.checkpointing else body


def _critic(problem: Problem, net: Net) -> nn.Module:
    """V(y_<t), on a body of its own."""
    reference = problem.reference
    if isinstance(reference, TableLM):
        return TableCritic(reference.n_prompts, reference.vocab_size, reference.horizon)
    body = problem.copy()
    return ValueHead(
        body.with_checkpointing() if net.checkpointing else body,
        per_token=False,
        mlp_layers=net.mlp_layers,
        mlp_factor=net.mlp_factor,
        reads=_reads(problem),
    )
