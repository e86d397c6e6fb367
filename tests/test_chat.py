"""Conversations: prompt + completion + end is the template's own text, whatever shape the template has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from chat_shapes import SHAPES, speaker
from tiltlm.data.chat import opened, rendered
from tiltlm.data.encoding import Encoder
from tiltlm.data.preference_rows import read_preferences
from tiltlm.models.templates import end_of_turn

WORDS = ["yes", "No.", " <b>I", "</b>", "am", "\n", "<think>", "dog's", "  ", "é", "1 < 2", "[x]", "\n\n", "<"]
PLAIN = [name for name in SHAPES if name not in ("opens a thought", "writes the last thought")]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def talk(rng: np.random.Generator, system: bool) -> list[dict[str, Any]]:
    """A random conversation that ends in a question; some answers in it have thoughts."""

    def words() -> str:
        return "q" + " ".join(rng.choice(WORDS, rng.integers(1, 5)).tolist())

    made = [{"role": "system", "content": words()}] if system and rng.random() < 0.5 else []
    for _ in range(rng.integers(0, 3)):
        thought = f"<think>\n{words()}\n</think>\n\n" if rng.random() < 0.5 else ""
        made += [user(words()), assistant(thought + words())]
    return [*made, user(words())]


def answer(rng: np.random.Generator) -> list[dict[str, Any]]:
    thought = f"<think>\n{rng.choice(WORDS)}\n</think>\n\n" if rng.random() < 0.4 else ""
    return [assistant(thought + "".join(rng.choice(WORDS, rng.integers(1, 4)).tolist()))]


def whole(tokenizer: Any, messages: list[dict[str, Any]], opening: bool = False) -> str:
    """The template's own text, without the start token that the tokenizer adds itself."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening)
    adds = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token
    return text.removeprefix(tokenizer.bos_token) if adds else text


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "parts alone"])
def test_prompt_and_completion_and_one_end_are_the_template_s_own_text(name, adds_bos):
    """Random conversations, two answers each: of both, and as ids too; the prompt holds all messages, and no more than
    the model is asked."""
    shape, tokenizer, rng = SHAPES[name], speaker(name, adds_bos), np.random.default_rng(0)
    end = shape.end or ""
    turn = tokenizer.convert_tokens_to_ids(end) if end else None
    encoder = Encoder(tokenizer, (tokenizer.eos_token_id,), 2000, 1000, turn)
    for _ in range(30):
        messages, sides = talk(rng, shape.system), [answer(rng), answer(rng)]
        prompt, completions = rendered(tokenizer, messages, sides)
        start = whole(tokenizer, messages, opening=True)
        assert start.startswith(prompt) and messages[-1]["content"].strip() in prompt
        pairs = encoder.pairs([{"prompt": prompt, "chosen": completions[0], "rejected": completions[1]}])
        assert pairs.chosen.prompts.lists() == pairs.rejected.prompts.lists()
        for side, completion, samples in zip(sides, completions, (pairs.chosen, pairs.rejected), strict=True):
            text = whole(tokenizer, messages + side)
            behind = text.removeprefix(prompt + completion)
            assert text.startswith(prompt + completion + end)
            assert behind.strip() in (end, f"{end}\n{shape.eos}", end or "<|im_end|>")
            (ids,) = samples.completions.lists()
            ends = [i for i in ids if i in (turn, tokenizer.eos_token_id)]
            assert ends == ids[-1:] == [tokenizer.convert_tokens_to_ids(shape.end or shape.eos)]
            asked = encoder.prompt_text(encoder.prompt(prompt))
            assert asked + encoder.text(ids) == (prompt if adds_bos else asked) + completion


@pytest.mark.parametrize("name", SHAPES)
def test_the_end_of_turn_is_found_by_rendering(name):
    assert end_of_turn(speaker(name)) == SHAPES[name].end


def test_a_word_of_the_vocabulary_may_be_the_end_of_turn():
    """Vocabularies hold `<|im_end|>` without calling it special; what they do not know is no end."""
    for known, end in ((["<|im_end|>"], "<|im_end|>"), ([], None)):
        inner = Tokenizer(
            models.WordLevel({word: k for k, word in enumerate(["<unk>", *known])}, unk_token="<unk>")
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", chat_template=SHAPES["chatml"].template
        )
        assert end_of_turn(tokenizer) == end


def test_a_tokenizer_without_a_template_has_no_end_of_turn():
    tokenizer = speaker("no tokens")
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert plain.chat_template is None and end_of_turn(plain) is None


# ---- where prompt and answer meet, by hand ----


def test_both_sides_share_the_beginning_even_if_one_of_them_opens_the_thought_and_one_does_not():
    """The opening `<think>` line is in the prompt only where all answers have it: never cut from one side alone."""
    tokenizer, ask = speaker("chatml"), [user("hi")]
    thinking = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
    copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=thinking, eos_token="</s>")
    with_thought = [assistant("<think>\na\n</think>\nyes")]
    head = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(copy, ask, [with_thought, with_thought]) == (head + "<think>\n", ["a\n</think>\nyes"] * 2)
    assert rendered(copy, ask, [with_thought, [assistant("no")]]) == (
        head, ["<think>\na\n</think>\nyes", "no"],
    )  # fmt: skip
    assert opened(copy, ask) == head + "<think>\n"


def test_what_answers_merely_share_is_theirs():
    prompt, sides = rendered(speaker("chatml"), [user("hi")], [[assistant("I am A")], [assistant("I am B")]])
    assert prompt.endswith("assistant\n") and sides == ["I am A", "I am B"]


def test_the_prompt_never_ends_inside_a_token():
    """`<think>` and `<b>` both begin with "<": that belongs to neither."""
    prompt, sides = rendered(speaker("opens a thought"), [user("hi")], [[assistant("<b>A")], [assistant("<i>B")]])
    assert prompt == "<|User|>hi<|Assistant|>" and sides == ["<b>A", "<i>B"]


def test_a_thought_of_the_answer_s_own_is_written_as_the_template_writes_it():
    prompt, sides = rendered(
        speaker("writes the last thought"),
        [user("hi")],
        [[assistant("<think>\nhm\n</think>\n\nyes")], [assistant("no")]],
    )
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert sides == ["hm\n</think>\n\nyes", "\n</think>\n\nno"]


def test_a_template_that_rewrites_the_last_message_is_refused():
    """A system written only before a last question: with an answer behind it, it is gone."""
    tokenizer = speaker("chatml")
    rewriting = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=rewriting, eos_token="</s>")
    assert rendered(copy, [user("hi")], [[assistant("yes")]]) == ("[INST] hi[/INST]", ["yes"])
    with pytest.raises(
        ValueError, match=r"rewrites the prompt once an answer follows: '\[INST\] Be kind.*\[INST\] hi"
    ):
        rendered(copy, [{"role": "system", "content": "Be kind"}, user("hi")], [[assistant("yes")]])


# ---- exactly one end ----


def test_a_conversation_ends_in_its_turn_s_token_and_other_text_in_the_tokenizer_s():
    tokenizer = speaker("chatml")
    turn, eos = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "</s>"))
    encoder = Encoder(tokenizer, (eos,), 60, 20, turn)
    prompt, (said,) = rendered(tokenizer, [user("hi")], [[assistant("yes")]])
    samples = encoder.answers([{"prompt": prompt, "a": said}, {"prompt": "Q: hi\nA:", "a": " yes"}], "a")
    ends = [ids[-1] for ids in samples.completions.lists()]
    assert ends == [turn, eos] and samples.finished.tolist() == [True, True]
    assert [encoder.text(ids) for ids in samples.completions.lists()] == ["yes", " yes"]
    plain = Encoder(tokenizer, (eos,), 60, 20)
    assert plain.answers([{"prompt": prompt, "a": said}], "a").completions.lists()[0][-1] == eos


@pytest.mark.parametrize("end", ["<|im_end|>", "</s>", "<|im_start|>"])
def test_a_text_that_brings_its_end_gets_no_second_one(end):
    tokenizer = speaker("chatml")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "</s>", "<|im_start|>")}
    encoder = Encoder(tokenizer, (ids["</s>"], ids["<|im_start|>"]), 60, 20, ids["<|im_end|>"])
    said = tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert encoder.completion("yes" + end) == ([*said, ids[end]], True)
    assert encoder.text([*said, ids[end]]) == "yes"


# ---- messages that are more than texts ----

CALL = {"type": "function", "function": {"name": "get", "arguments": '{"at": "Rome"}'}}
TOOL = {"type": "function", "function": {"name": "get", "description": "Weather", "parameters": {}}}


def read(tmp_path: Path, tokenizer: Any, *rows: dict[str, Any]) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences(path, tokenizer=tokenizer)


def test_tool_calls_tools_and_any_role_reach_the_template(tmp_path):
    tokenizer = speaker("tools")
    asked = [
        {"role": "developer", "content": "Be brief"}, user("weather?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "get", "content": "sun"}, {"role": "function", "content": "more"},
    ]  # fmt: skip
    sides = {
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "rejected": [assistant("dunno")],
    }
    loaded = read(tmp_path, tokenizer, {"prompt": asked, **sides, "tools": [TOOL]})
    text = tokenizer.apply_chat_template(asked, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert '"description": "Weather"' in text and all(f"<|im_start|>{m['role']}\n" in text for m in asked)
    call = '<tool_call>get {"at": "Rome"}</tool_call>'
    assert loaded.rows == [{"prompt": text, "chosen": call, "rejected": "dunno"}] and not loaded.notes
    again = read(tmp_path, tokenizer, {"prompt": asked, **sides, "tools": json.dumps([TOOL])})
    assert again.rows == loaded.rows
    assert read(tmp_path, tokenizer, {"prompt": asked, **sides, "tools": []}).rows[0]["prompt"] in text


@pytest.mark.parametrize("name", ["tools", "trl_conv"])
def test_posted_layouts_are_read(name, shared_data):
    path = shared_data.parent / "cases" / "layouts" / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    (row,) = read_preferences(path, tokenizer=speaker("tools")).rows
    sides = {"tools": ("<tool_call>get {}</tool_call>", "dunno"), "trl_conv": ("4.", "5.")}[name]
    assert (row["chosen"], row["rejected"]) == sides and row["prompt"].endswith(
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_a_template_leaves_out_is_said(tmp_path):
    """Calls: refused, as the answer would be empty. Tools and unknown roles: counted."""
    tokenizer = speaker("chatml")
    deaf = tokenizer.chat_template.replace(
        "{{ '<|im_start|>'", "{% if m.role in ('user', 'assistant') %}{{ '<|im_start|>'"
    )
    deaf = deaf.replace("{% endfor %}", "{% endif %}{% endfor %}").replace("m['content']", "(m['content'] or '')")
    copy = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=deaf, eos_token="</s>")
    asked = [{"role": "developer", "content": "Be brief"}, user("hi")]
    loaded = read(tmp_path, copy, {"prompt": asked, "completion": [assistant("yes")], "tools": [TOOL]})
    assert loaded.notes == {
        "tools left out, which the chat template does not write": 1,
        "messages by 'developer' left out, which the chat template does not write": 1,
    }
    calls = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the chat template does not write tool calls"):
        read(tmp_path, copy, {"prompt": [user("hi")], "completion": calls})


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


@pytest.mark.parametrize("name", PLAIN)
def test_parts_of_text_are_read_by_every_template_and_said_as_it_says_them(name, tmp_path):
    """A template that reads lists gets them; to the others they are joined; text becomes a part where it has to."""
    listed = {
        "prompt": [{"role": "user", "content": parts("a", " b")}],
        "completion": [{"role": "assistant", "content": parts("c")}],
    }
    joined = {"prompt": [user("a b")], "completion": [assistant("c")]}
    rows = read(tmp_path, speaker(name), listed, joined).rows
    if name == "texts and parts":
        assert rows[0] == {name: text.replace("a b", "a| b") for name, text in rows[1].items()}
    else:
        assert rows[0] == rows[1]
    assert "a b" in rows[1]["prompt"] and rows[1]["completion"].strip() == "c"
    assert "type" not in rows[0]["prompt"] + rows[0]["completion"]


def test_no_part_is_lost_on_a_template_that_reads_the_first_alone(tmp_path):
    tokenizer = speaker("texts and parts")
    first = tokenizer.chat_template.replace("{% for part in m.content %}", "{% for part in m.content[:1] %}")
    copy = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=first, eos_token="<|im_end|>"
    )
    row = {"prompt": [{"role": "user", "content": parts("a", " b")}], "completion": [assistant("c")]}
    assert "user\na b<|im_end|>" in read(tmp_path, copy, row).rows[0]["prompt"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"type": "image"}, {"type": "text", "text": "?"}], "has a part of type 'image'"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "has a part of type 'image_url'"),
        ([{"type": "input_audio", "input_audio": {}}], "has a part of type 'input_audio'"),
        ([{"type": "text"}], "has a part without its text"),
        ([3], "must be text; it is list, and a part of that is int"),
        (3, "must be text; it is int"),
        ({"a": 1}, "must be text; it is dict"),
    ],
)
def test_contents_that_are_no_text_are_refused_by_name(content, said, tmp_path):
    row = {"prompt": [{"role": "user", "content": content}], "completion": [assistant("c")]}
    with pytest.raises(ValueError) as caught:
        read(tmp_path, speaker("texts and parts"), row)
    assert f"rows.jsonl:1: the content of a message by 'user' {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"images": ["a.png"]}, "the row has images, and only text is read"),
        ({"tools": "[{"}, "column 'tools' is text that is not JSON"),
        ({"tools": {"a": 1}}, "column 'tools' must be a list of objects; it is dict"),
        ({"completion": []}, "prompts and answers are text or lists of {role, content}"),
        ({"prompt": []}, "no message stands before the answer"),
    ],
)
def test_rows_with_what_cannot_be_read_are_refused_by_name(more, said, tmp_path):
    with pytest.raises(ValueError) as caught:
        read(tmp_path, speaker("tools"), {"prompt": [user("a")], "completion": [assistant("c")]} | more)
    assert f"rows.jsonl:1: {said}" in str(caught.value)


def test_a_single_message_and_fields_without_a_value_are_read(tmp_path):
    """Parquet files give every message the fields of all; they do not make two messages different."""
    ask = [user("hi") | {"tool_calls": None}]
    rows = read(
        tmp_path, speaker("chatml"),
        {"chosen": [*ask, assistant("yes")], "rejected": [user("hi"), assistant("no")]},
        {"prompt": ask, "chosen": assistant("yes"), "rejected": assistant("no") | {"name": None}},
        {"prompt": ask, "chosen": [*ask, assistant("yes")], "rejected": [*ask, assistant("no")]},
    ).rows  # fmt: skip
    assert rows[0] == rows[1] == rows[2] and (rows[0]["chosen"], rows[0]["rejected"]) == ("yes", "no")
