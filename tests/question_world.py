"""Four questions of letters, and a small model that answers them: everything that questions need, from folders on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiltlm.problem import Split
from tiltlm.questions.base import Grade, Grader, Question
from tiltlm.recipes.preset import Preset
from tiltlm.settings import SPEED
from tiltlm.tasks.language import Flat, Language
from tiltlm.tasks.questions import OfQuestions

TASKS: dict[str, str] = {"letters": "four questions"}
PIECES = ["<unk>", "<s>", "</s>", "\n", "?", "Answer:", " ", *"ABCD", *(f" {c}" for c in "ABCD"), *"1234", " A1"]
QUESTIONS = [
    Question(7, "1?", "A", ("1", "2", "3"), "sums"),
    Question(3, "2?", "C", ("1", "2", "11", "A"), "sums"),
    Question(12, "34?", "A", ("4", "3"), "words"),
    Question(5, "4?", "D", ("1", "2", "3", "4"), "words"),
]


@dataclass(frozen=True)
class FirstLetter:
    """The first letter among A to D; only finished answers are right."""

    def grade(self, question: Question, completion: str, finished: bool) -> Grade:
        answer = next((c for c in completion if c in "ABCD"), "")
        return Grade(finished and answer == question.answer, answer, "letter" if answer else "")


@dataclass(frozen=True)
class Letters(OfQuestions):
    """Four questions, the same in every split."""

    name: str = "letters"
    beta: float = 0.5
    language: Flat = field(default=Language(new_tokens=3, stop=("</s>",)))
    device: str = field(default="cpu", metadata=SPEED)

    @property
    def grader(self) -> Grader:
        return FirstLetter()

    def asked(self, split: Split, seed: int) -> Sequence[Question]:
        return QUESTIONS

    def put(self, question: Question, tokenizer: Any, hint: bool = False) -> list[int]:
        options = "".join(f"\n{c} {text}" for c, text in zip("ABCD", question.choices, strict=False))
        return list(tokenizer(f"<s>{question.text}{options}\n")["input_ids"])


def preset(name: str) -> Preset:
    return Preset(Letters())


def tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({piece: k for k, piece in enumerate(PIECES)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"Answer:| A1| [A-D]|[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def written(folder: Path, seed: int = 8, layers: int = 1) -> Path:
    """A random GPT-2 with this tokenizer; of seed 8 it answers some questions right, and some draws end."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    size = {"n_layer": layers, "n_head": 2, "n_embd": 16, "n_positions": 64, "initializer_range": 0.6}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(PIECES), bos_token_id=1, eos_token_id=2, **size))
    model.save_pretrained(str(folder))
    tokenizer().save_pretrained(str(folder))
    return folder


def install(monkeypatch: Any) -> None:
    """Put the task into the catalogue."""
    from tiltlm import recipes

    known = recipes.tasks()
    monkeypatch.setattr(recipes, "tasks", lambda: known | {"letters": ("question_world", TASKS["letters"])})
