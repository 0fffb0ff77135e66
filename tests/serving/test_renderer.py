import asyncio
import copy
import json
from types import SimpleNamespace

import pytest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.renderers.params import ChatParams

from serving.server import NOW, request
from text_cases.histories import (
    BOS,
    CHAT,
    FORMAT,
    HISTORIES,
    THINK,
    TOOLS,
    USER,
    assistant,
    call,
    result,
    user,
)
from vllm_dsv32.serving import messages as messages_module
from vllm_dsv32.serving.renderer import Dsv32Renderer

MAX_LENGTH = 4096


@pytest.fixture(scope="module")
def renderer(tokenizer):
    model_config = SimpleNamespace(
        model="tiny",
        hf_config=SimpleNamespace(model_type="deepseek_v32"),
        hf_text_config=SimpleNamespace(model_type="deepseek_v32"),
        hf_overrides=None,
        is_encoder_decoder=False,
        supports_multimodal_inputs=False,
        multimodal_config=None,
        enable_prompt_embeds=False,
        renderer_num_workers=1,
        max_model_len=MAX_LENGTH,
        encoder_config=None,
        get_vocab_size=lambda: len(tokenizer),
    )
    config = SimpleNamespace(model_config=model_config, parallel_config=SimpleNamespace(_api_process_rank=0))
    renderer = Dsv32Renderer(config, tokenizer)
    yield renderer
    renderer.shutdown()


def render(renderer, messages, **options):
    response_format = options.pop("response_format", None)
    params = ChatParams(chat_template_kwargs=options, response_format=response_format)
    conversation, prompt = renderer.render_messages(messages, params)
    assert asyncio.run(renderer.render_messages_async(messages, params)) == (conversation, prompt)
    return conversation, prompt


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.name)
def test_history(history, renderer):
    before = copy.deepcopy(history.messages)
    _, prompt = render(renderer, history.messages, tokenize=False, **history.options)
    assert prompt == {"prompt": history.prompt}
    assert history.messages == before


def test_ids_if_vllm_asks_for_them(renderer, tokenizer):
    _, prompt = render(renderer, [{"role": "user", "content": "Hi"}], tokenize=True)
    assert tokenizer.decode(prompt["prompt_token_ids"]) == f"{BOS}{USER}Hi{CHAT}"


def test_conversation(renderer):
    """vLLM echoes its last message's text."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    conversation, _ = render(renderer, messages, tokenize=False)
    assert conversation == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("x-anthropic-billing-header: cch=1;\nYou are", "You are"),
        ("x-anthropic-billing-header: cch=1;", ""),
        (
            [{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": "You are"}],
            "You are",
        ),
        ("You are\nx-anthropic-billing-header: 1", "You are\nx-anthropic-billing-header: 1"),
    ],
)
def test_billing_line_is_dropped(renderer, content, expected):
    messages = [{"role": "system", "content": content}, {"role": "user", "content": content}]
    before = copy.deepcopy(messages)
    _, prompt = render(renderer, messages, tokenize=False)
    assert prompt["prompt"].startswith(
        f"{BOS}{expected}{USER}x-an" if "You are\nx" not in expected else f"{BOS}You"
    )
    assert messages == before


def test_arguments_are_parsed_once(renderer, monkeypatch):
    """They are the costly part of a history: parsed again for the conversation, rendering took twice as long."""
    parsed, loads = [], json.loads
    monkeypatch.setattr(messages_module.json, "loads", lambda text: parsed.append(text) or loads(text))
    history = [user("u"), assistant(tool_calls=[call("a", "f", '{"x": 1}')]), result("a", "1")]
    render_once = ChatParams(chat_template_kwargs={"tokenize": False})
    conversation, _ = renderer.render_messages(history, render_once)
    assert parsed == ['{"x": 1}']
    assert [message["content"] for message in conversation] == ["u", "", "1"]


class TestServer:
    """Requests as vLLM's server renders them."""

    @pytest.fixture
    def serve(self, renderer, monkeypatch):
        def serve(chat_request, **defaults):
            online = OnlineRenderer(
                renderer.model_config,
                renderer,
                request_logger=None,
                chat_template=None,
                chat_template_content_format="auto",
                default_chat_template_kwargs=defaults,
            )
            _, (engine_input,) = asyncio.run(
                online.preprocess_chat(
                    chat_request,
                    chat_request.messages,
                    default_template=None,
                    default_template_content_format="auto",
                    default_template_kwargs=defaults,
                    tool_dicts=[tool.model_dump() for tool in chat_request.tools] if chat_request.tools else None,
                )
            )
            return renderer.tokenizer.decode(engine_input["prompt_token_ids"])

        return serve

    def test_chat(self, serve):
        assert serve(request(tools=())) == f"{BOS}{USER}Hi{CHAT}"

    def test_thinking(self, serve):
        assert serve(request(tools=(), reasoning_effort="high")) == f"{BOS}{USER}Hi{THINK}"
        assert serve(request(tools=()), thinking=True) == f"{BOS}{USER}Hi{THINK}"
        assert serve(request(tools=(), reasoning_effort="none"), thinking=True) == f"{BOS}{USER}Hi{CHAT}"

    def test_tools_go_after_the_system_text(self, serve):
        """vllm #54911."""
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
        tool = '{"name": "now", "parameters": {"type": "object", "properties": {}, "required": []}}'
        assert serve(request(messages, tools=[NOW])) == f"{BOS}S{TOOLS % tool}{USER}Hi{CHAT}"

    def test_response_format(self, serve):
        schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}, "strict": True}}
        expected = BOS + FORMAT % '{"type": "array"}' + f"{USER}Hi{CHAT}"
        assert serve(request(tools=(), response_format=schema)) == expected
        assert serve(request(tools=(), response_format={"type": "text"})) == f"{BOS}{USER}Hi{CHAT}"

    def test_continued_message(self, serve):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once"}]
        chat_request = request(messages, tools=(), add_generation_prompt=False, continue_final_message=True)
        assert serve(chat_request) == f"{BOS}{USER}Hi{CHAT}Once"

    def test_both_keys_for_reasoning(self, serve):
        for key in ("reasoning", "reasoning_content"):
            messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a", key: "r"}]
            prompt = serve(request(messages, tools=(), add_generation_prompt=False), thinking=True)
            assert prompt == f"{BOS}{USER}Hi{THINK}r</think>a<｜end▁of▁sentence｜>"

    def test_the_request_is_not_modified(self, serve):
        call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": '{"x": 1}'}}
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": "1"},
        ]
        chat_request = request(messages)
        before = chat_request.model_dump()
        serve(chat_request)
        assert chat_request.model_dump() == before

    @pytest.mark.parametrize(
        ("messages", "text"),
        [
            ([{"role": "boss", "content": "Hi"}], "messages[0]: unknown role 'boss'"),
            (
                [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}],
                "messages[0]: content part of type 'image_url': DeepSeek-V3.2 reads text only",
            ),
            (
                [{"role": "user", "content": "Hi"}, {"role": "tool", "tool_call_id": "z", "content": "1"}],
                "messages[1]: answers tool call 'z', but no call waits for a result",
            ),
            (
                [
                    {"role": "user", "content": "Hi"},
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "a", "type": "function", "function": {"name": "now", "arguments": "oops"}}
                        ],
                    },
                ],
                "messages[1]: tool_calls[0].function.arguments is not JSON",
            ),
        ],
        ids=["role", "image", "result", "arguments"],
    )
    def test_an_impossible_history_is_a_client_error(self, serve, messages, text):
        with pytest.raises(VLLMValidationError) as caught:
            serve(request(messages))
        response = create_error_response(caught.value)
        assert (response.error.code, response.error.param) == (400, "messages")
        assert text in response.error.message

    def test_a_prompt_too_long_is_vllms_client_error(self, serve):
        with pytest.raises(VLLMValidationError) as caught:
            serve(request([{"role": "user", "content": "x" * (MAX_LENGTH + 1)}]))
        response = create_error_response(caught.value)
        assert response.error.code == 400
        assert f"{MAX_LENGTH} tokens" in response.error.message
