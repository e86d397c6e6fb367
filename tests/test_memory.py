"""Memory before any work: counts are those of real networks, what passes keep is what autograd keeps."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig

from tiltlm.cli import main
from tiltlm.commands.dry_run import CHANGES, SHARD, Several, savings
from tiltlm.commands.footprint import footprint
from tiltlm.commands.options import parsed
from tiltlm.memory.counting import Counted
from tiltlm.memory.head import FLOAT
from tiltlm.memory.making import Adapters
from tiltlm.memory.network import Network, Pass
from tiltlm.memory.process import Held, Process, Use
from tiltlm.models.causal import CausalLM, copy_of
from tiltlm.models.heads import ValueHead
from tiltlm.models.narrow import Narrow
from tiltlm.models.precision import autocast, computing_in, wide_attention
from tiltlm.recipes import recipe
from tiltlm.samples import Samples, Tokens
from tiltlm.stages.learn import Learn

SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 1000}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, intermediate_size=128, num_key_value_heads=2),
    "gpt2": GPT2Config(**SHAPE, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0),
    "opt": OPTConfig(**SHAPE, ffn_dim=128, word_embed_proj_dim=64, dropout=0.0, tie_word_embeddings=True),
}  # fmt: skip
ROWS, PROMPT, NEW = 4, 20, 28
UPDATES = (("llama", "all"), ("gpt2", "all"), ("llama", "adapters"), ("llama", "recomputed"))


@cache
def real(family: str, kind: str) -> CausalLM:
    model = CausalLM.from_config(CONFIGS[family], seed=0)
    if kind == "adapters":
        model = model.with_lora(4, 8)
    model.train()
    return model.with_checkpointing() if kind == "recomputed" else model


@cache
def foreseen(family: str, kind: str) -> Network:
    adapters = Adapters(4) if kind == "adapters" else None
    trains = "adapters" if adapters else "all"
    return Network(CONFIGS[family], trains=trains, adapters=adapters, recomputes=kind == "recomputed")


def batch(rows: int, prompt: int, new: int) -> Samples:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1000, (rows, prompt + new), generator=generator)
    done = ids[:, prompt:]
    return Samples(Tokens.full(ids[:, :prompt]), torch.arange(rows), done, torch.ones_like(done, dtype=torch.bool))


def run(model: CausalLM, bfloat16: bool, shape: tuple[int, int, int] = (ROWS, PROMPT, NEW)) -> torch.Tensor:
    with computing_in(model, model.device, "bfloat16" if bfloat16 else "float32"):
        return model.log_prob(batch(*shape)).sum()


def kept_by_autograd(model: CausalLM, bfloat16: bool) -> int:
    """Bytes of what autograd saves of a loss, by its own hooks: each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = run(model, bfloat16)
    found = sum(x.untyped_storage().nbytes() for x in saved.values())
    del loss
    return found


@pytest.mark.parametrize("family, kind", [*((family, "all") for family in CONFIGS), ("llama", "adapters")])
def test_parameters_are_those_of_the_real_network(family, kind):
    model, network = real(family, kind), foreseen(family, kind)
    assert network.parameters == sum(p.numel() for p in model.parameters())
    assert network.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "family, kind, bfloat16",
    [*((family, "all", False) for family in CONFIGS), ("llama", "all", True), ("llama", "adapters", False)],
)
def test_what_a_pass_keeps_is_what_autograd_keeps(family, kind, bfloat16):
    """The body's states beside what the head takes of them: within 4%, and never less. (An attention mask in memory, or
    keys repeated for every head, would be 8% more here.)"""
    kept = foreseen(family, kind).kept(Pass(ROWS, PROMPT + NEW, NEW, bfloat16))
    own = kept_by_autograd(real(family, kind), bfloat16)
    assert own <= kept <= 1.04 * own


@pytest.mark.parametrize(
    "family, kind, bfloat16", [*((*each, False) for each in UPDATES), *((*each, True) for each in UPDATES[::3])]
)
def test_a_real_update_never_holds_more_than_was_foreseen(family, kind, bfloat16):
    """Live bytes of a real loss and its backward pass, gradients there already, as in a second micro-batch. The rest is a
    tile of logits and one of exponentials, which torch makes out of sight."""
    model, network = real(family, kind), foreseen(family, kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    for rows, prompt, new in ((ROWS, PROMPT, NEW), (1, 1, 1)):  # in the second, weights outweigh all else
        with Counted([*model.parameters(), *(p.grad for p in trained), *model.buffers()]) as counted:
            run(model, bfloat16, (rows, prompt, new)).backward()
        tiles = 2 * FLOAT * rows * new * 1000
        most = network.update(Pass(rows, prompt + new, new, bfloat16))
        assert counted.most <= most <= 1.1 * counted.most + tiles
        assert network.update(Pass(rows, prompt + new, new, bfloat16)) == most  # it was left as it was


@pytest.mark.parametrize("trains", ["all", "head"])
@pytest.mark.parametrize("outputs, bfloat16", [("number", False), ("vocabulary", False), ("vocabulary", True)])
def test_an_update_of_a_value_never_holds_more_than_was_foreseen(outputs, bfloat16, trains):
    """A critic's number, or a twist's logits added to those of a reference: of its own body, or the frozen one of both."""
    reference, network = real("llama", "all").eval(), Network(CONFIGS["llama"], trains=trains, outputs=outputs)
    frozen, per_token, rows = trains == "head", outputs == "vocabulary", batch(ROWS, PROMPT, NEW)
    body = copy_of(reference)
    head = ValueHead(body, per_token=per_token, frozen=frozen).train()
    trained = [p for p in head.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    known = [*head.parameters(), *head.buffers(), *reference.parameters(), *reference.buffers()]
    with Counted([*known, *(p.grad for p in trained)]) as counted, wide_attention(head, body.device, "bfloat16"):
        with autocast(body.device, "bfloat16" if bfloat16 else "float32"):
            fixed = body if frozen else reference
            loss = (head.tilted_log_prob(fixed, rows) if per_token else head.values(rows)).sum()
        loss.backward()
    most = network.update(Pass(ROWS, PROMPT + NEW, NEW, bfloat16))
    tiles = 2 * FLOAT * ROWS * NEW * 1000 if per_token else 0
    assert counted.most <= most <= 1.1 * counted.most + tiles


def test_recomputing_keeps_a_state_a_layer():
    whole, recomputed = (foreseen("llama", kind).kept(Pass(ROWS, 48, NEW)) for kind in ("all", "recomputed"))
    state = FLOAT * ROWS * 48 * 64
    assert 3 * state <= recomputed <= 8 * state < whole / 2


def test_values_have_a_head_of_their_own_and_the_language_models_is_not_trained():
    lm = CausalLM.from_config(CONFIGS["llama"], seed=0)
    for outputs, per_token in (("number", False), ("vocabulary", True)):
        network = Network(CONFIGS["llama"], trains="all", outputs=outputs)
        head = ValueHead(lm, per_token=per_token)
        assert network.parameters == sum(p.numel() for p in head.parameters())
        assert network.trained == network.parameters - lm.head.weight.numel()
    frozen = Network(CONFIGS["llama"], trains="head", outputs="vocabulary")
    assert frozen.trained == frozen.own
    assert frozen.update(Pass(ROWS, 48, NEW)) < foreseen("llama", "all").update(Pass(ROWS, 48, NEW))


@pytest.mark.parametrize("family, bfloat16", [("llama", False), ("gpt2", False), ("llama", True)])
def test_drawing_never_holds_more_than_was_foreseen(family, bfloat16):
    """The prompts' pass, then a token after the other into a cache that grows, rows leaving it on the way; at its end the
    cache has the bytes that were foreseen."""
    model = real(family, "all").eval()
    drawing, network = Narrow(model) if bfloat16 else model, foreseen(family, "all")
    with torch.no_grad(), Counted([*model.parameters(), *model.buffers()]) as counted:
        state = drawing.start(Tokens.full(torch.arange(1, 16).unflatten(0, (3, 5))), 7)
        for _ in range(7):
            weights = state.logits().softmax(-1)
            state.append(weights.argmax(-1))
        body = state.state.state if bfloat16 else state.state
        stores = sum(x.nbytes for layer in body.layers for x in layer.stores())
        state.select(torch.tensor([2, 0]))
    most = network.draw(Pass(3, 5 + 7, 7, bfloat16))
    assert stores == network.cache(Pass(3, 5 + 7, 7, bfloat16)) > 0
    assert counted.most <= most <= 1.1 * counted.most + 2 * FLOAT * 3 * 1000
    model.train()


def test_a_published_size_without_a_weight():
    """Llama-3.1-8B: 8,030,261,248 parameters (its model card rounds to 8B)."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    network = Network(config)
    assert network.parameters == 8_030_261_248
    assert network.cache(Pass(1, 24, 16)) == 24 * 32 * 2 * 8 * 128 * FLOAT
    layer, rest = network.parts
    assert 32 * layer + rest == network.parameters


class Stub:
    """A network of round numbers."""

    parameters, trained, own, trains, parts, trained_parts = 1000, 1000, 0, "all", (100, 200), (100, 200)

    def __init__(self, draw: int = 0, score: int = 0, update: int = 0) -> None:
        self.needs = {"draw": draw, "score": score, "update": update}

    def draw(self, batch: Pass) -> int:
        return self.needs["draw"]

    def score(self, batch: Pass) -> int:
        return self.needs["score"]

    def update(self, batch: Pass) -> int:
        return self.needs["update"]


def test_a_process_holds_its_part_and_what_is_brought_together():
    """By hand: 4 bytes · 1000 parameters · (weights, gradient, two moments) / 4 processes; in an update two layers and what
    is outside them (400 numbers) and gradients of one and these (300); drawing, the whole."""
    one = Pass(1, 1, 1)
    uses = (Use("drawing", "draw", one), Use("an update", "update", one))
    policy = Held("policy", Stub(draw=50, update=60), uses, processes=4)
    assert (policy.weights, policy.gradients, policy.moments) == (1000, 1000, 2000)
    critic = Held("critic", Stub(update=7), uses[1:])
    process = Process((policy, critic))
    assert process.always == 4000 + 16000
    parts = ("drawing", "an update", "of a judge")
    assert [policy.together(part) for part in parts] == [4000, 2800, 4000]
    assert [critic.together(part) for part in parts] == [0, 0, 0]
    assert process.parts == {"drawing": 50 + 4000, "an update": 60 + 4 * 700 + 7}
    assert (process.most, process.when) == (24050, "drawing")
    assert process.start == 4000 + 4000
    scored = [Held(name, Stub(score=n), (Use("scoring", "score", one),)) for name, n in (("a", 5), ("b", 9))]
    assert Process(tuple(scored)).parts == {"scoring": 9}  # one after the other


def test_a_judge_in_parts_is_whole_while_it_scores_and_one_member_at_a_time():
    """By hand: two members of 4000 bytes on four processes, beside a policy that is whole until its own update."""
    one = Pass(1, 1, 1)
    uses = (Use("scoring by the judge", "score", one), Use("an update of the judge", "update", one))
    judge = Held("judge", Stub(score=30, update=40), uses, processes=4, copies=2, apart=True)
    policy = Held(
        "policy", Stub(draw=50, update=60), (Use("drawing", "draw", one), Use("an update", "update", one)), 4
    )
    assert (judge.weights, judge.moments) == (2000, 4000)
    assert Process((policy, judge)).parts == {
        "drawing": 50 + 4000, "an update": 60 + 2800, "scoring by the judge": 30 + 4000 + 4000,
        "an update of the judge": 40 + 4000 + 2800,
    }  # fmt: skip


def test_a_judges_update_is_shared_out():
    """Sixteen pairs: four, of two rows each, on each of four processes."""
    uses = {use.part: use.batch.rows for use in footprint(learning("dialogues/d2po"), 4).held[-1].uses}
    assert uses["an update of the judge"] == 8


def test_whatever_is_trained_is_divided():
    """Frozen networks are not."""
    for name, divided in (
        ("dialogues/ppo", {"policy", "critic"}), ("animals/ctl", {"head and body"}),
        ("dialogues/d2po", {"policy", "judge"}),
    ):  # fmt: skip
        held = footprint(learning(name, "--fit.shard"), 4).held
        assert {each.name for each in held if each.processes == 4} == divided
    head = footprint(learning("animals/ctl", "--net.body", "frozen", "--fit.shard"), 4).held[0]
    own = FLOAT * head.network.own
    assert (head.weights, head.gathered, head.undivided) == (own // 4, 2 * own, own)
    judge = parsed(recipe("dialogues/reward-model"), ["--task.judge.shard"])
    assert [each.processes for each in footprint(judge, 4).held] == [4]


SOME = ("fit.micro-batch", "fit.shard", "net.policy")


def learning(name: str, *words: str) -> Learn:
    measured = parsed(recipe(name), words)
    return next(each for each in measured.inputs().values() if isinstance(each, Learn))


WAYS = ((("--fit.shard",), False), ((), True))
"""Options of a recipe, and whether --shard is said."""


def names(name: str, *words: str) -> list[str]:
    return [each.name for each in footprint(learning(name, *words)).held]


def test_which_networks_a_step_holds():
    assert names("dialogues/dpo") == ["policy", "reference"]
    assert names("dialogues/dpo", "--net.policy", "lora") == ["policy"]
    assert names("dialogues/ppo") == ["policy", "reference", "critic", "reward model"]
    assert names("dialogues/d2po") == ["policy", "reference", "reward model", "judge"]
    judge = footprint(learning("dialogues/d2po", "--feed.judge.lora-rank", "4")).held[-1]
    assert 64 < judge.network.trained < judge.parameters / 4  # its adapters, and a head of 64 weights
    assert names("words-small/d2po") == [
        "policy",
        "reference",
        "judge",
    ]  # prompts of a tokenizer that is yet to be made
    assert names("animals/ctl", "--net.body", "frozen") == ["head", "reference"]
    with pytest.raises(ValueError, match="no transformer"):
        footprint(learning("tree/dpo"))


def test_more_processes_take_less_each_and_savings_are_what_they_say(monkeypatch):
    monkeypatch.setattr("tiltlm.commands.dry_run.CHANGES", [each for each in CHANGES if each.words[0] in SOME])
    recipe_ = learning("dialogues/dpo")
    one, two = (footprint(recipe_, n).most for n in (1, 2))
    assert two < one
    found = {words: value for words, _, value in savings(recipe_, Several(2), two)}
    assert found["--fit.micro-batch 1"] == footprint(parsed(recipe_, ["--fit.micro-batch", "1"]), 2).most < two
    assert list(found) == [
        "--fit.micro-batch 1",
        "--fit.shard",
        "--net.policy lora",
        "--fit.micro-batch 1 --fit.shard",
    ]
    assert min(found.values()) == found["--fit.micro-batch 1 --fit.shard"]
    monkeypatch.setattr(
        "tiltlm.commands.dry_run.CHANGES", [each for each in CHANGES if each.words[0] in (*SOME, SHARD)]
    )
    found = {words: value for words, _, value in savings(recipe_, Several(2), two)}
    assert found["--fit.micro-batch 1 --shard"] == min(found.values())
    assert not any("shard" in words for words, _, _ in savings(recipe_, Several(2, shard=True), two))


def test_with_shard_what_is_not_trained_is_in_parts_too():
    """Of eight processes each holds an eighth of the reference's layers and all that stands outside them; in an update a
    network that is not asked takes nothing more."""
    whole, parts = (footprint(learning("dialogues/dpo", *words), 8, by_layers) for words, by_layers in WAYS)
    (policy, reference), (_, other) = parts.held, whole.held
    layer, rest = reference.network.parts
    assert reference.weights == 4 * (rest + (reference.parameters - rest) // 8) < other.weights
    assert policy.weights == 4 * policy.parameters // 8
    assert whole.always - parts.always == other.weights - reference.weights and whole.parts == parts.parts
    assert parts.start == 4 * reference.parameters + policy.weights + reference.weights  # on a CPU
    live = footprint(learning("dialogues/rloo", "--fit.shard"), 8), footprint(learning("dialogues/rloo"), 8, True)
    drawn = [each.gathered("drawing") for each in live]
    assert drawn == [4 * policy.parameters, 4 * (2 * layer + rest)]


def test_a_dry_run_says_all_this_of_a_model_without_weights_and_writes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    config = CONFIGS["llama"].to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("TILTLM_RUNS", str(tmp_path / "runs"))
    words = ["--task.start", str(tmp_path / "model"), "--task.reward", "words.py:f", "--net.checkpointing"]
    assert main(["run", "dialogues/ppo", *words, "--dry-run", "--processes", "2"]) == 1, "weights are missing"
    page = capsys.readouterr().out
    assert "dialogues/ppo-policy  ->" in page and "no weights" in page
    assert [line.split()[0] for line in page.splitlines() if " k " in line] == ["policy", "reference", "critic"]
    assert "--fit.micro-batch 1" in page and "--net.checkpointing" not in page.partition("less with")[2]
    monkeypatch.chdir(tmp_path)  # where the project's own model, without a tokenizer yet, is the reference
    assert main(["run", "animals/rloo", "--dry-run", "--task.model="]) == 0, "nothing is missing"
    capsys.readouterr()
    assert main(["run", "animals/rloo", "--dry-run", "--net.policy", "head", "--net.judges", "last"]) == 0
    assert "animals/rloo-policy  not counted: a head" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_processes_are_of_a_dry_run_alone(capsys):
    assert main(["run", "dialogues/dpo", "--processes", "2"]) == 2
    assert "--dry-run" in capsys.readouterr().err
