"""`RewardModel`: a Hugging Face sequence classifier with one output, read as r(x, y).

On a causal body the output is a linear head without bias on the last real token of prompt and completion, found by
length, never by looking for a padding id. Prompt and completion are encoded apart and their ids joined, so a completion's
tokens do not depend on what stands before it; an end-of-text token is not part of what is judged. Other bodies (BERT's
kin) read text pairs, as their tokenizers join them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiltlm.models.backbone import hidden_of
from tiltlm.models.classifier import TextClassifier
from tiltlm.models.hub import pretrained
from tiltlm.samples import Samples, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class RewardModel(nn.Module):
    """`model` (one output) and its `tokenizer`; texts are cut to `most_tokens`, prompts on the left."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, most_tokens: int | None = None) -> None:
        super().__init__()
        one_output(model.config)
        self.classifier = TextClassifier(model, tokenizer, most_tokens)

    @staticmethod
    def load(
        name: str | Path, *, device: torch.device | str = "cpu", most_tokens: int | None = None
    ) -> RewardModel:
        """A folder or hub name that transformers loads as a sequence classifier with one trained output; float32."""
        found = TextClassifier.load(name, device=device)
        return RewardModel(found.model, found.tokenizer, most_tokens).eval()

    @staticmethod
    def from_body(
        name: str | Path, *, seed: int = 0, most_tokens: int | None = None, device: torch.device | str = "cpu"
    ) -> RewardModel:
        """The body of a language model (folder or hub name) under a fresh head; float32."""
        from transformers import AutoTokenizer

        found = TextClassifier.from_body(name, ("reward",), seed=seed, device=device)
        return RewardModel(found.model, pretrained(AutoTokenizer, name), most_tokens)

    @property
    def head(self) -> nn.Linear | None:
        """The linear head of a causal body; None for other bodies."""
        return self.classifier.head

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, prompts: Sequence[str], completions: Sequence[str], together: int = 1) -> Samples:
        """Token ids of (prompt, completion) pairs; too long a pair loses the front of its prompt, then the end of its
        completion. Equal prompts, equally cut, are stored once.

        together: so many equal parts of the rows belong together, row by row (chosen, then rejected): their prompt is cut
        for the longest of them.
        """
        tokenizer, most = self.classifier.tokenizer, self.classifier.most_tokens
        answers = [ids[: most - 1] for ids in tokenizer(list(completions), add_special_tokens=False)["input_ids"]]
        n = len(answers) // together
        rooms = [
            most - max(len(answers[k % n + part * n]) for part in range(together)) for k in range(len(answers))
        ]
        ids_of = {text: tokenizer(text)["input_ids"] for text in dict.fromkeys(prompts)}
        asked = [
            tuple(_cut_left(ids_of[text], room, tokenizer.bos_token_id))
            for text, room in zip(prompts, rooms, strict=True)
        ]
        number = {ids: k for k, ids in enumerate(dict.fromkeys(asked))}
        done = Tokens.of(answers, self.device)
        index = torch.tensor([number[ids] for ids in asked], dtype=torch.int64, device=self.device)
        return Samples(Tokens.of(list(number), self.device), index, done.ids, done.mask)

    def score(self, samples: Samples) -> Tensor:
        """r of every row, float32 [N], with gradient; rows hold this model's own tokens, without end of text."""
        head = self.head
        if head is None:
            raise ValueError("this reward model reads text pairs, not tokens: use `scores`")
        last = samples.row_prompts.lengths + samples.mask.sum(1) - 1
        if bool((last < 0).any()):
            raise ValueError(f"row {int((last < 0).nonzero()[0])} has neither prompt nor completion to judge")
        states = hidden_of(self.classifier.model, samples)
        with torch.autocast(last.device.type, enabled=False):  # a reward is not to be rounded to bfloat16
            read = states[torch.arange(len(samples), device=last.device), last].to(head.weight.dtype)
            return head(read)[:, 0].float().clone()  # no view: FSDP2 warns of those

    @torch.no_grad()
    def scores(self, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64) -> Tensor:
        """r of every (prompt, completion), float32 [N]; pairs of like length are judged together."""
        order = sorted(range(len(prompts)), key=lambda k: (len(prompts[k]) + len(completions[k]), prompts[k]))
        found = torch.empty(len(prompts))
        for begin in range(0, len(order), batch_size):
            some = order[begin : begin + batch_size]
            found[some] = self._batch([prompts[k] for k in some], [completions[k] for k in some]).cpu()
        return found

    def _batch(self, prompts: list[str], completions: list[str]) -> Tensor:
        if self.head is not None:
            rows = self.encode(prompts, completions)
            return torch.cat([self.score(rows.select(part)) for part in rows.passes()])
        found = self.classifier.tokenizer(
            prompts, completions, truncation="longest_first", max_length=self.classifier.most_tokens, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        return self.classifier.model(**found.to(self.device)).logits[:, 0].float()

    def with_checkpointing(self) -> RewardModel:
        """This very model, made to compute its layers' activations again in the backward pass of training."""
        self.classifier.model.activation_checkpointing_enable({"use_reentrant": False})
        return self

    def save(self, folder: str | Path) -> None:
        """Write a folder that `AutoModelForSequenceClassification` reads, tokenizer included."""
        self.classifier.save(folder)

    def restore(self, folder: str | Path) -> None:
        """Take the weights that `save` wrote to `folder`, bit by bit."""
        self.classifier.restore(folder)


def one_output(config: PreTrainedConfig) -> None:
    """Raise ValueError for the configuration of a classifier with several classes."""
    if config.num_labels != 1:
        raise ValueError(
            f"a reward model has one output; this one has {config.num_labels} classes "
            "(take classifier:MODEL:LABEL to use a class's log-probability as reward)"
        )


def _cut_left(ids: list[int], most: int, bos_id: int | None) -> list[int]:
    """The last `most` of `ids`; a start token in front stays in front."""
    if len(ids) <= most:
        return ids
    if bos_id is not None and ids[0] == bos_id:
        return [bos_id, *ids[len(ids) - most + 1 :]] if most > 0 else []
    return ids[len(ids) - most :]
