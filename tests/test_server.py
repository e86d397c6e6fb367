"""Drawing on a server: the same law, the same log-probabilities, patience, and what is said where a server will not do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare
from transformers import GPT2Config

from close import close
from completions import Completions, shaken
from tiltlm.models.causal import CausalLM
from tiltlm.models.table import TableLM
from tiltlm.samplers.ancestral import draw
from tiltlm.samplers.server import Server, mismatch, said
from tiltlm.samplers.serving import TOKEN, Serving
from tiltlm.samples import Tokens
from tiltlm.seeds import Stream, stream

PROMPTS = Tokens.of([[1, 2], [3], [1, 1, 3]])


@pytest.fixture(scope="module")
def model() -> CausalLM:
    size = GPT2Config(vocab_size=5, n_layer=1, n_head=2, n_embd=8, n_positions=16, bos_token_id=0, eos_token_id=0)
    return shaken(CausalLM.from_config(size, eos_ids=(0,)))


def server(at: Completions, model: CausalLM, **settings) -> Server:
    return Server.of(Serving(at.url, **settings), model)


def test_it_draws_from_the_models_law_and_says_its_log_probabilities(model):
    """Every completion of two tokens, ended ones included, as often as its probability; log q is log_prob to 1e-5."""
    with Completions(model) as at:
        drawn = server(at, model)(PROMPTS, n=400, max_new_tokens=2, stream=stream(3))
    close(drawn.log_q, model.log_prob(drawn).detach(), 1e-5)
    assert float(mismatch(model.log_prob(drawn).detach(), drawn).max()) < 1e-5
    assert drawn.prompt_index.tolist() == [k for k in range(3) for _ in range(400)]
    ended = (drawn.tokens == 0) & drawn.mask
    assert torch.equal(drawn.finished, ended.any(1)) and 0 < int(drawn.finished.sum()) < len(drawn)
    outcomes = [[0], *([a, b] for a in range(1, 5) for b in range(5))]
    for k in range(3):
        rows = [
            ids for ids, i in zip(drawn.completions.lists(), drawn.prompt_index.tolist(), strict=True) if i == k
        ]
        every = Tokens.of(outcomes)
        one = PROMPTS.select(torch.full((len(outcomes),), k))
        expected = model.log_prob(
            replace(drawn, prompts=one, prompt_index=torch.arange(len(outcomes)), tokens=every.ids, mask=every.mask,
                    finished=None, log_q=None)
        ).sum(1).exp().detach()  # fmt: skip
        assert abs(float(expected.sum()) - 1) < 1e-5
        counts = [rows.count(outcome) for outcome in outcomes]
        keep = expected * 400 > 4
        rest = [400 - sum(c for c, here in zip(counts, keep.tolist(), strict=True) if here)]
        seen = [c for c, here in zip(counts, keep.tolist(), strict=True) if here] + rest
        law = [*expected[keep].double().tolist()]
        assert chisquare(seen, [400 * p for p in law] + [400 * (1 - sum(law))]).pvalue > 1e-3


def test_a_row_follows_from_its_number_alone(model):
    """Seeds belong to rows: other batches, other numbers of threads, a part of the rows; the very same tokens."""
    with Completions(model) as at:
        whole = server(at, model)(PROMPTS, n=4, max_new_tokens=5, stream=stream(1))
        part = server(at, model, concurrent=1)(
            PROMPTS.select(slice(1, 3)), n=4, max_new_tokens=5, stream=stream(1), rows=torch.arange(4, 12)
        )
        other = server(at, model)(PROMPTS, n=4, max_new_tokens=5, stream=stream(2))
        seeds = [body["seed"] for body in at.asked]
    assert part.completions.lists() == whole.completions.lists()[4:] != other.completions.lists()[4:]
    assert len(set(seeds[:12])) == 12 and set(seeds[12:20]) == set(seeds[:12]) - {
        stream(1).child("server", k).key >> 1 for k in range(4)
    }


def test_what_is_asked_bends_nothing(model):
    with Completions(model) as at:
        server(at, model)(PROMPTS, max_new_tokens=1, stream=stream(0))
        body = at.asked[0]
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1}
    assert neutral.items() <= body.items() and body["model"] == "tiny"
    assert body["ignore_eos"] and body["stop_token_ids"] == [0] and body["return_token_ids"]


def test_a_busy_server_is_asked_again_for_the_same_rows_and_for_no_others(model, monkeypatch):
    """Planted 503s: the same request ids and seeds once more; what was answered is not asked for again."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with Completions(model) as at:
        calm = server(at, model)(PROMPTS, n=2, max_new_tokens=4, stream=stream(5))
    with Completions(model, busy=2) as at:
        patient = server(at, model)(PROMPTS, n=2, max_new_tokens=4, stream=stream(5))
        ids = [body["request_id"] for body in at.asked]
        assert len(ids) == 18 and len(set(ids)) == 6 and all(ids.count(each) == 3 for each in ids)
        with pytest.raises(ValueError, match="did not answer 2 times: it answered 503"):
            server(at, model, tries=2)(PROMPTS, max_new_tokens=4, stream=stream(6))
    assert patient.completions.lists() == calm.completions.lists()
    close(patient.log_q, calm.log_q, 0)


def test_a_slow_server_is_given_up(model):
    with (
        Completions(model, slow=0.5) as at,
        pytest.raises(ValueError, match=r"/completions did not answer 1 times: ReadTimeout"),
    ):
        server(at, model, tries=1, timeout=0.1)(PROMPTS, max_new_tokens=4, stream=stream(0))


def test_a_server_that_is_not_there_is_named(model):
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/v1/models did not answer 1 times: ConnectError"):
        Server.of(Serving("http://127.0.0.1:9/v1", tries=1), model)(PROMPTS, max_new_tokens=4, stream=stream(0))


@pytest.mark.parametrize(
    ("served", "asked", "words"),
    [
        (
            {},
            {"model": "huge"},
            r"404 Not Found: .*`huge` does not exist.*; models that it has: tiny; name one of them",
        ),
        ({"also": ("other",)}, {}, "names more or less than one model: it has tiny, other"),
        ({"ids": False}, {}, r"answered without token ids\. log q is that of the very tokens .* texts alone"),
        ({"logprobs": False}, {}, "answered without their log-probabilities"),
        (
            {"strict": True},
            {},
            r"422.*it knows no such fields, and returns no token ids\. .* texts alone \(draw.text\)",
        ),
        ({"context": 4}, {}, "answered [123] tokens behind a prompt of [123] where 4 were asked for, and no end"),
    ],
)
def test_what_will_not_do_is_said(model, served, asked, words):
    plain = CausalLM(model.model, ())  # nothing ends it: every row runs into the context's end
    with Completions(plain, **served) as at, pytest.raises(ValueError, match=words):
        Server.of(Serving(at.url, **asked), plain)(PROMPTS, max_new_tokens=4, stream=stream(0))


def test_another_model_than_the_one_here_is_noticed(model):
    """A larger vocabulary, and ends that are none here."""
    wide = CausalLM.from_config(GPT2Config(vocab_size=50, n_layer=1, n_head=1, n_embd=4, n_positions=16))
    with Completions(wide) as at, pytest.raises(ValueError, match=r"token \d+, which is outside the vocabulary"):
        server(at, model)(PROMPTS, n=8, max_new_tokens=4, stream=stream(0))
    with Completions(model) as at, pytest.raises(ValueError, match=r"ended in token 0, and ends are \[4\]"):
        Server.of(Serving(at.url), CausalLM(model.model, (4,)))(PROMPTS, n=40, max_new_tokens=4, stream=stream(0))


def test_other_weights_show_as_a_mismatch(model):
    """Planted: the server has other weights. By hand: the mean of |log p − log q| over a row's tokens."""
    other = shaken(CausalLM.from_config(model.model.config, eos_ids=(0,)), seed=7)
    with Completions(other) as at:
        drawn = server(at, model)(PROMPTS, n=20, max_new_tokens=4, stream=stream(0))
    with torch.no_grad():
        found = mismatch(model.log_prob(drawn), drawn)
        close(found[0], (model.log_prob(drawn) - other.log_prob(drawn))[0][drawn.mask[0]].abs().mean(), 1e-5)
    assert float(found.mean()) > 0.05


def test_what_cannot_be_served_is_refused(model):
    with pytest.raises(ValueError, match="draws from a plain language model, and this is a TableLM"):
        Server.of(Serving("http://localhost:1/v1"), TableLM(2, 3, 2))
    warm = CausalLM(model.model, (0,)).at(0.7)
    with pytest.raises(ValueError, match=r"read at temperature 0.7"):
        Server.of(Serving("http://localhost:1/v1"), warm)
    with pytest.raises(ValueError, match="want its url too"):
        Serving(model="tiny")
    with pytest.raises(ValueError, match="every of Serving must be 1 or more"):
        Serving("http://localhost:1/v1", every=0)


def test_the_token_goes_to_the_server_and_never_in_the_clear_to_another_machine(model, monkeypatch):
    monkeypatch.setenv(TOKEN, "a secret of this test")
    with Completions(model) as at:
        server(at, model)(PROMPTS, max_new_tokens=1, stream=stream(0))
        assert set(at.tokens) == {"Bearer a secret of this test"}
    with pytest.raises(ValueError, match=r"\$TILTLM_DRAW_TOKEN is not sent in the clear"):
        Server.of(Serving("http://example.org/v1"), model)(PROMPTS, max_new_tokens=1, stream=stream(0))


class Letters:
    """A tokenizer of single letters, a = 1, with a text for the end too."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [".abcd".index(letter) for letter in text]}

    def decode(self, ids):
        return "".join(".abcd"[i] for i in ids)


def test_texts_are_tokenised_again_and_have_no_log_q(model, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", Letters())
    with Completions(model, ids=False, logprobs=False) as at:
        found = Server.of(Serving(at.url, text=True), model, Letters())(
            PROMPTS, n=6, max_new_tokens=3, stream=stream(2)
        )
        bodies = sorted(at.asked, key=lambda body: body["prompt"])
    assert found.log_q is None and {body["prompt"] for body in bodies} == {"ab", "c", "aac"}
    wanted = [
        draw(
            model, PROMPTS.select([k // 6]), max_new_tokens=3, stream=Stream(stream(2).child("server", k).key >> 1)
        )
        for k in range(18)
    ]
    assert found.completions.lists() == [each.completions.lists()[0] for each in wanted]
    assert found.finished.tolist() == [bool(each.finished[0]) for each in wanted]
    with pytest.raises(ValueError, match="texts alone have no log q"):
        mismatch(model.log_prob(found), found)
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        Server.of(Serving("http://localhost:1/v1", text=True), model)


def test_a_prompt_is_said_so_that_its_ids_come_back():
    """A tokenizer that writes a start in front: the text without it has the very ids."""

    class Starts(Letters):
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [0, *super().__call__(text)["input_ids"]]}

    assert said(Starts(), [0, 1, 2]) == "ab" and said(Letters(), [1, 2]) == "ab"
