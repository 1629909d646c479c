"""Templates render as in transformers; what a template or a message may not do is an error that says so."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from paceline.errors import ChatTemplateError
from paceline.tokens import chat_template
from paceline.tokens.chat_template import check_messages, render_chat

CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + (message.content | tojson) + "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' + (tool_call.arguments | tojson) + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.index0 > 30 %}{% break %}{% endif %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' }}
    {%- if message['content'] is string -%}
{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
{{ '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{%- generation %}{% set said = message['content'] %}{{ said + eos_token }}{% endgeneration %}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "gemma": GEMMA, "mistral": MISTRAL}
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}
USER, REPLY = (
    {"role": "user", "content": "  Hi <b>'é'</b>\n"},
    {"role": "assistant", "content": "<think>a</think>\n\nYo"},
)
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "z", "parameters": {"b": 1, "a": ["<é>", None, True]}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "z", "arguments": {"q": "é"}}}]}


def transformers_render(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    rendered, _ = render_jinja_template([chat], chat_template=template, **SPECIALS, **options)
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([USER], {"add_generation_prompt": True}),
        ([USER, REPLY, USER], {"add_generation_prompt": True, "enable_thinking": False}),
        ([USER, REPLY], {"add_generation_prompt": False}),
        ([USER, REPLY], {"add_generation_prompt": False, "continue_final_message": True}),
        ([USER, {**REPLY, "content": "So "}], {"add_generation_prompt": False, "continue_final_message": True}),
        ([SYSTEM, USER], {"add_generation_prompt": True}),
        ([USER, CALL, {"role": "tool", "content": "ü"}], {"add_generation_prompt": True, "tools": [TOOL]}),
    ],
    ids=["one", "three", "closed", "continue", "continue-space", "system", "tools"],
)
def test_rendering_equals_transformers(name: str, messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    options = {"date_string": "1 Jan 2026", **options}
    ours = {**options, "variables": {**SPECIALS, "date_string": options["date_string"]}}
    if "enable_thinking" in ours:
        ours["variables"]["enable_thinking"] = ours.pop("enable_thinking")
    del ours["date_string"]
    try:
        expected = transformers_render(TEMPLATES[name], messages, **options)
    except Exception as error:  # what transformers refuses, we refuse
        reason = "changes or drops the last message" if "does not appear" in str(error) else str(error)
        with pytest.raises(ChatTemplateError, match=reason):
            render_chat(TEMPLATES[name], messages, **ours)
    else:
        assert render_chat(TEMPLATES[name], messages, **ours) == expected


def test_raise_exception_is_said_in_its_own_words() -> None:
    with pytest.raises(ChatTemplateError, match="refuses these messages: System role not supported"):
        render_chat(GEMMA, [SYSTEM, USER])


def test_a_generation_block_is_a_scope() -> None:
    template = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    assert render_chat(template, [USER]) == transformers_render(template, [USER]) == "21"


def test_strftime_now() -> None:
    assert render_chat("{{ strftime_now('%Y') }}", [USER]) == str(datetime.now().year)


def test_json_keeps_letters_and_order() -> None:
    assert render_chat("{{ tools | tojson }}", [USER], tools=[TOOL]) == (
        '[{"type": "function", "function": {"name": "z", "parameters": {"b": 1, "a": ["<é>", null, true]}}}]'
    )


def test_text_parts_reach_templates_in_the_form_they_know() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "one\ntwo<|im_end|>" in render_chat(CHATML, [{"role": "user", "content": parts}])
    message = {"role": "user", "content": parts}
    options: dict[str, Any] = {"add_generation_prompt": True}
    assert render_chat(GEMMA, [message], variables=SPECIALS) == transformers_render(GEMMA, [message], **options)
    by_name = "{% set c = messages[0].content %}{% for p in c %}[{{ p.text }}]{% endfor %}"
    assert render_chat(by_name, [message]) == "[one][two]"
    continued = render_chat(GEMMA, [message], add_generation_prompt=False, continue_final_message=True)
    assert continued.endswith("onetwo")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        ("hi", "messages must be a list .* got str"),
        ({"role": "user"}, "messages must be a list .* got dict"),
        (["hi"], r"messages\[0\] must be an object .* got str"),
        ([USER, {"content": "x"}], r"messages\[1\] needs a 'role'"),
        ([{"role": 5, "content": "x"}], r"messages\[0\] needs a 'role'"),
        ([{"role": "user"}], r"messages\[0\] \(role 'user'\) has no 'content'"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content must be a string .* got int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\] is of type 'image_url'"),
        ([{"role": "user", "content": ["hi"]}], r"content\[0\] is of type 'str'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text part without a 'text' string"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\] holds a object"),
    ],
)
def test_messages_of_the_wrong_form_are_refused(messages: Any, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=reason):
        render_chat(CHATML, messages)


def test_messages_are_copied() -> None:
    original = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
    checked = check_messages(original)
    checked[0]["content"][0]["text"] = "b"
    assert original[0]["content"][0]["text"] == "a"  # type: ignore[index]
    assert "name" not in checked[0]


def test_continuing_needs_something_to_continue() -> None:
    for messages, template, reason in [
        ([USER, CALL], CHATML, "needs a last message with text"),
        ([USER], "{{ messages[0].content | length }}", "changes or drops the last message"),
    ]:
        with pytest.raises(ChatTemplateError, match=reason):
            render_chat(template, messages, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="exclude each other"):
        render_chat(CHATML, [USER], continue_final_message=True)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("a\n{% if %}", "does not compile: line 2"),
        ("{{ messages[0].content.missing.more }}", "refuses these messages"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recurses without end"),
        ("{% for i in range(10**9) %}x{% endfor %}", "more than 100000 range"),
        ("{% for i in range(60000) %}{% for j in range(60000) %}{% endfor %}{% endfor %}", "more than 100000 range"),
        ("{{ 'a' * 10**10 }}", "too large"),
        ("{{ 10**9 * [1] }}", "too large"),
        ("{{ 9 ** (9 ** 9) }}", "too large"),
        ("{{ lipsum(n=100000) }}", "'lipsum' is undefined"),
    ],
)
def test_templates_that_misbehave(template: str, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=reason):
        render_chat(template, [USER])


def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for i in range(500) %}{{ 'x' }}{% endfor %}"
    assert render_chat(template, [USER]) == "x" * 500
    monkeypatch.setattr(chat_template, "MAX_OUTPUT_CHARS", 499)
    with pytest.raises(ChatTemplateError, match="writes over 499 characters"):
        render_chat(template, [USER])
