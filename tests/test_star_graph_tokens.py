"""Star graphs as tokens: lengths and texts of both tokenizers, the checker on hand-made cases, forced scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from close import NETWORK, close
from families import build
from tiltlm.data.star_graph import StarGraph, arms, generate, parse_line, read_lines, to_lines
from tiltlm.data.star_graph_tokens import AnswerKey, BPETokenizer, GraphTokenizer, NumeralTokenizer, check, forced
from tiltlm.models.table import TableLM
from tiltlm.samples import Samples, Tokens

LINE = "32,3|16,12|3,19|32,34|34,6|6,16|19,47|47,28/32,12=32,34,6,16,12"
G25 = StarGraph(2, 5, 50)


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return AutoTokenizer.from_pretrained(str(shared_data / "tokenizers" / "gpt2"))


@pytest.fixture(params=["numeral", "bpe"])
def make(request):
    """World -> tokenizer, of both kinds."""
    if request.param == "numeral":
        return NumeralTokenizer
    hf = request.getfixturevalue("gpt2")
    return lambda world: BPETokenizer(world, hf)


def test_numeral_tokens_by_hand():
    world = StarGraph(2, 3, 10)
    prompts, answers = NumeralTokenizer(world).encode(parse_line("3,1|1,7|3,2|2,9/3,9=3,2,9", world))
    assert prompts.lists() == [[3, 1, 10, 1, 7, 10, 3, 2, 10, 2, 9, 12, 3, 9, 11]]
    assert answers.lists() == [[3, 2, 9]]
    assert NumeralTokenizer(world).teacherless(2).lists() == [[13, 13, 13]] * 2


@pytest.mark.parametrize("degree, length, total", [(2, 5, 32), (5, 5, 68), (3, 8, 74), (2, 20, 137)])
def test_numeral_lengths_are_the_published_ones(degree, length, total):
    world = StarGraph(degree, length, 50)
    tokenizer = NumeralTokenizer(world)
    prompts, answers = tokenizer.encode(generate(world, 3, np.random.default_rng(0)))
    assert prompts.ids.shape == (3, world.prompt_length) and answers.ids.shape == (3, world.target_length)
    assert prompts.ids.shape[1] + answers.ids.shape[1] == total
    assert (tokenizer.prompt_length, tokenizer.target_length) == (world.prompt_length, world.target_length)


def test_bpe_tokens_are_the_tokenizers_own_on_published_lines(shared_data, gpt2):
    path = shared_data / "star_graph" / "deg_2_path_5_nodes_50.txt"
    graphs = read_lines(path).select(slice(0, 200))
    tokenizer = BPETokenizer(G25, gpt2)
    prompts, answers = tokenizer.encode(graphs)
    assert prompts.ids.shape[1] == tokenizer.prompt_length == 4 * 8 + 4
    assert answers.ids.shape[1] == tokenizer.target_length == 2 * 5 - 1
    for line, row in zip(to_lines(graphs), prompts.followed_by(answers).lists(), strict=True):
        assert gpt2.encode(line) == row
        assert gpt2.encode(line[: line.index("=") + 1]) == row[:36]
    nodes = [int(gpt2.decode([i])) for i in answers.ids[0, ::2].tolist()]
    assert nodes == graphs.path[0].tolist() and tokenizer.vocab_size == 50257
    assert gpt2.decode(tokenizer.teacherless(1).ids[0].tolist()) == "$" * 9


def test_texts_of_prompt_and_answer_are_the_line(make):
    graphs = generate(G25, 20, np.random.default_rng(1))
    tokenizer = make(G25)
    prompts, answers = tokenizer.encode(graphs)
    assert tokenizer.decode(prompts.followed_by(answers)) == to_lines(graphs)


def test_reverse_turns_the_answer_and_nothing_else(make):
    graphs = parse_line(LINE, G25)
    forwards, backwards = make(G25), make(StarGraph(2, 5, 50, reverse=True))
    assert backwards.decode(backwards.encode(graphs)[1]) == ["12,16,6,34,32"]
    assert torch.equal(backwards.encode(graphs)[0].ids, forwards.encode(graphs)[0].ids)
    assert torch.equal(backwards.key(graphs).arms, forwards.key(graphs).arms.flip(2))
    answers = backwards.encode(graphs)[1]
    assert bool(check(drawn(backwards.encode(graphs)[0], answers), backwards.key(graphs)).valid_arm.all())


def test_an_unknown_id_is_refused():
    with pytest.raises(ValueError, match="0 to 53; got 54 at place 1"):
        NumeralTokenizer(G25).decode(Tokens.of([[3, 54]]))


def test_graphs_of_another_world_are_refused(make):
    tokenizer = make(StarGraph(2, 5, 20))
    with pytest.raises(ValueError, match=r"8 edges.*got 10 and 3"):
        tokenizer.encode(generate(StarGraph(5, 3, 20), 2, np.random.default_rng(0)))
    with pytest.raises(ValueError, match=r"below 20.*got 47"):
        tokenizer.encode(parse_line(LINE, G25))


def test_a_tokenizer_that_splits_nodes_is_refused_at_once(gpt2):
    BPETokenizer(StarGraph(2, 3, 521), gpt2)
    with pytest.raises(ValueError, match="splits '521' into 2"):
        BPETokenizer(StarGraph(2, 3, 522), gpt2)


class Gluing:
    """Stands for a tokenizer whose pieces are single tokens but which joins '=' and a digit in a line."""

    def __len__(self) -> int:
        return 200

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [7] if len(text) == 1 else [ord(c) for c in text.replace("=1", "@")]


def test_a_tokenizer_that_joins_pieces_is_refused_at_once():
    with pytest.raises(ValueError, match="joins signs and nodes"):
        BPETokenizer(StarGraph(2, 3, 10), Gluing())  # type: ignore[arg-type]


def drawn(prompts: Tokens, completions: Tokens, index: list[int] | None = None) -> Samples:
    where = torch.arange(len(completions)) if index is None else torch.tensor(index)
    return Samples(prompts, where, completions.ids, completions.mask)


def completions(tokenizer: GraphTokenizer, texts: list[str]) -> Tokens:
    """Token rows of texts, by looking signs and nodes up one by one."""
    names = {"|": "bar", "=": "equals", "/": "slash", "$": "dummy", ",": "comma"}
    signs = {sign: getattr(tokenizer.alphabet, name) for sign, name in names.items()}
    rows = []
    for text in texts:
        pieces = text.replace(",", " , ").split()
        ids = [signs[p] if p in signs else tokenizer.alphabet.nodes[int(p)] for p in pieces]
        rows.append([i for i in ids if i is not None])
    return Tokens.of(rows)


CASES = {
    "32,34,6,16,12": (True, True, False),
    "32,3,19,47,28": (False, True, False),  # another arm
    "32,34,6,16,28": (False, False, False),  # right but for the end
    "32,34,34,16,12": (False, False, False),  # a node twice
    "3,19,47,28,12": (False, False, False),  # a walk that does not begin at the start
    "12,16,6,34,32": (False, False, False),  # an arm backwards
    "32,34,6,16": (False, False, True),  # too short, though an arm as far as it goes
    "32,34,6,16,12,12": (False, False, True),  # right, and then too long
    "32,34,|,16,12": (False, False, True),
    "": (False, False, True),
}


def test_checker_on_cases_made_by_hand(make):
    tokenizer, graphs = make(G25), parse_line(LINE, G25)
    samples = drawn(tokenizer.prompts(graphs), completions(tokenizer, list(CASES)), [0] * len(CASES))
    checked = check(samples, tokenizer.key(graphs))
    got = zip(checked.exact.tolist(), checked.valid_arm.tolist(), checked.format_error.tolist(), strict=True)
    assert dict(zip(CASES, got, strict=True)) == CASES


def test_per_token_agreement_by_hand():
    tokenizer, graphs = NumeralTokenizer(G25), parse_line(LINE, G25)
    texts = ["32,3,6,47,12", "32,34", "32,34,6,16,12,12"]
    samples = drawn(tokenizer.prompts(graphs), completions(tokenizer, texts), [0, 0, 0])
    per_token = check(samples, tokenizer.key(graphs)).per_token
    assert per_token.int().tolist() == [[1, 0, 1, 0, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_missing_comma_and_foreign_ids_are_format_errors(gpt2):
    tokenizer, graphs = BPETokenizer(G25, gpt2), parse_line(LINE, G25)
    prompts, answers = tokenizer.encode(graphs)
    rows = answers.ids.repeat(4, 1)
    rows[1, 1] = tokenizer.alphabet.bar
    rows[2, 3] = rows[2, 2]  # a node where a comma belongs
    rows[3, 4] = 60_000  # beyond the vocabulary
    checked = check(drawn(prompts, Tokens.full(rows), [0] * 4), tokenizer.key(graphs))
    assert checked.format_error.tolist() == [False, True, True, True]
    assert checked.valid_arm.tolist() == [True, False, False, False]


def test_ids_beyond_the_vocabulary_are_not_taken_for_its_last_one():
    key = AnswerKey(Tokens.of([[1, 2]]), torch.tensor([[[1, 2]]]), torch.ones(2, 3, dtype=torch.bool))
    checked = check(drawn(Tokens.of([[0]]), Tokens.of([[1, 2], [1, 3]]), [0, 0]), key)
    assert checked.format_error.tolist() == [False, True]


def test_every_row_is_checked_against_its_own_prompt(make):
    world = StarGraph(3, 4, 20)
    tokenizer, graphs = make(world), generate(world, 50, np.random.default_rng(2))
    (prompts, answers), others = tokenizer.encode(graphs), tokenizer.completions(arms(graphs)[:, 1])
    order = np.random.default_rng(3).permutation(50)
    samples = drawn(prompts, answers.select(torch.from_numpy(order)), order.tolist())
    checked = check(samples, tokenizer.key(graphs))
    assert bool(checked.exact.all()) and bool(checked.per_token.all()) and not bool(checked.format_error.any())
    shifted = check(drawn(prompts, answers, [(i + 1) % 50 for i in range(50)]), tokenizer.key(graphs))
    assert not bool(shifted.exact.any()) and not bool(shifted.valid_arm.any())
    assert bool(check(drawn(prompts, others), tokenizer.key(graphs)).valid_arm.all())


def test_a_key_to_other_prompts_is_refused():
    tokenizer, graphs = NumeralTokenizer(G25), generate(G25, 3, np.random.default_rng(0))
    samples = drawn(*tokenizer.encode(graphs))
    with pytest.raises(ValueError, match="2 answers for 3 prompts"):
        check(samples, tokenizer.key(graphs.select(slice(0, 2))))


def test_forced_by_hand():
    """Token 0 has odds 3 to 1 first, then 1 to 4 after 0: losses of (0, 0) are log 4/3 and log 5."""
    model = TableLM(1, 2, 2)
    with torch.no_grad():
        model.tables[0][0, 0] = torch.tensor([3.0, 1.0], dtype=torch.float64).log()
        model.tables[1][0, 0] = torch.tensor([1.0, 4.0], dtype=torch.float64).log()
    tokens = Tokens.of([[0, 0], [0, 1], [1]])
    loss, correct = forced(model, drawn(Tokens.of([[0]]), tokens, [0, 0, 0]))
    expected = torch.tensor([[4 / 3, 5], [4 / 3, 5 / 4], [4, 1]], dtype=torch.float64).log()
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    assert correct.tolist() == [[True, False], [True, True], [False, False]]


@pytest.mark.kernels
@torch.no_grad()
def test_forced_agrees_with_log_prob_whatever_the_batch():
    model = build("gpt2", torch.float64)
    generator = torch.Generator().manual_seed(0)
    prompts = Tokens.full(torch.randint(23, (7, 5), generator=generator))
    samples = drawn(prompts, Tokens.full(torch.randint(23, (7, 3), generator=generator)))
    loss, correct = forced(model, samples)
    close(loss, -model.log_prob(samples), NETWORK)
    in_parts, _ = forced(model, samples, batch_size=2)
    close(in_parts, loss, NETWORK)
    best = [model.start(prompts, 3).log_next().argmax(1) == samples.tokens[:, 0]]
    assert torch.equal(correct[:, 0], best[0])
    nothing = forced(model, samples.select(slice(0, 0)))
    assert nothing[0].shape == nothing[1].shape == (0, 3)
