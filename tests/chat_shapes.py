"""Chat templates of the shapes that are in use, each as short as it can be, and a tokenizer for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tiltlm.data.stories import stories, train_tokenizer
from tiltlm.seeds import stream

OPEN = "{% if add_generation_prompt %}"
NO_THOUGHT = "{% set said = m.content.split('</think>')[-1] %}"


@dataclass(frozen=True)
class Shape:
    """A template; the special tokens that its tokenizer knows, `eos` among them; the token in which its turns end."""

    template: str
    tokens: tuple[str, ...]
    eos: str
    end: str | None
    bos: str | None = None
    system: bool = True
    """Whether it takes a message by the system."""


SHAPES = {
    "chatml": Shape(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        + OPEN + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>", "</s>"), eos="</s>", end="<|im_end|>",
    ),
    "chatml, a system of its own": Shape(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + OPEN + "<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>", end="<|im_end|>",
    ),
    "headers": Shape(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        + OPEN + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        eos="<|end_of_text|>", end="<|eot_id|>", bos="<s>",
    ),
    "opens a thought": Shape(  # earlier thoughts are dropped, and so is the answer's own
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}" + NO_THOUGHT +
        "<|Assistant|>{{ said }}{{ eos_token }}{% else %}<|{{ m.role | title }}|>{{ m.content }}{% endif %}{% endfor %}"
        + OPEN + "<|Assistant|><think>\n{% endif %}",
        ("<|User|>", "<|Assistant|>", "<|System|>", "<think>", "</think>", "<|eos|>"),
        eos="<|eos|>", end="<|eos|>", bos="<s>",
    ),
    "writes the last thought": Shape(  # a thought is written, if an empty one, in the answer alone
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + NO_THOUGHT +
        "{% if loop.last %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if "
        "'</think>' in m.content else '' }}\n</think>\n\n{% endif %}{{ said.strip('\n') }}{% else %}"
        "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + OPEN + "<|im_start|>assistant\n<think>\n{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|endoftext|>"), eos="<|endoftext|>", end="<|im_end|>",
    ),
    "instructions": Shape(  # strict turns, contents stripped, a system in front of what is asked first, no opening
        "{{ bos_token }}{% set talk = messages[1:] if messages[0].role == 'system' else messages %}"
        "{% for m in talk %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {% if loop.first and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ m.content.strip() }} [/INST]{% else %} "
        "{{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]", "</s>"), eos="</s>", end="</s>", bos="<s>",
    ),
    "model instead of assistant": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}"
        + OPEN + "<start_of_turn>model\n{% endif %}",
        ("<start_of_turn>", "<end_of_turn>", "<eos>"), eos="<eos>", end="<end_of_turn>", bos="<s>", system=False,
    ),
    "an end behind everything": Shape(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        + OPEN + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), eos="<|endoftext|>", end="<|end|>",
    ),
    "no tokens": Shape(
        "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n\n{% endfor %}" + OPEN + "### assistant:{% endif %}",
        ("</s>",), eos="</s>", end=None,
    ),
    "an end that the tokenizer does not know": Shape(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        + OPEN + "<|im_start|>assistant\n{% endif %}",
        ("</s>",), eos="</s>", end=None,
    ),
    "parts alone": Shape(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + OPEN + "<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>", end="<|im_end|>",
    ),
    "texts and parts": Shape(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{{ '|' if not loop.last }}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}" + OPEN + "<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>", end="<|im_end|>",
    ),
    "tools": Shape(
        "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
        "<tool_call>{{ call.function.name }} {{ call.function.arguments }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        + OPEN + "<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "</s>"), eos="</s>", end="<|im_end|>",
    ),
}  # fmt: skip


@cache
def speaker(name: str, adds_bos: bool = True) -> Any:
    """The tokenizer of a shape; with `adds_bos` it puts its start token before every text by itself."""
    shape = SHAPES[name]
    made = train_tokenizer(stories(30, stream(0, "test-chat")), 300)
    made.add_tokens(list(shape.tokens), special_tokens=True)
    made.eos_token, made.bos_token = shape.eos, shape.bos
    made.chat_template = shape.template
    if not adds_bos or shape.bos is None:
        from tokenizers import processors

        made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return made
