"""Rows in Arrow files are the rows that memory would hold: same ids, same padding, same training, bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tiltlm.data import encoded, stored
from tiltlm.data.arrow import Ragged, write_parts
from tiltlm.data.encoded import Encoded
from tiltlm.data.encoding import Encoder
from tiltlm.data.stored import StoredSamples, StoredTokens, open_tokens, store_tokens
from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.engine import Optim
from tiltlm.experience import Offline, Once
from tiltlm.feeds.fixed import judged, mapped
from tiltlm.groups import all_pairs, as_groups, best_and_worst
from tiltlm.jsonl import Lines
from tiltlm.models.causal import CausalLM
from tiltlm.policies.dpo import DPO
from tiltlm.samples import Pairs, Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.stages import draws, log_ref
from tiltlm.stages.draws import Labels
from tiltlm.train import fit

END, N = 7, 23
WORDS = [" a", " cat", " and a dog and a bird and a fish", "", " no.", " b"]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(train_tokenizer(stories(50, stream(0, "test-stored")), 300), (END,), 20, 8)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=300, n_positions=32, bos_token_id=None, eos_token_id=END
    )
    return CausalLM(GPT2LMHeadModel(config), (END,)).eval()


def word(k: int) -> str:
    return WORDS[k % len(WORDS)]


def row(k: int) -> dict[str, Any]:
    """Row k of every shape: prompts of unlike lengths, two of them alike, one cut; blank, cut and ended completions."""
    prompt = "The dog said no. " * (9 if k == 5 else k // 2 % 3 + 1) + str(k // 2)
    sides = {"chosen": word(k), "rejected": word(k + 1), "completion": word(k + 2), "label": k % 4 != 3}
    group = {"completions": [word(k), word(k + 2), word(k + 4)], "rewards": [k % 3, 1, 0.5], "finished": [1, 0, 1]}
    return {"prompt": prompt, **sides, **group}


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row(k)) for k in range(N)))
    return tmp_path / "rows.jsonl"


def answer(one: dict[str, Any]) -> str | None:
    return one["completion"] if one["label"] else None


def equal(a: Any, b: Any) -> None:
    """The same rows of Tokens, Samples, Pairs or Groups: ids, padding, what is known, and the prompts that they answer."""
    if isinstance(a, Pairs):
        equal(a.chosen, b.chosen)
        equal(a.rejected, b.rejected)
    elif isinstance(a, Tokens):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.mask, b.mask)
    elif isinstance(a, Samples):
        equal(a.completions, b.completions)
        assert a.row_prompts.lists() == b.row_prompts.lists()
        assert set(a.optional()) == set(b.optional())
        for name, value in a.optional().items():
            assert torch.equal(value, b.optional()[name]), name
    else:
        assert a.size == b.size
        equal(a.samples, b.samples)


@pytest.fixture
def sides(path, encoder, monkeypatch) -> tuple[Any, Encoded]:
    """What memory holds of the rows, and the same rows in files."""
    held = Encoded(Lines(path), encoder, path.parent / "none")
    memory = SimpleNamespace(
        prompts=held.prompts(), pairs=held.pairs(), groups=held.groups(), judged=held.judged(),
        answers=held.answers(answer),
    )  # fmt: skip
    assert not held.cache.exists()
    for module in (stored, encoded, draws):
        monkeypatch.setattr(module, "MANY", 3)
    monkeypatch.setattr(encoded, "AT_ONCE", 4)
    monkeypatch.setattr(log_ref, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(log_ref, "SHARD", 8)
    return memory, Encoded(Lines(path), encoder, path.parent / "cache")


FEW = torch.tensor([22, 4, 4])


def test_rows_in_files_are_those_of_memory(sides):
    """All of them, and a few at a time, which come with their own prompts alone."""
    memory, files = sides
    for kind in ("pairs", "groups", "judged"):
        ours, theirs = getattr(files, kind)(), getattr(memory, kind)
        assert len(ours) == len(theirs) == N
        equal(ours, theirs)
        equal(ours.select(FEW), theirs.select(FEW))
    wanted = files.answers(answer)
    equal(wanted, memory.answers)
    assert len(wanted) == N - N // 4 and isinstance(wanted, StoredSamples)
    equal(files.prompts(), memory.prompts)
    equal(files.prompts().select(slice(1, 4)), memory.prompts.select(slice(1, 4)))
    batch = files.pairs().select(FEW)
    assert type(batch.chosen) is Samples and len(batch.chosen.prompts) == 2


def test_answers_to_one_prompt_share_it_in_files_too(sides):
    memory, files = sides
    ours = files.judged()
    assert torch.equal(ours.prompt_index, memory.judged.prompt_index) and len(ours.prompts) < N
    equal(ours.prompts, memory.judged.prompts)
    assert torch.equal(ours.reward, memory.judged.reward)


def test_what_is_made_of_pairs_and_groups_stays_in_files(sides):
    memory, files = sides
    for make in (as_groups, judged):
        ours, theirs = make(files.pairs()), make(memory.pairs)
        equal(ours, theirs)
        assert isinstance(ours if make is judged else ours.samples, StoredSamples)
    for make in (best_and_worst, all_pairs):
        (ours, ties), (theirs, n) = make(files.groups()), make(memory.groups)
        equal(ours, theirs)
        assert ties == n and isinstance(ours.chosen, StoredSamples) and len(ours) > 3
    done = files.answers(answer)
    assert isinstance(done.to("cpu"), StoredSamples)
    equal(done.with_(reward=done.mask.sum(1).float()), memory.answers.with_(reward=done.mask.sum(1).float()))
    equal(done.with_(log_q=done.mask.float()), memory.answers.with_(log_q=done.mask.float()))


def test_tokens_in_files_answer_as_tokens_do(sides):
    memory, files = sides
    ours, theirs = files.prompts(), memory.prompts
    assert isinstance(ours, StoredTokens) and len(ours) == N
    assert torch.equal(ours.lengths, theirs.lengths) and ours.lists() == theirs.lists()
    rows = torch.tensor([0, 3, 6, 9, 12])
    equal(ours.select(rows).cropped(), theirs.select(rows).cropped())
    assert isinstance(ours.select(rows), StoredTokens) and ours.select(rows).ids.shape[1] == theirs.ids.shape[1]
    assert ours.same_as(files.prompts()) and ours.same_as(theirs) and not ours.same_as(ours.select(rows))
    equal(pickle.loads(pickle.dumps(ours)), theirs)
    equal(pickle.loads(pickle.dumps(files.pairs())).chosen, memory.pairs.chosen)


def test_a_batch_of_either_trains_the_same_weights(sides, model, tmp_path):
    """DPO, four steps, log_ref from the cache: every parameter bit for bit."""
    memory, files = sides
    problem = SimpleNamespace(reference_name="toy", reference=model)

    def trained(pairs: Pairs) -> CausalLM:
        rows = mapped(pairs, lambda s: log_ref.referring(tmp_path / "log_ref", problem, "float32", s, "train"))
        policy = copy.deepcopy(model).requires_grad_(True)
        torch.manual_seed(0)  # of dropout
        return fit(policy, DPO(0.1), Offline(rows, 6, stream(0, "order")), steps=4, optim=Optim(lr=1e-2))

    ours, theirs = trained(files.pairs()), trained(memory.pairs)
    assert len(list((tmp_path / "log_ref").glob("*.safetensors"))) == 2
    assert len(list((tmp_path / "log_ref").glob("*/0000[0-2].arrow"))) == 6
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(ours.head.weight, model.head.weight)


def test_log_ref_goes_on_behind_the_last_whole_file(sides, model, tmp_path, monkeypatch):
    """Interrupted in the third of three: two are kept, and no row of theirs is scored again."""
    samples, scored = sides[1].pairs().chosen, []

    def score(part: Samples, *rest: Any) -> torch.Tensor:
        scored.append(len(part))
        if len(scored) == 3:
            raise KeyboardInterrupt
        return original(part, *rest)

    original = log_ref.score
    monkeypatch.setattr(log_ref, "score", score)
    with pytest.raises(KeyboardInterrupt):
        log_ref.shards(tmp_path / "x", samples, model, "float32")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["00000.arrow", "00001.arrow"]
    found = samples.with_log_ref(log_ref.shards(tmp_path / "x", samples, model, "float32"))
    assert scored == [8, 8, 7, 7]
    torch.testing.assert_close(found.log_ref, original(samples.loaded(), model), rtol=0, atol=0)
    equal(found.select(FEW), found.loaded().select(FEW))
    assert log_ref.content_of(samples) != log_ref.content_of(sides[1].pairs().rejected)


def test_files_are_named_after_content_tokenizer_and_lengths(sides, encoder, path, monkeypatch):
    """The same data is encoded once; other rows, another tokenizer, other lengths or ends are encoded anew."""
    files = sides[1]
    files.pairs()
    names = {each.name for each in files.cache.iterdir()}
    assert names == {f"{column}-{files.key}.arrow" for column in ("prompt", "chosen", "rejected")}
    monkeypatch.setattr(Encoder, "samples", lambda *_: pytest.fail("encoded again"))
    Encoded(Lines(path), Encoder(encoder.tokenizer, (END,), 20, 8), files.cache).pairs()
    other = train_tokenizer(stories(60, stream(1, "test-stored")), 300)
    keys = [
        Encoded(Lines(path), how, files.cache).key
        for how in (Encoder(other, (END,), 20, 8), Encoder(encoder.tokenizer, (END,), 21, 8),
                    Encoder(encoder.tokenizer, (END,), 20, 7), Encoder(encoder.tokenizer, (END, 8), 20, 8),
                    Encoder(encoder.tokenizer, (END,), 20, 8, turn_id=9))
    ]  # fmt: skip
    path.write_text(path.read_text() + "\n" + json.dumps(row(1)))
    keys.append(Encoded(Lines(path), encoder, files.cache).key)
    assert len({files.key, *keys}) == 7


def test_every_row_is_seen_once_in_an_epoch(sides):
    data = sides[1].pairs()
    once = Once(data, 3, stream(0, "once"))
    seen = [ids for step in range(once.steps) for ids in once.batch(step).chosen.row_prompts.lists()]
    assert sorted(seen) == sorted(sides[0].pairs.chosen.row_prompts.lists())


def test_an_uneven_group_is_named_by_its_number_in_the_file(sides, path, encoder):
    rows = [row(k) for k in range(N)]
    rows[17]["completions"] = rows[17]["completions"][:2]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(ValueError, match="group 17 has 2 completions, those before it 3"):
        Encoded(Lines(path), encoder, path.parent / "cache").groups()
    assert not [each for each in (path.parent / "cache").iterdir() if "completions" in each.name]


def test_half_a_file_is_refused_with_what_to_do(tmp_path):
    store_tokens(tmp_path / "x.arrow", [Tokens.of([[1, 2], []]), Tokens.of([[3]])])
    assert open_tokens(tmp_path / "x.arrow").lists() == [[1, 2], [], [3]]
    whole = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "y.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"y\.arrow: not a whole Arrow file .*remove it"):
        _ = Ragged((tmp_path / "y.arrow",), "ids").lengths
    with pytest.raises(ValueError, match="there are no rows"):
        write_parts(tmp_path / "z.arrow", [])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.arrow", "y.arrow"]


def resident(kind: str) -> int:
    """Bytes of this process in memory: RssAnon (its own), RssFile (mapped files)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_all_rows_holds_neither_the_file_nor_a_number_a_row(tmp_path):
    """100,000 rows in a file of 13 MB, in batches of random rows: at most 2 MB of pages, and 1 byte a row of our own."""
    n, width = 100_000, 32
    ids = torch.arange(n * width).reshape(n, width)
    store_tokens(tmp_path / "x.arrow", (Tokens.full(part) for part in ids.split(1024)))
    del ids
    order, source = (
        torch.randperm(n, generator=torch.Generator().manual_seed(0)),
        Ragged((tmp_path / "x.arrow",), "ids"),
    )
    assert source.padded(order[:64], width)[0][:, 0].tolist() == (order[:64] * width).tolist()
    tracemalloc.start()
    files, most = resident("RssFile"), 0
    try:
        for rows in order.split(512):
            source.padded(rows, width)
            most = max(most, resident("RssFile") - files)
        assert int(source.lengths.max()) == width and len(source) == n
        most, held = max(most, resident("RssFile") - files), tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert most < 2 << 20 and held < n, (most, held)


def test_labelled_draws_are_read_from_files_too(sides, encoder, tmp_path):
    """Groups of stored draws: those of memory; anew where the file of labels has changed."""
    prompts, folder = sides[0].prompts, tmp_path / "label" / "key"
    folder.mkdir(parents=True)
    rows = [
        {"completion_ids": [[k, 3], [4] * (k % 5)], "finished": [True, False], "rewards": [k, 0.5]}
        for k in range(N)
    ]
    problem, run = SimpleNamespace(prompts={"train": sides[1].prompts()}), SimpleNamespace(folder=folder)
    for reward in (0.5, 0.25):
        rows[3]["rewards"][1] = reward
        (folder / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        ours, theirs = Labels(None).groups(run, problem, "train"), draws.groups_of(rows, prompts)
        assert isinstance(ours.samples, StoredSamples)
        equal(ours, theirs)
        equal(ours.select(FEW), theirs.select(FEW))


def test_slices_of_a_file_go_forward(path):
    rows = Lines(path).forward()
    assert (
        rows[2:4] == [row(2), row(3)] and rows[5:6] == [row(5)] and rows[20:30] == [row(k) for k in (20, 21, 22)]
    )
    with pytest.raises(ValueError, match="objects 4 to 5 were asked for, and 30 have been read"):
        rows[4:5]
    assert len(Lines(path)) == N
