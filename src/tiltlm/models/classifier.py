"""`TextClassifier`: any Hugging Face sequence-classification model, asked for log-probabilities of its classes.

Models with one output state the log-odds of class 1: (log σ(−z), log σ(z)). The classifier has a tokenizer of its
own and reads text, so it can judge completions of any reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tiltlm.models.backbone import fuse_activations, hidden
from tiltlm.models.hub import config_of, network, pretrained
from tiltlm.models.selftest import examine
from tiltlm.models.weights import load_state, save_pretrained
from tiltlm.samples import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TextClassifier(nn.Module):
    """`model` and its `tokenizer`; texts are cut at `most_tokens`."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, most_tokens: int | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        limit = getattr(model.config, "max_position_embeddings", None) or 512
        limit = min(limit, tokenizer.model_max_length)  # RoBERTa counts two positions that hold no token
        self.most_tokens = min(limit, most_tokens or limit)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id or 0
        fuse_activations(model)
        _examine(model)

    @property
    def head(self) -> nn.Linear | None:
        """The linear head of a causal body, read at a row's last token; None for other bodies."""
        return _head_of(self.model)

    @staticmethod
    def load(
        name: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> TextClassifier:
        """A folder or hub name that transformers loads as a sequence classifier."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        model, found = network(AutoModelForSequenceClassification, name, device, _examine, dtype=dtype)
        if found["missing_keys"]:
            raise ValueError(
                f"{str(name)!r} has no trained classification head ({', '.join(sorted(found['missing_keys']))} missing)"
            )
        return TextClassifier(model, pretrained(AutoTokenizer, name)).eval()

    @staticmethod
    def from_body(
        name: str | Path, labels: Sequence[str], *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> TextClassifier:
        """The body of a language model (folder or hub name) with a fresh head for `labels`; float32."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        names = {"id2label": dict(enumerate(labels)), "label2id": {label: k for k, label in enumerate(labels)}}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, _ = network(
                AutoModelForSequenceClassification,
                name,
                device,
                _examine,
                num_labels=len(labels),
                dtype=torch.float32,
                **names,
            )
        return TextClassifier(model, pretrained(AutoTokenizer, name))

    @property
    def labels(self) -> list[str]:
        """The classes' names; of a model with one output two, the second being what it states the odds of."""
        return labels_of(self.model.config)

    def index_of(self, label: str) -> int:
        """The number of the class called `label` (its name, or its number). Raises ValueError naming the
        classes."""
        return class_called(label, self.labels)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, int64 [N, L], right-padded; an empty text becomes one padding token."""
        pad = int(self.model.config.pad_token_id)
        found = self.tokenizer(list(texts), truncation=True, max_length=self.most_tokens)["input_ids"]
        rows = [ids or [pad] for ids in found]
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = next(self.model.parameters()).device
        return ids.to(device), mask.to(device)

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Class logits [N, C]. Causal models are read at the last real token, whatever the padding token is."""
        if self.head is None:
            return self.model(input_ids=ids, attention_mask=mask).logits
        states = hidden(self.model, Tokens(ids, mask.bool()))
        return self.head(states[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1])

    @torch.no_grad()
    def log_probs(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """log P(class | text), float32 [N, C], nats; rows of like length are judged together."""
        order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
        parts = []
        for begin in range(0, len(texts), batch_size):
            some = [texts[k] for k in order[begin : begin + batch_size]]
            parts.append(log_classes(self.logits(*self.encode(some))))
        found = torch.cat(parts)
        return torch.empty_like(found).index_copy(0, torch.tensor(order, device=found.device), found)

    def save(self, folder: str | Path) -> None:
        """Write a folder that transformers reads, tokenizer included."""
        save_pretrained(self.model, folder)
        self.tokenizer.save_pretrained(str(folder))

    def restore(self, folder: str | Path) -> None:
        """Take the weights that `save` wrote to `folder`, bit by bit."""
        from transformers import AutoModelForSequenceClassification

        kind, dtype = AutoModelForSequenceClassification, self.model.dtype
        load_state(self.model, lambda: kind.from_pretrained(str(folder), dtype=dtype).state_dict())


def _head_of(model: PreTrainedModel) -> nn.Linear | None:
    head = getattr(model, "score", None)
    return head if isinstance(head, nn.Linear) else None


def _examine(model: PreTrainedModel) -> None:
    """The self-test of a network on a causal body."""
    if _head_of(model) is not None:
        examine(model)


def labels_of(config: Any) -> list[str]:
    """The names of the classes that a sequence classifier's configuration states; of one output two."""
    names = [str(config.id2label[k]) for k in range(config.num_labels)]
    return names if len(names) > 1 else [f"not {names[0]}", names[0]]


def class_called(label: str, labels: Sequence[str]) -> int:
    """The number of the class called `label`, by its name or its number. Raises ValueError naming the classes."""
    if label in labels:
        return labels.index(label)
    if label.isdigit() and int(label) < len(labels):
        return int(label)
    raise ValueError(f"the classifier has no class {label!r}; it has {', '.join(labels)}")


def classifier_config(name: str | Path) -> Any:
    """The configuration of the sequence classifier called `name`, its weights unread.

    Raises ValueError where there is no such model, or its configuration says that it is another kind.
    """
    config = config_of(name)
    kinds = config.architectures or []
    if kinds and not any("Classification" in kind for kind in kinds):
        raise ValueError(f"{str(name)!r} is a {kinds[0]} and has no trained classification head")
    return config


def log_classes(logits: Tensor) -> Tensor:
    """Log-probabilities of classes from logits [N, C], float32; one logit states the odds of class 1 of two."""
    logits = logits.float()
    if logits.shape[1] == 1:
        return torch.cat([logsigmoid(-logits), logsigmoid(logits)], 1)
    return torch.log_softmax(logits, 1)
