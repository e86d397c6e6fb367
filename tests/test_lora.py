"""Adapters as settings ask for them: their scale, the layers they stand beside, and what a checkpoint gives back."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from close import close
from families import FAMILIES, build
from tiltlm.commands.options import from_json
from tiltlm.commands.run import parse
from tiltlm.method import Method
from tiltlm.methods import method
from tiltlm.models.causal import CausalLM
from tiltlm.models.teacherless import Teacherless
from tiltlm.nets import Net, learner, loaded
from tiltlm.problem import Facts, Problem
from tiltlm.recipes import preset_of
from tiltlm.samples import Samples, Tokens
from tiltlm.seeds import stream
from tiltlm.settings import hashed
from tiltlm.target import Target

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LORA = Net(policy="lora", body="lora", lora_rank=2)


def problem(family: str = "llama") -> Problem:
    target = Target(build(family).requires_grad_(False), lambda samples: samples.mask.double().sum(1), 1.0)
    prompts: Any = dict.fromkeys(("train", "valid", "test"), Tokens.of([[3, 5, 7], [2]]))
    return Problem(target, prompts, 3, stream(0), Facts(1.0, "several"))


def rows() -> Samples:
    done = Tokens.of([[1, 2, 3], [5, 6]])
    return Samples(Tokens.of([[3, 5, 7], [2]]), torch.tensor([0, 1]), done.ids, done.mask)


def policy(net: Net, family: str = "llama") -> CausalLM:
    _, found = learner(problem(family), method("dpo"), net, stream(0))
    assert isinstance(found.policy, CausalLM)
    return found.policy


def layers(model: CausalLM) -> dict[str, Any]:
    """The layers that have adapters, by their names in the model."""
    return {name: x for name, x in model.model.named_modules() if hasattr(x, "lora_A")}


def kinds(model: CausalLM) -> set[str]:
    return {name.rpartition(".")[2] for name in layers(model)}


def disturb(model: CausalLM) -> None:
    """Adapters that say something: B begins as zeros."""
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 2.0), (2.0, 1.0), (3.0, 1.5), (16.0, 8.0)])
def test_an_adapted_layer_adds_b_a_x_times_alpha_over_the_rank(alpha, scale):
    model = policy(replace(LORA, lora_alpha=alpha))
    disturb(model)
    layer = layers(model)["model.layers.0.self_attn.q_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (2, 16) and b.shape == (16, 2)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    close(layer(x), x @ (layer.base_layer.weight + scale * b @ a).T, 1e-5)


@pytest.mark.parametrize("body", [False, True])
def test_the_settings_reach_policies_and_the_bodies_of_heads(body):
    net = replace(LORA, lora_alpha=3.0, lora_modules=("k_proj", "mlp.up_proj"))
    _, found = learner(problem(), method("ctl" if body else "dpo"), net, stream(0))
    model = found.module.body if body else found.module
    assert kinds(model) == {"k_proj", "up_proj"}
    assert {layer.scaling["default"] for layer in layers(model).values()} == {1.5}


def test_all_linear_stands_beside_the_seven_projections_of_each_layer_and_default_beside_two():
    every = policy(replace(LORA, lora_modules="all-linear"))
    assert kinds(every) == SEVEN and len(layers(every)) == 2 * 7
    assert kinds(policy(LORA)) == {"q_proj", "v_proj"}
    one = policy(replace(LORA, lora_modules=("k_proj",)))
    assert kinds(one) == {"k_proj"} and len(layers(one)) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_leaves_the_head_alone_in_every_family(family):
    model = policy(replace(LORA, lora_modules="all-linear"), family)
    inside = [
        x for x in model.model.modules() if type(x).__name__ in ("Linear", "Conv1D") and hasattr(x, "lora_A")
    ]
    assert len(inside) == len(layers(model)) > 2 and isinstance(model.head, torch.nn.Linear)
    close(model.log_prob(rows()), build(family).log_prob(rows()))


def trained(tmp_path: Path, which: Method, net: Net) -> Any:
    _, found = learner(problem(), which, net, stream(0))
    disturb(found.module if which.trains == "policy" else found.module.body)
    found.module.save(tmp_path)
    return found


def test_a_checkpoint_gives_back_the_same_policy(tmp_path):
    net = replace(LORA, lora_alpha=2.0, lora_modules="all-linear")
    found = trained(tmp_path, method("dpo"), net)
    back = loaded(problem(), method("dpo"), net, tmp_path, stream(7))
    assert torch.equal(back.policy.log_prob(rows()), found.policy.log_prob(rows()))
    assert not torch.equal(found.policy.log_prob(rows()), build("llama").log_prob(rows()))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 2 and len({x.rpartition(".")[2] for x in config["target_modules"]}) == 7


def test_a_checkpoint_gives_back_the_same_head_on_an_adapted_body(tmp_path):
    net = replace(LORA, lora_alpha=2.0, lora_modules="all-linear")
    found = trained(tmp_path, method("ctl"), net).module
    back = loaded(problem(), method("ctl"), net, tmp_path, stream(7)).module
    assert len(layers(back.body)) == 2 * 7
    assert torch.equal(back.body.log_prob(rows()), found.body.log_prob(rows()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_alpha": 4.0}, "lora_alpha 2"),
        ({"lora_rank": 1}, "have r 2, this model's 1"),
        ({"lora_modules": "default"}, "beside other layers"),
        ({"lora_modules": (*SEVEN, "lm_head")}, "'lm_head'"),
    ],
)
def test_a_checkpoint_of_other_adapters_is_refused(tmp_path, change, words):
    net = replace(LORA, lora_alpha=2.0, lora_modules="all-linear")
    trained(tmp_path, method("dpo"), net)
    with pytest.raises(ValueError, match=words):
        loaded(problem(), method("dpo"), replace(net, **change), tmp_path, stream(7))


def test_a_checkpoint_that_lacks_some_of_the_layers_is_refused(tmp_path):
    trained(tmp_path, method("dpo"), LORA)
    with pytest.raises(ValueError, match="beside other layers"):
        loaded(problem(), method("dpo"), replace(LORA, lora_modules="all-linear"), tmp_path, stream(7))


@pytest.mark.parametrize("layer", ["query", "proj", "lm_head", "embed_tokens"])
def test_layers_that_the_model_lacks_are_named_with_those_it_has(layer):
    with pytest.raises(
        ValueError, match=f"called '{layer}': name some of down_proj, gate_proj, .*or take all-linear"
    ):
        policy(replace(LORA, lora_modules=("q_proj", layer)))


@pytest.mark.parametrize("teacherless", [False, True])
def test_a_merged_model_is_the_same_one_read_the_same_way(teacherless):
    """Its temperature with it: at another one it has other log-probabilities."""
    plain = build("llama")
    adapted = (Teacherless(plain.model, 4) if teacherless else plain).with_lora(2).at(0.5)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.add_(0.3)
        expected = adapted.log_prob(rows())
        whole = adapted.merged()
        found = whole.log_prob(rows())
    assert whole.adapters is None and type(whole) is type(adapted)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_network_that_peft_has_no_choice_for_wants_names():
    model = build("llama")
    model.model.config.model_type = "unheard-of"
    with pytest.raises(
        ValueError, match="PEFT names no layers for adapters in a unheard-of: name some of down_proj"
    ):
        model.with_lora(2)
    assert kinds(model.with_lora(2, target_modules="all-linear")) == SEVEN


@pytest.mark.parametrize(
    "wrong", [{"lora_alpha": -1.0}, {"lora_alpha": float("nan")}, {"lora_modules": ()}, {"lora_rank": 0}]
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("lora_rank", "lora-rank")):
        replace(LORA, **wrong)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (["all-linear"], "all-linear"),
        (["default"], "default"),
        (["q_proj"], ("q_proj",)),
        (["q_proj", "up_proj"], ("q_proj", "up_proj")),
    ],
)
def test_layers_stand_on_the_command_line_and_in_files(said, meant):
    asked = parse(["mmlu/sft", "--net.lora-modules", *said, "--net.lora-alpha", "16"], "run").recipe
    assert asked.net.lora_modules == meant and asked.net.lora_alpha == 16.0
    assert from_json(Net(), json.loads(json.dumps(asdict(asked.net)))) == asked.net


def test_settings_of_before_keep_their_keys():
    assert not {"lora_alpha", "lora_modules"} & set(hashed(Net(policy="lora")))
    assert hashed(Net(lora_alpha=16.0))["lora_alpha"] == 16.0
    assert hashed(Net(lora_modules=("a", "b")))["lora_modules"] == ["a", "b"]


def test_star_is_published_with_alpha_the_rank_beside_every_projection():
    cells = preset_of("mmlu").cells | preset_of("mmlu").variants
    published = {cells[name].net for name in ("sft", "dpo", "seed-sft", "seed-dpo", "irpo")}
    assert published == {Net("lora", lora_rank=16, lora_alpha=16.0, lora_modules="all-linear", checkpointing=True)}
    assert all(cell.fit.batch_size % cell.fit.micro_batch == 0 for cell in cells.values())
