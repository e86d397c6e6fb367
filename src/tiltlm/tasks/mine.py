"""A target of your own: any model, prompts of a file (or one text), and a reward by name, a function of yours say.

A reward that takes columns (`def f(prompts, completions, answer)`) gets those of its prompt's row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
import tyro
from torch import Tensor

from tiltlm.data.asked import Asked, ids_of, of_hub, read_prompts
from tiltlm.data.wording import Wording
from tiltlm.models.causal import CausalLM, steady
from tiltlm.objective import positive
from tiltlm.problem import Facts, Problem, without_ends
from tiltlm.rewards.by_name import TextFunction, TextReward, files_of, is_paid, most_of, text_function
from tiltlm.run import Run
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.settings import ADDED
from tiltlm.target import Reward, Target
from tiltlm.tasks.language import Flat, Language, OfLanguage, reward_terms

NONE = "none"
"""The reward that is 0 of everything: then pi* is the reference."""


@dataclass(frozen=True)
class Mine(OfLanguage):
    """Your own model, prompts and reward."""

    language: Flat = Language(prompt="Once upon a time")
    prompts: str = ""
    """Prompts to train on: a file (.jsonl, .json, .csv, .tsv, .parquet, .txt), folder or hub data set of rows with `prompt`
    or `question` (text, messages or token ids); or of the project's own making, stories:N (openings) or arithmetic:N.
    Empty: the one text of --task.prompt."""

    test_prompts: str = ""
    """Prompts to measure on, likewise (empty: those to train on)."""

    test_rows: int = 0
    """Without test prompts: hold out so many rows at random, and measure on these (0: on those that are trained on)."""

    reward: str = ""
    """FILE.py:FUNCTION, f(prompts, completions, **columns) -> one number each; or any reward by name, as `tiltlm score`
    takes it, or a sum: 'mine.py:f + 0.5*classifier:MODEL:LABEL'."""

    beta: float = 1.0
    """Divides the reward: smaller leans harder on it."""

    r_max: float | None = None
    """An upper bound of the reward, for exact draws by rejection (not named: the sum of its terms' own, where each has
    one)."""

    atoms: tuple[float, ...] = ()
    """The rewards there are, or a grid that covers them: what value methods (Q#, CD) learn a law over."""

    template: str = field(default="", metadata=ADDED)
    """A text with {prompt} in it that the model goes on from, or alpaca or tulu; rewards see the bare prompt (empty:
    prompts as they are). Messages keep their chat template."""

    prompt_tokens: int = field(default=0, metadata=ADDED)
    """Only so many of each prompt's first tokens are kept (0: all)."""

    name: tyro.conf.Suppress[str] = "mine"
    shows: ClassVar[tuple[str, ...]] = (
        "language.model",
        "prompts",
        "language.prompt",
        "reward",
        "beta",
        "language.new_tokens",
        "r_max",
    )

    def __post_init__(self) -> None:
        positive(beta=self.beta)
        _ = self.wording
        if self.test_rows < 0 or (self.test_rows and (self.test_prompts or not self.prompts)):
            raise ValueError("test-rows are held out of --task.prompts, where there are no --task.test-prompts")

    # ---- what is known before anything is built -----------------------------------------------------------------

    def facts(self) -> Facts:
        most = most_of(self.reward) if self.r_max is None and self.reward not in ("", NONE) else self.r_max
        return Facts(
            self.beta, "several" if self.several() else "one", r_max=None if most is None or math.isinf(most) else most,
            atoms=self.atoms or None, test_prompts="several" if self.several("test") else "one",
            paid=self.reward not in ("", NONE) and is_paid(self.reward),
        )  # fmt: skip

    def several(self, split: str = "train") -> bool:
        """Whether there are several prompts of a split. Of a data set of the hub, which is not asked for that, and of a
        file that is not here any more, as of a run that is read elsewhere, that is taken to be so."""
        source = (split == "test" and self.test_prompts) or self.prompts
        try:
            return (bool(source) and of_hub(source)) or len(self.rows(split)) > 1
        except FileNotFoundError:
            return True

    @property
    def wording(self) -> Wording:
        return Wording(self.template, self.prompt_tokens)

    @property
    def function(self) -> TextFunction | None:
        """The reward, none of its networks loaded. Raises ValueError or FileNotFoundError where there is no such reward."""
        return text_function(self.reward) if self.reward not in ("", NONE) else None

    def rows(self, split: str, seed: int = 0) -> list[Asked]:
        """The prompts of a split."""
        if not self.prompts:
            lm = self.language
            one = [Asked("--task.prompt", list(lm.prompt_ids) or lm.prompt, None, {})]
            return read_prompts(self.test_prompts, "test") if self.test_prompts and split == "test" else one
        if self.test_prompts:
            return read_prompts(*((self.test_prompts, "test") if split == "test" else (self.prompts, "train")))
        rows = read_prompts(self.prompts)
        if not self.test_rows:
            return rows
        if self.test_rows >= len(rows):
            raise ValueError(
                f"{self.prompts} has {len(rows)} rows: {self.test_rows} held out leave none to train on"
            )
        order = stream(seed, "mine").child("split").permutation(len(rows)).tolist()
        held = set(order[: self.test_rows])
        return [row for k, row in enumerate(rows) if (k in held) == (split == "test")]

    def check(self) -> None:
        super().check()
        if not self.reward:
            raise ValueError("say what is wanted: --task.reward FILE.py:FUNCTION, or a reward by name")
        function = self.function
        for split in ("train", "test"):
            rows = self.rows(split)
            if function is not None:
                self._check_columns(function, rows)

    def _check_columns(self, function: TextFunction, rows: Sequence[Asked]) -> None:
        """Raise ValueError where the reward takes a column that some row does not have."""
        for row in rows:
            has = ", ".join(row.about) or "no other columns"
            function.check_columns(tuple(row.about), f"{row.where} has {has}")

    def files(self) -> list[str]:
        named = [
            self.prompts,
            self.test_prompts,
            *(files_of(self.reward) if self.reward not in ("", NONE) else ()),
        ]
        return super().files() + [name for name in named if name]

    def untilted(self) -> Self:
        return replace(self, reward=NONE, beta=1.0, r_max=None, atoms=())

    # ---- the problem ----------------------------------------------------------------------------------------------

    def problem(self, runs: Mapping[str, Run[Any]], seed: int) -> Problem:
        reference = self.language.reference(runs)
        tokenizer, wording = reference.tokenizer, self.wording
        rows = {
            split: [wording.cut(row, tokenizer) for row in self.rows(split, seed)] for split in ("train", "test")
        }
        prompts = {split: self.encoded(own, reference) for split, own in rows.items()}
        judged = self.judged_rows(reference, rows, prompts)
        return Problem(
            Target(reference, without_ends(judged, reference.eos_ids), self.beta), prompts,  # type: ignore[arg-type]
            self.language.new_tokens, stream(seed, "mine"), self.facts(), tokenizer,
            checks=reward_terms(judged, reference), begin=lambda: steady(reference),
            **of_texts(judged, reference),
        )  # fmt: skip

    def encoded(self, rows: Sequence[Asked], reference: CausalLM) -> Tokens:
        """The prompts, in their template, as tokens. Raises ValueError, naming the row, for one that does not fit into the
        model."""
        most = self.language.positions() - self.language.new_tokens
        worded = [self.wording.around(row) for row in rows]
        return Tokens.of(ids_of(worded, reference.tokenizer, reference.vocab_size, most), reference.device)

    def judged_rows(
        self, reference: CausalLM, rows: Mapping[str, Sequence[Asked]], prompts: Mapping[str, Tokens]
    ) -> Reward:
        """The reward of texts: of the bare prompt, with the columns of its row."""
        if self.reward in ("", NONE):
            return nothing
        function = self.function
        takes_columns = function is not None and function.takes_columns
        about: dict[str, Mapping[str, Any]] = {}
        bare: dict[str, str] = {}
        for split, own in rows.items() if takes_columns or self.template else ():
            texts = reference.tokenizer.batch_decode(prompts[split].lists(), skip_special_tokens=True)
            for text, row in zip(texts, own, strict=True):
                asked = bare.setdefault(
                    text, row.prompt if self.template and isinstance(row.prompt, str) else text
                )
                if takes_columns and about.setdefault(asked, row.about) != row.about:
                    raise ValueError(
                        f"{row.where}: the same prompt stands in another row with other columns, and a reward of texts "
                        "cannot tell the two apart"
                    )
        return TextReward(
            self.reward, reference.tokenizer, str(reference.device), about.__getitem__ if takes_columns else None,
            bare.__getitem__ if self.template else None,
        )  # fmt: skip


def nothing(samples: Samples) -> Tensor:
    """r = 0."""
    return torch.zeros(len(samples), device=samples.device)


def of_texts(judged: Reward, reference: CausalLM) -> dict[str, Any]:
    """What a judge of texts needs of a problem; nothing where the reward is none of texts."""
    if not isinstance(judged, TextReward):
        return {}
    return {"texts": without_ends(judged.texts, reference.eos_ids), "reward_of_texts": judged.of}  # type: ignore[arg-type]
