"""One test for each thread of a bug that users of other DeepSeek-V3.2 servers reported."""

import json
import logging

import pytest

from serving.server import WEATHER, Answer, Server, request
from text_cases.histories import (
    ASSISTANT,
    BOS,
    EOS,
    NOOP,
    NOOP_JSON,
    TOOLS,
    USER,
    assistant,
    block,
    call,
    invoke,
    parameter,
    result,
    system,
    user,
)
from text_cases.replies import function
from vllm_dsv32.serving.encoding import encode_messages

PARIS = ("weather", '{"city": "Paris"}')
BARE = invoke("weather", parameter("city", "Paris"))
THINKING = {"chat_template_kwargs": {"thinking": True}}


@pytest.fixture
def server(tokenizer):
    return Server(tokenizer)


def test_vllm_54911_tools_come_after_the_system_prompt():
    prompt = encode_messages([system("S"), user("u")], tools=[NOOP])
    assert prompt.startswith(f"{BOS}S\n\n## Tools\n")


def test_the_seven_blank_lines_of_the_tools_text():
    """They are missing in vLLM's, SGLang's and xgrammar's copies of DeepSeek's encoder."""
    prompt = encode_messages([user("u")], tools=[NOOP])
    assert TOOLS % NOOP_JSON in prompt
    assert (TOOLS % NOOP_JSON)[2:].count("\n\n") == 7


def test_deepseeks_own_key_for_reasoning_is_read():
    """vLLM raises on it."""
    messages = [user("u"), assistant("a", reasoning_content="r")]
    assert encode_messages(messages, thinking=True) == f"{BOS}{USER}u{ASSISTANT}<think>r</think>a{EOS}"


@pytest.mark.parametrize("thinking", [False, True])
def test_vllm_53737_a_trailing_system_message_stays_out_of_the_assistants_turn(thinking):
    prompt = encode_messages([user("Hi"), system("Be brief.")], thinking=thinking)
    assert prompt.index("Be brief.") < prompt.index(ASSISTANT)
    assert prompt.endswith("<think>" if thinking else "</think>")


def test_tensorrt_llm_17020_an_ignored_key_is_warned_of(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    tokenizer.apply_chat_template([user("u")], thinking_mode=True, tokenize=False)
    assert any("'thinking_mode'" in record.getMessage() for record in caplog.records)


def test_sglang_17551_what_follows_a_tool_result_is_not_all_reasoning(server):
    messages = [user("u"), assistant(tool_calls=[call("a", "weather", "{}")], reasoning="r"), result("a", "sunny")]
    assert server.answer(request(messages, **THINKING), "so</think>Sunny.") == Answer("so", "Sunny.")


def test_vllm_41132_structured_output_does_not_land_in_the_reasoning(server):
    keys = {"tools": (), "response_format": {"type": "json_object"}}
    assert server.answer(request(**keys, **THINKING), 'hm</think>{"a": 1}') == Answer("hm", '{"a": 1}')
    assert server.answer(request(**keys), '{"a": 1}') == Answer("", '{"a": 1}')
    hidden = request(**keys, **THINKING, include_reasoning=False)
    assert server.stream(hidden, '{"a": 1}').content == '{"a": 1}'


def test_vllm_ascend_8042_content_is_not_null(server):
    for chat_request in (request(), request(tools=()), request(reasoning_effort="none")):
        assert server.answer(chat_request, "Hi") == Answer("", "Hi")


@pytest.mark.parametrize("keyword", ["anyOf", "oneOf", "allOf"])
def test_vllm_43255_composed_schemas(server, keyword):
    options = [{"type": "object"}] if keyword == "allOf" else [{"type": "object"}, {"type": "null"}]
    tools = [function("plan", {"wait": {keyword: options}})]
    reply = block(invoke("plan", parameter("wait", '{"minutes": 5}')))
    assert server.answer(request(tools=tools), reply) == Answer("", "", [("plan", '{"wait": {"minutes": 5}}')])


@pytest.mark.parametrize("wrapper", ["arguments", "input"])
def test_vllm_41240_a_wrapper_is_opened_only_if_the_schema_does_not_declare_it(server, wrapper):
    reply = block(invoke("weather", parameter(wrapper, '{"city": "Paris"}', "false")))
    assert server.answer(request(), reply) == Answer("", "", [PARIS])
    declared = [function("weather", {wrapper: {"type": "object"}, "city": {}})]
    assert server.answer(request(tools=declared), reply).calls == [
        ("weather", f'{{"{wrapper}": {{"city": "Paris"}}}}')
    ]


def test_vllm_41240_held_text_is_flushed(server):
    assert server.answer(request(), "2 <") == Answer("", "2 <")


@pytest.mark.parametrize(
    ("value", "string"),
    [('{"command": "ls"}', "false"), ('{"command": "ls"}', "true"), ("ls", "true"), ('"ls"', "false")],
)
def test_sglang_39344_every_form_of_the_wrapper(server, value, string):
    tools = [function("bash", {"command": {"type": "string"}}, ["command"])]
    reply = block(invoke("bash", parameter("arguments", value, string)))
    assert server.answer(request(tools=tools), reply) == Answer("", "", [("bash", '{"command": "ls"}')])


class TestVllm48931:
    """A call outside a block is one; a mention of the markup is none."""

    def test_the_start_of_the_block_is_missing(self, server):
        reply = f"Let me see.\n\n{BARE}\n</｜DSML｜function_calls>"
        assert server.answer(request(), reply) == Answer("", "Let me see.", [PARIS])

    @pytest.mark.parametrize(
        "reply",
        [
            'To call it, write <｜DSML｜invoke name="weather"> and the arguments.',
            'To call it, write "<｜DSML｜function_calls>".',
            invoke("weather", parameter("days", "3", "false")),
            invoke("no_such_tool", parameter("city", "Paris")),
            BARE.removesuffix("</｜DSML｜invoke>"),
        ],
        ids=["prose", "prose of a block", "required argument missing", "undeclared", "not closed"],
    )
    def test_no_phantom_calls(self, server, reply):
        assert server.answer(request(), reply) == Answer("", reply)

    @pytest.mark.parametrize("reply", [BARE, block(BARE)])
    def test_without_tools_markup_is_text(self, server, reply):
        assert server.answer(request(tools=()), reply) == Answer("", reply)


def test_vllm_36003_the_blank_line_before_calls_is_not_doubled(server):
    reply = "Let me see." + block(BARE)
    answer = server.answer(request(tools=[WEATHER]), reply)
    calls = [call(str(i), name, arguments) for i, (name, arguments) in enumerate(answer.calls)]
    prompt = encode_messages([user("u"), assistant(answer.content, tool_calls=calls)])
    assert prompt == f"{BOS}{USER}u{ASSISTANT}</think>{reply}{EOS}"
    assert json.loads(answer.calls[0][1]) == {"city": "Paris"}
