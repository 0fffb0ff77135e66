import copy
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.tokenizers import deepseek_v32_encoding as vllm_encoding

from text_cases.histories import (
    HISTORIES,
    assistant,
    call,
    result,
    system,
    user,
)
from text_cases.refusals import REFUSALS
from vllm_dsv32.errors import MessageError
from vllm_dsv32.serving.encoding import encode_messages, ends_in_open_thinking

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden():
    case = json.loads((GOLDEN / "test_input.json").read_text(encoding="utf-8"))
    return case["messages"], case["tools"], (GOLDEN / "test_output.txt").read_text(encoding="utf-8").strip()


class TestGolden:
    """DeepSeek's own test case, byte for byte."""

    def test_tools_on_the_system_message(self, golden):
        messages, tools, prompt = golden
        messages[0]["tools"] = tools
        assert encode_messages(messages, thinking=True) == prompt

    def test_tools_of_the_request(self, golden):
        messages, tools, prompt = golden
        assert encode_messages(messages, tools=tools, thinking=True) == prompt

    def test_vllm_key_for_reasoning(self, golden):
        messages, tools, prompt = golden
        for message in messages:
            if "reasoning_content" in message:
                message["reasoning"] = message.pop("reasoning_content")
        assert encode_messages(messages, tools=tools, thinking=True) == prompt

    def test_every_prefix_is_a_prefix(self, golden):
        """Within the last user's turn a prompt only grows, so the prefix cache holds."""
        messages, tools, prompt = golden
        last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
        for end in range(last_user + 1, len(messages) + 1):
            if messages[end - 1]["role"] == "tool" and messages[end % len(messages)]["role"] == "tool":
                continue
            assert prompt.startswith(encode_messages(messages[:end], tools=tools, thinking=True))


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.name)
def test_history(history):
    before = copy.deepcopy((history.messages, history.options))
    assert encode_messages(history.messages, **history.options) == history.prompt
    assert (history.messages, history.options) == before, "the caller's messages were modified"


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.name)
def test_open_thinking_is_predicted_from_the_last_message(history):
    options = {k: v for k, v in history.options.items() if k not in ("tools", "response_format")}
    predicted = ends_in_open_thinking(history.messages[-1], **({"thinking": False} | options))
    prompt = encode_messages(history.messages, **history.options)
    assert predicted == (prompt.rfind("<think>") > prompt.rfind("</think>"))


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_refusal(refusal):
    messages, options, text = REFUSALS[refusal]
    with pytest.raises(MessageError) as caught:
        encode_messages(messages, **options)
    assert text in str(caught.value)


def _histories():
    text = st.text(max_size=20)
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=5,
    )
    arguments = st.dictionaries(text, values, max_size=3)

    @st.composite
    def turns(draw):
        messages = []
        for turn in range(draw(st.integers(1, 3))):
            if draw(st.booleans()):
                messages.append(system(draw(text)))
            messages.append(user(draw(text)))
            for step in range(draw(st.integers(0, 2))):
                ids = [f"{turn}-{step}-{i}" for i in range(draw(st.integers(1, 3)))]
                calls = [call(i, draw(text.filter(bool)), json.dumps(draw(arguments))) for i in ids]
                messages.append(assistant(draw(text), reasoning=draw(text), tool_calls=calls))
                messages.extend(result(i, draw(text)) for i in ids)
            messages.append(assistant(draw(text), reasoning=draw(text.filter(bool))))
        return messages[: len(messages) - draw(st.integers(0, 1))]

    return turns()


@given(messages=_histories(), thinking=st.booleans())
def test_equal_to_deepseeks_encoder(messages, thinking):
    """vLLM's copy of DeepSeek's encoder is right where no tools are declared."""
    if messages[-1]["role"] == "system":
        messages = messages[:-1]
    prompt = encode_messages(copy.deepcopy(messages), thinking=thinking)
    assert prompt == vllm_encoding.encode_messages(messages, thinking_mode="thinking" if thinking else "chat")


def test_work_is_linear():
    def seconds(num_turns):
        calls = [call(str(i), "f", '{"a": 1}') for i in range(8)]
        turn = [user("u" * 100), assistant("x", tool_calls=calls, reasoning="r")]
        turn += [result(str(i), "1") for i in reversed(range(8))]
        start = time.process_time()
        encode_messages(turn * num_turns, thinking=True)
        return time.process_time() - start

    seconds(10)
    assert min(seconds(800) for _ in range(3)) < 20 * min(seconds(100) for _ in range(3))
