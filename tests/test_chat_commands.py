"""Conversations through the command line: the same text for training, drawing and asking again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from chat_shapes import speaker
from command import tiltlm
from tiltlm.commands.models import load_decoder
from tiltlm.data.chat import opened
from tiltlm.models.causal import CausalLM
from tiltlm.stages.reading import Reader, Reading

TOOL = {"type": "function", "function": {"name": "get", "description": "Weather", "parameters": {}}}
ASK, YES, NO = (
    {"role": role, "content": x} for role, x in (("user", "hi"), ("assistant", "yes"), ("assistant", "no"))
)
POSITIONS = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random network that holds 256 tokens, with the tokenizer and template of tools."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = speaker("tools")
    config = GPT2Config(
        n_layer=1,
        n_embd=16,
        n_head=2,
        n_positions=POSITIONS,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=None,
    )
    made = CausalLM.from_config(config)
    made.tokenizer = tokenizer
    made.save(folder)
    return folder


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sampled(name: str | Path, folder: Path, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    write(folder / "p.jsonl", *rows)
    tiltlm("sample", str(name), "--prompts", "p.jsonl", "--out", "y.jsonl", cwd=folder)
    return lines(folder / "y.jsonl")


def test_messages_are_asked_as_the_template_writes_them(model, tmp_path):
    """As `prompt` or as `messages` (less its answer), with tools; columns stay; text and ids are as before."""
    text = opened(speaker("tools"), [ASK], [TOOL])
    rows = sampled(
        model, tmp_path, {"prompt": text}, {"prompt": [ASK], "tools": [TOOL], "id": 7},
        {"messages": [ASK, YES], "tools": [TOOL]}, {"prompt": [3, 4]},
    )  # fmt: skip
    assert [row["prompt"] for row in rows] == [text, text, text, [3, 4]]
    assert rows[1]["messages"] == [ASK] and rows[1]["id"] == 7 and rows[2]["messages"] == [ASK, YES]
    decoder = load_decoder(str(model), "cpu", "float32", ())
    assert decoder.encode(text, "here") == speaker("tools")(text)["input_ids"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "has a part of type 'image', and only text",
        ),
        ({"prompt": 3}, "p.jsonl:2: a prompt is text, messages or a list of token ids; got int"),
        ({"messages": "hi"}, "p.jsonl:2: column 'prompt' is missing; this line has messages"),
        ({"prompt": ""}, "p.jsonl:2 has no tokens"),
        ({"prompt": [3] * POSITIONS}, "prompt (256) plus new tokens (64) exceed the model's 256 positions"),
        ({"prompt": [5000]}, "p.jsonl:2: token id 5000 is outside the vocabulary"),
    ],
)
def test_a_prompt_that_cannot_be_asked_leaves_no_file(row, said, model, tmp_path):
    write(tmp_path / "p.jsonl", {"prompt": "a"}, row)
    args = ["--prompts", "p.jsonl", "--out", "new/y.jsonl"]
    done = tiltlm("sample", str(model), *args, cwd=tmp_path, check=False)
    assert done.returncode == 2 and said in done.stderr and [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_run_on_conversations_trains_on_one_end_and_reads_long_prompts_as_its_stages_do(model, tmp_path):
    rows = [{"prompt": [ASK | {"content": f"hi {k}"}], "chosen": [YES], "rejected": [NO]} for k in range(12)]
    write(tmp_path / "talks.jsonl", *rows)
    done = tiltlm(
        "run", "dialogues/sft-model", "--task.data", "talks.jsonl", "--task.valid-rows", "2", "--task.test-rows", "2",
        "--task.model", str(model), "--task.most-tokens", "40", "--task.new-tokens", "8", "--task.sft.epochs", "1",
        "--task.sft.batch-size", "4", "--task.sft.checkpoints", "1", "--task.sft.evaluations", "0", cwd=tmp_path,
    )  # fmt: skip
    run = tmp_path / done.stdout.splitlines()[-1]
    (data,) = (tmp_path / "runs/dialogues/data").iterdir()
    assert all(
        row["chosen"] == "yes" and row["prompt"].endswith("assistant\n") for row in lines(data / "train.jsonl")
    )
    turn = speaker("tools").convert_tokens_to_ids("<|im_end|>")
    for stop, end in (((), turn), (("5",), 5)):
        encoder = Reading(Reader(str(model), most_tokens=40, new_tokens=8, stop=stop), str(model)).encoder
        answers = encoder.answers(lines(data / "train.jsonl"), "chosen")
        assert {ids[-1] for ids in answers.completions.lists()} == {end}
        assert not {turn, speaker("tools").eos_token_id} & {
            i for ids in answers.completions.lists() for i in ids[:-1]
        }
    decoder = load_decoder(str(run), "cpu", "float32", ())
    long = [ASK | {"content": "hello there, " * 60}]
    (row,) = sampled(run, tmp_path, {"prompt": long})
    ids = speaker("tools")(row["prompt"])["input_ids"]
    assert (
        len(ids) > POSITIONS
        and decoder.encode(row["prompt"], "here") == ids[-32:]
        and len(row["completion_ids"]) <= 8
    )
