"""Star graphs as tokens, and the checker of answers.

A prompt is a line of `star_graph` up to and including '='; its answer is the path (goal first if the world says
`reverse`). Every node and every sign is one token, so all rows of a world have equal lengths:

    numeral    node i -> i, '|' -> N, '=' -> N+1, '/' -> N+2, '$' -> N+3, commas dropped:  3E+3 and l tokens
    BPE        any Hugging Face tokenizer that keeps nodes whole, commas stay:             4E+4 and 2l−1 tokens

(E = d(l−1) edges; with commas, node t of an answer stands at place 2t.) '$' is the dummy of teacherless training:
it stands in the answer's place in the input, and all answer tokens are predicted at once.

Checking works on token ids. A completion is *well formed* if it has the answer's length and a node (or comma)
wherever one belongs; it is a *valid arm* if it is, token by token, one of the d arms of its prompt's graph; it is
*exact* if it is the arm that ends in the goal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tiltlm.data.star_graph import Graphs, StarGraph, arms, generate, to_lines
from tiltlm.models.base import LanguageModel
from tiltlm.rewards.exact_answer import agreement, answers_of
from tiltlm.samples import Samples, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Alphabet:
    """The token ids of nodes 0 … N−1 and of the signs; `comma` None: commas are dropped."""

    nodes: tuple[int, ...]
    bar: int
    equals: int
    slash: int
    dummy: int
    comma: int | None = None


@dataclass(frozen=True)
class AnswerKey:
    """All it takes to check completions of P prompts.

    answers  Tokens [P, T]: the right answers
    arms     int64 [P, d, T]: every arm of every graph, as an answer would be written
    allowed  bool [T, V]: which tokens are well formed at each place
    """

    answers: Tokens
    arms: Tensor
    allowed: Tensor


class GraphTokenizer(ABC):
    """Graphs of one world -> token ids and back. Encodings are vectorised and on the CPU."""

    def __init__(self, world: StarGraph, alphabet: Alphabet, vocab_size: int) -> None:
        self.world, self.alphabet, self.vocab_size = world, alphabet, vocab_size
        self._node_ids = np.array(alphabet.nodes, dtype=np.int64)
        self._step = 1 if alphabet.comma is None else 2

    @property
    @abstractmethod
    def hf(self) -> PreTrainedTokenizerBase:
        """The same tokenizer as transformers has them, to save beside a model's weights."""

    @abstractmethod
    def decode(self, rows: Tokens) -> list[str]:
        """Texts of token rows, commas included; the text of prompt and answer together is the graph's line."""

    @property
    def prompt_length(self) -> int:
        """3E + 3 tokens, or 4E + 4 with commas."""
        return (2 + self._step) * (self.world.edges + 1)

    @property
    def target_length(self) -> int:
        """T = l tokens, or 2l − 1 with commas."""
        return self._step * (self.world.path_length - 1) + 1

    def encode(self, graphs: Graphs) -> tuple[Tokens, Tokens]:
        """Prompts [n, prompt_length] and answers [n, T]. Raises ValueError if the graphs are another world's."""
        return self.prompts(graphs), self.completions(graphs.path)

    def prompts(self, graphs: Graphs) -> Tokens:
        """Tokens [n, prompt_length], up to and including '='."""
        self._check(graphs)
        ends = graphs.path[:, None, [0, -1]]
        pairs = self._node_ids[np.concatenate([graphs.edges, ends], axis=1)]  # [n, E + 1, 2]
        block = np.empty((*pairs.shape[:2], 2 + self._step), dtype=np.int64)
        block[:, :, 0], block[:, :, self._step] = pairs[:, :, 0], pairs[:, :, 1]
        if self.alphabet.comma is not None:
            block[:, :, 1] = self.alphabet.comma
        signs = self.alphabet
        block[:, :, -1] = [*[signs.bar] * (self.world.edges - 1), signs.slash, signs.equals]
        return Tokens.full(torch.from_numpy(block.reshape(len(graphs), -1)))

    def completions(self, paths: np.ndarray) -> Tokens:
        """Node sequences [n, l], start first, as answers: Tokens [n, T], turned if the world says `reverse`."""
        return Tokens.full(torch.from_numpy(self._written(paths)))

    def _written(self, paths: np.ndarray) -> np.ndarray:
        """Paths [..., l] -> ids [..., T]."""
        if self.world.reverse:
            paths = paths[..., ::-1]
        ids = np.empty((*paths.shape[:-1], self.target_length), dtype=np.int64)
        ids[..., :: self._step] = self._node_ids[paths]
        if self.alphabet.comma is not None:
            ids[..., 1::2] = self.alphabet.comma
        return ids

    def key(self, graphs: Graphs) -> AnswerKey:
        """The key to completions of `prompts(graphs)`. Raises ValueError for graphs that are no star graphs."""
        self._check(graphs)
        allowed = torch.zeros(self.target_length, self.vocab_size, dtype=torch.bool)
        allowed[:: self._step, self._node_ids] = True
        if self.alphabet.comma is not None:
            allowed[1::2, self.alphabet.comma] = True
        return AnswerKey(self.completions(graphs.path), torch.from_numpy(self._written(arms(graphs))), allowed)

    def teacherless(self, n: int) -> Tokens:
        """n rows of '$' [n, T]: set behind the prompts as inputs, they hide the answers that are predicted.

        They line up with the answers: the prediction of answer token t is read where token t − 1 would stand,
        so the last '$' is never read from.
        """
        return Tokens.full(torch.full((n, self.target_length), self.alphabet.dummy))

    def _check(self, graphs: Graphs) -> None:
        edges, length = graphs.edges.shape[1], graphs.path.shape[1]
        if (edges, length) != (self.world.edges, self.world.path_length):
            raise ValueError(
                f"graphs of {self.world.file_stem} have {self.world.edges} edges and paths of "
                f"{self.world.path_length} nodes; got {edges} and {length}: make the tokenizer for their world"
            )
        highest = int(max(graphs.edges.max(initial=0), graphs.path.max(initial=0)))
        if highest >= self.world.nodes:
            raise ValueError(f"labels must be below {self.world.nodes} (nodes of the world); got {highest}")


class NumeralTokenizer(GraphTokenizer):
    """The task's own tokens: node i is id i, then | = / $; commas are dropped."""

    def __init__(self, world: StarGraph) -> None:
        n = world.nodes
        signs = Alphabet(nodes=tuple(range(n)), bar=n, equals=n + 1, slash=n + 2, dummy=n + 3)
        super().__init__(world, signs, world.vocab_size)

    def decode(self, rows: Tokens) -> list[str]:
        """Texts of token rows; neighbouring nodes get their comma back. Raises ValueError for an unknown id."""
        return [self._text(row) for row in rows.lists()]

    @property
    def hf(self) -> PreTrainedTokenizerBase:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        numbers = {str(i): i for i in self.alphabet.nodes}
        signs = {sign: self.world.nodes + k for k, sign in enumerate("|=/$")}
        tokenizer = Tokenizer(models.WordLevel(numbers | signs))
        tokenizer.normalizer = normalizers.Replace(",", " ")
        isolated = pre_tokenizers.Split(Regex("[|=/$]"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([isolated, pre_tokenizers.WhitespaceSplit()])
        comma_first = decoders.Replace(Regex("^(?=[0-9])"), ",")
        after_signs = decoders.Replace(Regex("^,|(?<=[|=/$]),"), "")
        tokenizer.decoder = decoders.Sequence([comma_first, decoders.Fuse(), after_signs])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    def _text(self, row: list[int]) -> str:
        n, text = self.world.nodes, ""
        for place, i in enumerate(row):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token ids run from 0 to {self.vocab_size - 1}; got {i} at place {place}")
            comma = "," if place and i < n and row[place - 1] < n else ""
            text += comma + (str(i) if i < n else "|=/$"[i - n])
        return text


class BPETokenizer(GraphTokenizer):
    """A Hugging Face tokenizer's ids (GPT-2's, in the paper).

    Raises ValueError if a node or sign is not one token, or if tokens of a whole line are not those of its
    pieces: rows would then differ in length and nodes have no fixed place.
    """

    def __init__(self, world: StarGraph, tokenizer: PreTrainedTokenizerBase) -> None:
        self._hf = tokenizer
        nodes = tuple(self._single(str(node)) for node in range(world.nodes))
        bar, equals, slash, dummy, comma = (self._single(sign) for sign in "|=/$,")
        super().__init__(world, Alphabet(nodes, bar, equals, slash, dummy, comma), len(tokenizer))
        self._check_lines()

    @property
    def hf(self) -> PreTrainedTokenizerBase:
        return self._hf

    def decode(self, rows: Tokens) -> list[str]:
        """Texts of token rows; nothing is skipped or cleaned up."""
        clean = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [str(self._hf.decode(row, **clean)) for row in rows.lists()]

    def _single(self, piece: str) -> int:
        ids = self._hf.encode(piece, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"every node and sign must be one token, so that all rows have equal length; this tokenizer "
                f"splits {piece!r} into {len(ids)}. Take fewer nodes, or NumeralTokenizer"
            )
        return ids[0]

    def _check_lines(self) -> None:
        """Tokens of whole lines against their pieces', on enough graphs to show every label."""
        enough = 4 + 4 * self.world.nodes // (self.world.edges + 1)
        graphs = generate(self.world, enough, np.random.default_rng(0))
        prompts, answers = self.prompts(graphs), Tokens.full(torch.from_numpy(self._forwards(graphs)))
        for line, ours in zip(to_lines(graphs), prompts.followed_by(answers).lists(), strict=True):
            theirs = self._hf.encode(line, add_special_tokens=False)
            if ours != theirs:
                raise ValueError(
                    f"this tokenizer joins signs and nodes: {line!r} becomes {len(theirs)} tokens, and its "
                    f"pieces {len(ours)}, so rows would differ in length. Take NumeralTokenizer"
                )

    def _forwards(self, graphs: Graphs) -> np.ndarray:
        """Answers as a line has them, whatever `reverse` says."""
        return self._written(graphs.path[:, ::-1] if self.world.reverse else graphs.path)


@dataclass(frozen=True)
class Checked:
    """What N completions are worth; all bool.

    exact         [N]: the answer, token by token and in length
    per_token     [N, T]: the token at this place is the answer's
    valid_arm     [N]: some arm of the graph, from the start to the arm's end
    format_error  [N]: not the answer's number of tokens, or not a node (comma) wherever one belongs
    """

    exact: Tensor
    per_token: Tensor
    valid_arm: Tensor
    format_error: Tensor


def check(samples: Samples, key: AnswerKey) -> Checked:
    """Compare each row with the key of its prompt. `key` must come from the graphs of `samples.prompts`, in order.

    Raises ValueError if the numbers of prompts differ.
    """
    answers = answers_of(samples, key.answers)
    whole = samples.mask.sum(1) == answers.lengths
    width = key.allowed.shape[0]
    per_token = agreement(samples.completions, answers)[:, :width]
    ids = torch.nn.functional.pad(samples.tokens, (0, max(0, width - samples.tokens.shape[1])))[:, :width]
    arms = key.arms.to(samples.device)[samples.prompt_index]
    valid_arm = whole & (ids[:, None] == arms).all(2).any(1)
    allowed = key.allowed.to(samples.device)
    known = (ids >= 0) & (ids < allowed.shape[1])
    place = torch.arange(width, device=samples.device)
    well_formed = known & allowed[place, ids.clamp(0, allowed.shape[1] - 1)]
    return Checked(whole & per_token.all(1), per_token, valid_arm, ~(whole & well_formed.all(1)))


@torch.no_grad()
def forced(model: LanguageModel, samples: Samples, *, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Teacher forcing: how well each token of `samples` is predicted behind its true predecessors.

    Returns loss, −log p in nats [N, T] (0 at padding), and correct, whether the token is the likeliest one, bool
    [N, T] (False at padding). `model` sees at most `batch_size` rows at once.
    """
    if samples.tokens.numel() == 0:
        return torch.zeros(samples.tokens.shape, device=samples.device), samples.mask.clone()
    begins = range(0, len(samples), batch_size)
    parts = [_forced(model, samples.select(slice(begin, begin + batch_size))) for begin in begins]
    losses, hits = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(hits)


def _forced(model: LanguageModel, samples: Samples) -> tuple[Tensor, Tensor]:
    state = model.start(samples.row_prompts, samples.tokens.shape[1])
    losses, hits = [], []
    for t, token in enumerate(samples.tokens.unbind(1)):
        log_p = state.log_next()
        losses.append(-log_p.gather(1, token[:, None])[:, 0])
        hits.append(log_p.argmax(1) == token)
        if t + 1 < samples.tokens.shape[1]:
            state.append(token)
    loss, hit = torch.stack(losses, 1), torch.stack(hits, 1)
    return torch.where(samples.mask, loss, torch.zeros_like(loss)), hit & samples.mask
