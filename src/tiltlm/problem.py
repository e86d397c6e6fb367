"""A problem: one target, its prompts, and what else its world can answer. Methods and the ruler are handed this alone.

    pi*(y|x) = pi_ref(y|x) · exp(r(x, y) / beta) / Z(x)        for the prompts x of every split

A task on disk makes one of its finished runs (`tasks/`); `Problem.of` makes one in memory, of a model, a reward and
prompts. What is known before anything is built (does the reward have a bound, has the data pairs of its own?) stands in
`Facts`: enough for a method to say why it cannot be used.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tiltlm import ranks
from tiltlm.data.encoding import Encoder
from tiltlm.exact import Solution
from tiltlm.models.base import LanguageModel, Values, is_end, without_end
from tiltlm.models.causal import CausalLM, steady
from tiltlm.models.ends import ends_of, tokenizer_of
from tiltlm.questions.base import Question
from tiltlm.questions.grading import Grading
from tiltlm.rewards.by_name import TextReward, is_paid
from tiltlm.rewards.of_function import OfFunction
from tiltlm.samplers.ancestral import draw_in_batches
from tiltlm.samplers.rejection import reject
from tiltlm.samplers.scenes import ExactDraws, OnePrompt, Scene, SomePrompts, joined
from tiltlm.samples import Conditioned, Samples, Tokens
from tiltlm.seeds import Stream, stream
from tiltlm.target import Reward, Target

Split = Literal["train", "valid", "test"]

SPLITS: tuple[Split, ...] = ("train", "valid", "test")

Fed = Literal["answers", "pairs", "groups", "judged", "live", "draws", "values", "nothing"]
"""What a method learns from: completions to imitate; a better and a worse one; several with rewards; single ones judged
good or bad; the policy's own; a twist's weighted draws; the reference's with rewards; nothing."""


Source = Literal["own", "stored", "fresh", "live", "rounds"]
"""The data's own rows; stored draws of the reference; fresh ones at every step; the policy's own at every step, or those of
a round."""


@dataclass(frozen=True)
class Facts:
    """What is known of a problem before anything is built.

    beta       the target's temperature
    prompts    how many there are to train on: one, several, or fresh ones at every step, each with its condition
    owns       what the data itself holds
    r_max      no reward is larger; None: no bound is known
    atoms      the rewards there are, or what a law of the reward is to be taken over
    log_z      whether every prompt's log Z can be computed
    held_out   whether there are prompts to validate on
    network    whether the reference is a transformer (else a table)
    source     where rows come from if nothing else is said: the data's own, stored draws of the reference, or fresh ones
    bound_at   the option that states a bound
    halved     whether the data's rows for values are half successes, whatever the reference's rate of them (pairs)
    teacherless  whether the reference predicts all tokens at once, without reading a completion's own
    temperature  at which every model is read; what it draws has its density at that one, and no other
    untrained    whether it is known what the reference was before it was trained
    paid       whether the reward costs money
    hints      whether a prompt can be put with a hint that tells its answer
    test_prompts  how many there are to measure on, where that is not as it is with those to train on
    """

    beta: float
    prompts: Literal["one", "several", "conditions"] = "one"
    owns: frozenset[Fed] = frozenset()
    r_max: float | None = None
    atoms: tuple[float, ...] | None = None
    log_z: bool = False
    held_out: bool = False
    network: bool = True
    source: Source = "fresh"
    bound_at: str = "--task.r-max"
    halved: bool = False
    teacherless: bool = False
    temperature: float = 1.0
    untrained: bool = False
    test_prompts: Literal["one", "several"] | None = None
    paid: bool = False
    hints: bool = False

    def __post_init__(self) -> None:
        if self.r_max is not None and not math.isfinite(self.r_max):
            raise ValueError(f"an upper bound of the reward is a number ({self.bound_at}); got {self.r_max}")

    @property
    def measured(self) -> Literal["one", "several", "conditions"]:
        """Like `prompts`: how many there are to measure on."""
        return self.test_prompts or self.prompts

    @property
    def conditioned(self) -> bool:
        """Whether completions depend on a condition that the reference does not see."""
        return self.prompts == "conditions"

    def no_exact_draws(self) -> str | None:
        """Why exact draws of pi* cannot be had, or None."""
        if self.conditioned or self.r_max is not None:
            return None
        return (
            "exact draws of pi* by rejection need an upper bound of the reward, and none is known: name it, "
            f"{self.bound_at} (the most that any completion can get)"
        )


PILOT, QUANTILES = 1024, 16
"""Draws of the reference that atoms are taken from, where a problem names none, and how many at most."""

Check = Callable[[Samples], Tensor]
"""A verdict on every row: Samples -> bool or float [N]."""


@dataclass(frozen=True)
class Problem:
    """A target with its prompts.

    target      reference, reward, beta
    prompts     by split, Tokens; a single prompt is a batch of one; may be `Conditioned`
    width       new tokens at most, or exactly where nothing ends a completion
    stream      every random number here descends from it
    tokenizer, encoder    text <-> ids, where there is text
    own         what the data holds: kind -> (split -> Samples, Pairs or Groups)
    orders      the streams that shuffle it, where they have names of their own
    fresh       (n, stream) -> n fresh prompts with their conditions, and an exact draw of pi* for each
    exact       (prompts, n, stream) -> exact draws of pi*; by rejection, unless given
    log_z       (prompts, beta) -> log Z of each, [P], where it can be computed
    solve       (prompts) -> the whole answer, where the world can be enumerated
    checks      the task's verdicts on completions of the *test* prompts
    expected_reward  (q, prompts) -> E_q[r | x] of these test prompts, where it can be computed
    further     (q, prompts) -> further numbers of a policy, one for each of these test prompts
    value_report     (values) -> how good a learnt value is: independent observations by name
    optimum     (Ruler) -> pi* itself, measured, where that is in closed form
    load        a checkpoint's folder -> the language model in it, frozen, as this problem reads it
    begin       a fresh copy of the reference to train
    untrained   what the reference was before it was trained, where that is known
    log_odds    () -> logit of the reference's success rate, what a value learnt on halved rows leaves out
    readable    samples -> rows of texts and numbers for people
    beside      answers to test prompts -> rows of them beside what the data holds, for people
    beta_pi     temperature of the log-ratios at which distances within groups are measured (its reward's: beta / beta_pi)
    counts      check -> bool [test prompts]: those on which it means something (all, where none are named)
    test_stream the stream of what is drawn to measure
    texts       samples -> what a reward of texts reads: prompts without a template, completions without their end
    reward_of_texts  (prompts, completions), as `texts` has them -> rewards
    reference_name   what tells the reference from others, for caches; empty: no cache
    grading     what is right, where the reward is that an answer is
    questions   by split, where there are such: the question of each of `prompts`, in their order
    hinted      prompts -> the same ones, put with a hint that tells the answer
    """

    target: Target
    prompts: Mapping[Split, Tokens]
    width: int
    stream: Stream
    facts: Facts
    tokenizer: Any = None
    encoder: Encoder | None = None
    own: Mapping[Fed, Callable[[Split], Any]] = field(default_factory=dict)
    orders: Mapping[Fed, Stream] = field(default_factory=dict)
    fresh: Callable[[int, Stream], tuple[Conditioned, Samples]] | None = None
    exact: ExactDraws | None = None
    log_z: Callable[[Tokens, float], Tensor] | None = None
    solve: Callable[[Tokens], Solution] | None = None
    checks: Mapping[str, Check] = field(default_factory=dict)
    expected_reward: Callable[[LanguageModel, Tokens], Tensor] | None = None
    further: Callable[[LanguageModel, Tokens], Mapping[str, Tensor]] | None = None
    value_report: Callable[[Values], Mapping[str, Tensor]] | None = None
    optimum: Callable[[Any], Any] | None = None
    load: Callable[[str | Path], LanguageModel] | None = None
    begin: Callable[[], LanguageModel] | None = None
    untrained: Callable[[], CausalLM] | None = None
    log_odds: Callable[[], float] | None = None
    readable: Callable[[Samples], Iterable[dict[str, Any]]] | None = None
    beside: Callable[[Samples], list[dict[str, Any]]] | None = None
    beta_pi: float = 1.0
    counts: Mapping[str, Tensor] = field(default_factory=dict)
    test_stream: Stream | None = None
    texts: Callable[[Samples], tuple[list[Any], list[Any]]] | None = None
    reward_of_texts: Callable[[Sequence[Any], Sequence[Any]], list[float]] | None = None
    reference_name: str = ""
    grading: Grading | None = None
    questions: Mapping[Split, Sequence[Question]] = field(default_factory=dict)
    hinted: Callable[[Tokens], Tokens] | None = None

    def __post_init__(self) -> None:
        if not len(self.prompts.get("test", ())) or not (self.fresh or len(self.prompts.get("train", ()))):
            raise ValueError("a problem needs prompts to train on and to test with; one of the two is empty")

    @property
    def reference(self) -> LanguageModel:
        """pi_ref."""
        return self.target.reference

    @property
    def beta(self) -> float:
        """The target's temperature: it divides the reward."""
        return self.target.beta

    @property
    def device(self) -> torch.device:
        return self.reference.device

    def at(self, beta: float) -> Problem:
        """The same problem at another temperature, without what draws exactly at this one alone. Raises ValueError where
        its prompts come with such draws."""
        if beta == self.beta:
            return self
        if self.fresh is not None:
            raise ValueError(
                f"conditions come with exact draws of pi* at beta {self.beta:g} alone; got beta {beta:g}"
            )
        solve = self.solve
        return replace(
            self, target=replace(self.target, beta=beta), facts=replace(self.facts, beta=beta), exact=None,
            solve=None if solve is None else lambda prompts: solve(prompts).at(beta),
        )  # fmt: skip

    # ---- prompts of a step, exact draws -----------------------------------------------------------------------

    def scene(self, count: int, n: int | None = None, batch_size: int = 1000) -> Scene:
        """The prompts of a training step, `count` of them (a single one is always itself); n: exact draws of each."""
        prompts, fresh = self.prompts.get("train"), self.fresh
        if fresh is not None:
            return lambda own: fresh(count, own)
        assert prompts is not None
        if len(prompts) == 1:
            supply = None if n is None else lambda own: self.exact_draws(prompts, n, own, batch_size, pilot=False)
            return OnePrompt(prompts, supply)

        def exact(some: Tokens, each: int, own: Stream) -> Samples:
            return self.exact_draws(some, each, own, batch_size, pilot=False)

        return SomePrompts(prompts, min(count, len(prompts)), None if n is None else exact, n or 1)

    def exact_draws(
        self, prompts: Tokens, n: int, own: Stream, batch_size: int = 1000, pilot: bool = True, **options: Any
    ) -> Samples:
        """`n` exact draws of pi* for each prompt, those of a prompt side by side. Raises ValueError where there is no way.

        options: further ones of `reject`, for a single prompt.
        """
        if self.exact is not None:
            return self.exact(prompts, n, own)
        why = self.facts.no_exact_draws()
        if why is not None:
            raise ValueError(why)
        assert self.facts.r_max is not None
        r_max = self.facts.r_max

        def part(begin: int, end: int) -> list[Samples]:
            return [
                reject(
                    self.target, prompts.select(slice(k, k + 1)), n=n, max_new_tokens=self.width, stream=own,
                    r_max=r_max, batch_size=batch_size, pilot=pilot, number=k, **options,
                )
                for k in range(begin, end)
            ]  # fmt: skip

        parts = ranks.in_shares(len(prompts), part)
        return parts[0] if len(parts) == 1 else joined(parts, prompts)

    @cached_property
    def atoms(self) -> tuple[float, ...]:
        """The rewards there are, or what stands for them where they are many: quantiles of the rewards of the reference's
        own draws, the same every time. A law of the reward is then over bins, each counting as its atom.
        """
        if self.facts.atoms is not None:
            return self.facts.atoms
        own = self.stream.child("atoms")
        prompts = self.scene(256)(own.child("scene"))[0]
        drawn = draw_in_batches(
            self.reference,
            prompts,
            n=-(-PILOT // len(prompts)),
            max_new_tokens=self.width,
            stream=own,
            batch_size=256,
        )
        reward = self.target.reward(drawn).double()
        found = torch.quantile(reward, torch.linspace(0, 1, QUANTILES, dtype=torch.float64, device=reward.device))
        atoms = tuple(sorted(set(found.tolist())))
        if len(atoms) < 2:
            raise ValueError(
                f"every draw of the reference has the reward {atoms[0]:.6g}: there is no law to learn"
            )
        return atoms

    # ---- networks -----------------------------------------------------------------------------------------------

    def copy(self) -> Any:
        """A fresh copy of the reference, ready to train."""
        if self.begin is not None:
            return self.begin()
        return copy.deepcopy(self.reference).requires_grad_(True)

    def loaded(self, folder: str | Path) -> LanguageModel:
        """The language model in a checkpoint's folder (or of a hub name), as this problem reads it; frozen."""
        if self.load is not None:
            return self.load(folder)
        if not isinstance(self.reference, CausalLM):
            model: Any = copy.deepcopy(self.reference)
            model.restore(Path(folder))
            return model
        model = CausalLM.load(folder, device=self.device, eos_ids=self.reference.eos_ids)
        model.tokenizer = self.reference.tokenizer
        if model.vocab_size != self.reference.vocab_size:
            both = f"{model.vocab_size} tokens, the reference {self.reference.vocab_size}"
            raise ValueError(f"{folder} knows {both}: they are not of one family, and no distance joins them")
        return model.requires_grad_(False)

    def refuse_other_words(self, name: str) -> None:
        """Raise ValueError where the tokenizer of the model called `name` has other texts for the reference's token ids: as
        many tokens are not the same tokens."""
        own = None if self.tokenizer is None else tokenizer_of(name)
        if own is None:
            return
        known, here = own.get_vocab(), self.tokenizer.get_vocab()
        other = next((text for text, i in here.items() if known.get(text) != i), None)
        if other is not None:
            of = f"token {here[other]} of the reference is {other!r}, which is {known.get(other, 'unknown')} there"
            raise ValueError(f"{name} knows another vocabulary ({of}): no distance joins the two")

    # ---- for people -----------------------------------------------------------------------------------------------

    def rows(self, samples: Samples) -> list[dict[str, Any]]:
        """Samples as rows of prompt, completion and whatever numbers are known."""
        if self.readable is not None:
            return list(self.readable(samples))
        return list(as_rows(samples, self.tokenizer, self.reference.eos_ids))

    # ---- in memory --------------------------------------------------------------------------------------------------

    @staticmethod
    def of(
        model: str | Path | LanguageModel,
        *,
        reward: str | Callable[..., Any],
        prompts: Sequence[str] | Sequence[Sequence[int]] | Tokens,
        beta: float,
        max_new_tokens: int,
        test_prompts: Sequence[str] | Sequence[Sequence[int]] | Tokens | None = None,
        r_max: float | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> Problem:
        """A problem of your own.

        model: a folder, a hub name, or a language model of this library. reward: a function of (prompts, completions),
        lists of texts, that returns one number each; a function of `Samples`; or a reward by name, as `tiltlm score` takes
        it. prompts: texts or lists of token ids; test_prompts: others to measure on (default: the same). r_max: an upper
        bound of the reward, for exact draws. stop: tokens that end a completion (default: those of the model's own files).

        >>> import tiltlm as tl
        >>> task = tl.Problem.of(model, reward=lambda prompts, completions: [len(y) for y in completions],
        ...                      prompts=["Once upon a time"], beta=1.0, max_new_tokens=8)    # doctest: +SKIP
        """
        reference, tokenizer = _model_of(model, stop, device)
        tokens: dict[Split, Tokens] = {"train": tokens_of(prompts, tokenizer, reference.device)}
        tokens["test"] = (
            tokens["train"] if test_prompts is None else tokens_of(test_prompts, tokenizer, reference.device)
        )
        judged, bound = _reward_of(reward, tokenizer, reference)
        most = bound if r_max is None else r_max
        facts = Facts(
            beta, number(tokens["train"]), r_max=None if math.isinf(most) else most,
            network=isinstance(reference, CausalLM), bound_at="r_max", test_prompts=number(tokens["test"]),
            paid=isinstance(reward, str) and is_paid(reward),
        )  # fmt: skip
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more; got {max_new_tokens}")
        return Problem(
            Target(reference, judged, beta), tokens, max_new_tokens, stream(seed, "problem"), facts, tokenizer,
            begin=(lambda: steady(reference)) if isinstance(reference, CausalLM) else None,
        )  # fmt: skip


def number(prompts: Sequence[Any] | Tokens) -> Literal["one", "several"]:
    """How many prompts these are, as `Facts` has it."""
    return "one" if len(prompts) == 1 else "several"


def _model_of(
    model: str | Path | LanguageModel, stop: Sequence[str], device: str | torch.device
) -> tuple[LanguageModel, Any]:
    if isinstance(model, LanguageModel):
        return model.eval().requires_grad_(False), getattr(model, "tokenizer", None)
    reference = CausalLM.load(model, device=device, eos_ids=ends_of(model, stop, "stop"))
    reference.tokenizer = tokenizer_of(str(model))
    return reference.requires_grad_(False), reference.tokenizer


def tokens_of(prompts: Any, tokenizer: Any, device: torch.device) -> Tokens:
    """Prompts (Tokens, texts or lists of ids; one text alone too) as Tokens. Raises ValueError for empty ones."""
    if isinstance(prompts, Tokens):
        return prompts.to(device)
    if isinstance(prompts, str):
        prompts = [prompts]
    if not len(prompts):
        raise ValueError("there are no prompts: give one or more texts, or lists of token ids")
    if tokenizer is None and any(isinstance(each, str) for each in prompts):
        raise ValueError("the prompts are texts, but the model has no tokenizer: give lists of token ids")
    ids = [list(tokenizer(each)["input_ids"]) if isinstance(each, str) else list(each) for each in prompts]
    empty = [k for k, row in enumerate(ids) if not row]
    if empty:
        raise ValueError(f"prompt {empty[0]} has no tokens: a language model needs one to begin with")
    return Tokens.of(ids, device)


def _reward_of(reward: Any, tokenizer: Any, reference: LanguageModel) -> tuple[Reward, float]:
    """r(x, y) of samples, without what ended a completion, and its upper bound (infinite: unknown)."""
    if isinstance(reward, str):
        named = TextReward(reward, tokenizer, str(reference.device))
        return without_ends(named, reference.eos_ids), named.function.most
    if not callable(reward):
        raise ValueError(f"a reward is a function or a name; got {type(reward).__name__}")
    parameters = [
        p
        for p in inspect.signature(reward).parameters.values()
        if p.default is p.empty and p.kind < p.VAR_POSITIONAL
    ]
    if len(parameters) == 1:
        return reward, math.inf
    if tokenizer is None:
        raise ValueError("a reward of texts needs a tokenizer: give the model one, or a function of Samples")
    return without_ends(OfFunction(reward, tokenizer), reference.eos_ids), math.inf


def without_ends(reward: Reward, eos_ids: Sequence[int]) -> Reward:
    """`reward` of completions without the token that ended them."""
    if not eos_ids:
        return reward
    return lambda samples: reward(samples.with_(mask=samples.mask & ~is_end(samples.tokens, eos_ids)))


def as_rows(samples: Samples, tokenizer: Any, eos_ids: Sequence[int] = ()) -> Iterable[dict[str, Any]]:
    """Rows of prompt, completion (texts, or ids where there is no tokenizer), and the numbers known of each."""
    done = [without_end(row, eos_ids) for row in samples.completions.lists()]
    used, which = samples.prompt_index.unique(return_inverse=True)
    asked: Sequence[Any] = samples.prompts.select(used).lists()
    if tokenizer is not None:
        asked = tokenizer.batch_decode(asked, skip_special_tokens=True)
    prompts = [asked[k] for k in which.tolist()]
    texts: Sequence[Any] = done if tokenizer is None else tokenizer.batch_decode(done)
    columns = {name: x for name, x in samples.optional().items() if x.is_floating_point()}
    numbers = {name: (x.sum(1) if x.ndim == 2 else x).tolist() for name, x in columns.items()}
    follow = None
    if isinstance(samples.prompts, Conditioned):
        ids = samples.prompts.conditions.select(samples.prompt_index).lists()
        follow = ids if tokenizer is None else tokenizer.batch_decode(ids)
    for k, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        row = {"prompt": prompt, "completion": text} | ({} if follow is None else {"must follow": follow[k]})
        yield {**row, **{name: values[k] for name, values in numbers.items()}}
