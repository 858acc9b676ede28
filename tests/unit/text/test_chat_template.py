"""Chat templates render as in transformers, and cost only so much."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from pagoda.errors import CheckpointError, InvalidRequest
from pagoda.text import chat_template
from pagoda.text.chat_template import ChatTemplate
from pagoda.text.tokenizer import Tokenizer

WithTemplate = Callable[[str], Tokenizer]

CONVERSATIONS = {
    "one": [{"role": "user", "content": "What is the capital of France?"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi\n\n"}],
    "turns": [
        {"role": "user", "content": "日本 🎉 <b>&amp;</b>"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "  and\n\n\n 'quotes' \"\\ "},
    ],
    "empty": [{"role": "user", "content": ""}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    "tool call": [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "w", "arguments": {"at": "Nîmes"}}}],
        },
        {"role": "tool", "content": '{"t": 20}'},
    ],
    "reasoning": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning": "because"},
        {"role": "user", "content": "and?"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "w", "description": "<é> & 'q'", "parameters": {"type": "object"}}}]
TEMPLATES = {
    "llama 2": (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + message['content'] | string | trim + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | default('') + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "loops": (
        "{%- set ns = namespace(last=0, text='') %}\n"
        "{% for m in messages %}\n    {% if loop.first %}first{% endif %}\n"
        "    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
        "    {%- set ns.last = loop.index0 %}{% set ns.text = ns.text ~ loop.revindex ~ m.role %}\n"
        "    {%- if loop.index > 2 %}{% break %}{% endif %}\n{% endfor %}\n"
        "{{ ns.text }} {{ ns.last }} {{ loop is defined }} {{ range(3) | list }}"
        "{% for m in messages[::-1] recursive %}{{ m.role[:1] }}{% else %}none{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    ),
    "macros and tools": (
        "{% macro show(m) %}[{{ m.role }}: {% if m.content is string %}{{ m.content | trim }}"
        "{% elif m.content is iterable %}{% for part in m.content %}{{ part.text }};{% endfor %}{% endif %}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson(indent=2) }}{% endfor %}]{% endmacro %}"
        "{% for m in messages %}{{ show(m) }}{% endfor %}{{ documents is none }}{{ unk_token }}{{ pad_token }}"
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{{ tools is none }}"
    ),
    "reasoning and generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}|{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    ),
}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", ["one", "system", "turns", "empty"])
def test_smollm2_as_transformers(smol: Tokenizer, hf_smol: Any, name: str, add_generation_prompt: bool) -> None:
    messages = CONVERSATIONS[name]
    text = hf_smol.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    ids = hf_smol.apply_chat_template(messages, return_dict=False, add_generation_prompt=add_generation_prompt)
    assert smol.render_chat(messages, add_generation_prompt=add_generation_prompt) == text
    assert smol.encode_chat(messages, add_generation_prompt=add_generation_prompt) == ids


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_other_templates_as_transformers(
    with_template: WithTemplate, hf_smol: Any, template: str, messages: Any, tools: Any
) -> None:
    ours = with_template(template)
    text = hf_smol.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False)
    assert ours.render_chat(messages, tools=tools, add_generation_prompt=False) == text
    ids = hf_smol.apply_chat_template(messages, tools=tools, chat_template=template, return_dict=False)
    assert ours.encode_chat(messages, tools=tools, add_generation_prompt=False) == ids


def test_variables_of_the_request_reach_the_template(with_template: WithTemplate) -> None:
    tokenizer = with_template("{{ enable_thinking }} {{ strftime_now('%Y') | length }}")
    assert tokenizer.render_chat([], template_kwargs={"enable_thinking": False}) == "False 4"


@pytest.mark.parametrize("name", ["messages", "tokenize", "chat_template", "tools", "bos_token", "_x", "a b", ""])
def test_names_that_requests_cannot_set(smol: Tokenizer, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"cannot set '{name}'") as caught:
        smol.encode_chat([], template_kwargs={name: 1})
    assert caught.value.field == "chat_template_kwargs"


def test_no_template_points_to_completions(wordpiece: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        wordpiece.render_chat([{"role": "user", "content": "x"}])


def test_the_templates_own_words_reach_the_caller() -> None:
    with pytest.raises(InvalidRequest, match=r"refuses these messages: roles must alternate\.$") as caught:
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render({})
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "template",
    [
        "{{ x.y.z }}",
        "{{ 1 // 0 }}",
        "{{ messages + 1 }}",
        "{{ messages.append(1) }}",
        "{{ range(10**6) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(_a=1) }}",
        "{% set n = namespace() %}{% set n._a = 1 %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include 'x' %}",
    ],
)
def test_whatever_goes_wrong_is_a_plain_refusal(template: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(template).render({"messages": []})
    assert caught.value.message.startswith("The model's chat template ")
    assert caught.value.message.count("\n") == 0
    assert "Traceback" not in caught.value.message


def test_a_template_that_cannot_be_compiled() -> None:
    with pytest.raises(CheckpointError, match="cannot be compiled"):
        ChatTemplate("{% for %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in many %}{% for b in many %}{% set c = b %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for a in many recursive %}{{ loop(many) if loop.depth < 9 }}{% endfor %}",
    ],
    ids=["ranges", "strings", "macros", "recursion"],
)
def test_endless_rendering_ends(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.1)
    start = time.thread_time()
    with pytest.raises(InvalidRequest, match="took more than"):
        ChatTemplate(template).render({"many": "x" * 99_999})
    assert time.thread_time() - start < 1


def test_endless_output_ends() -> None:
    with pytest.raises(InvalidRequest, match="wrote more than"):
        ChatTemplate("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}").render({})


def nested(depth: int) -> Any:
    return {"role": nested(depth - 1)} if depth else "x"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": "x" * (chat_template.MAX_INPUT_CHARS + 1)}], "characters"),
        ([{}] * (chat_template.MAX_INPUT_VALUES + 1), "values"),
        ([nested(200)], "nested more than"),
        (["text"], r"messages\[0\] is a str"),
        ([{"role": object()}], "only JSON values"),
    ],
    ids=["characters", "values", "depth", "not an object", "not JSON"],
)
def test_inputs_beyond_the_bounds(smol: Tokenizer, messages: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        smol.encode_chat(messages)
    assert caught.value.field == "messages"
    assert len(caught.value.message) < 300


def test_many_messages_are_fine(smol: Tokenizer) -> None:
    messages = [{"role": "user", "content": f"message {n}"} for n in range(5000)]
    start = time.thread_time()
    assert smol.render_chat(messages).count("<|im_start|>") == 5002
    assert time.thread_time() - start < 1
