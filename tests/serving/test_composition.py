"""The parsers as vLLM composes them: whole and streamed, with every tool choice, thinking and not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.replies import cut
from serving.server import NOW, WEATHER, Answer, Server, request
from text_cases.histories import block, invoke
from text_cases.replies import BARE, CITY, ONE, PARIS, REPLIES, START

FRAGMENTS = ["a", "\n\n", "<", "<think>", "</think>", START, "</｜DSML｜", ONE, BARE, ONE[:60]]
THINKING = {"chat_template_kwargs": {"thinking": True}}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def server(tokenizer):
    return Server(tokenizer)


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: reply.name)
def test_reply(server, reply):
    keys = {"tool_choice": reply.tool_choice} if reply.tools else {}
    chat_request = request(tools=reply.tools, **keys, **(THINKING if reply.thinking else {}))
    content, calls = reply.streamed or (reply.content, reply.calls)
    streamed = Answer(reply.reasoning, content, calls)
    assert server.whole(chat_request, reply.text) == Answer(reply.reasoning, reply.content, reply.calls)
    assert server.stream(chat_request, [reply.text]) == streamed
    assert server.stream(chat_request, reply.text) == streamed
    for seed in range(3):
        assert server.stream(chat_request, cut(reply.text, seed)) == streamed


@pytest.mark.parametrize("choice", ["auto", "required", NAMED], ids=str)
class TestCalls:
    def test_chat(self, server, choice):
        assert server.answer(request(tool_choice=choice), "A" + ONE) == Answer("", "A", [PARIS])

    def test_thinking(self, server, choice):
        reply = "hm</think>A" + ONE
        assert server.answer(request(tool_choice=choice, **THINKING), reply) == Answer("hm", "A", [PARIS])

    def test_a_call_straight_in_the_thinking(self, server, choice):
        assert server.answer(request(tool_choice=choice, **THINKING), "hm" + ONE) == Answer("hm", "", [PARIS])

    def test_several_calls(self, server, choice):
        reply = block(invoke("weather", CITY), invoke("now", ""), invoke("weather", CITY))
        answer = server.answer(request(tool_choice=choice), reply)
        assert answer == Answer("", "", [PARIS, ("now", "{}"), PARIS])
        streamed = server.stream(request(tool_choice=choice), reply)
        assert len({*answer.ids, *streamed.ids}) == 6, "ids are unique"

    def test_no_call(self, server, choice):
        assert server.answer(request(tool_choice=choice), "No.") == Answer("", "No.")


class TestForcedCalls:
    """A call straight in the thinking: vLLM's grammar takes over after its `invoke`, with a block of its own."""

    @pytest.mark.parametrize("choice", ["required", NAMED], ids=str)
    def test_what_the_grammar_breaks_off_is_thought(self, server, choice):
        broken_off = "hm" + ONE[: ONE.index("invoke") + len("invoke")]
        answer = server.answer(request(tool_choice=choice, **THINKING), broken_off + ONE)
        assert answer == Answer(broken_off, "", [PARIS])


class TestNoCalls:
    def test_choice_none_leaves_markup_as_text(self, server):
        assert server.answer(request(tool_choice="none"), "A" + ONE) == Answer("", "A" + ONE)

    def test_choice_none_thinking(self, server):
        reply = "hm</think>A" + ONE
        assert server.answer(request(tool_choice="none", **THINKING), reply) == Answer("hm", "A" + ONE)

    def test_no_tools(self, server):
        assert server.answer(request(tools=()), "A" + ONE) == Answer("", "A" + ONE)

    def test_nothing(self, server):
        assert server.answer(request(), "") == Answer()
        assert server.answer(request(**THINKING), "") == Answer()

    def test_held_text_is_flushed(self, server):
        for end in ("2 <", "<｜DSML｜function_", "a\n\n", "<｜DSML｜function_calls>\n<｜DSML｜inv"):
            assert server.answer(request(), end) == Answer("", end)
            assert server.answer(request(**THINKING), end) == Answer(end, "")
            assert server.answer(request(**THINKING), f"r</think>{end}") == Answer("r", end)


LOOP = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "reasoning": "r</think>",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "sunny"},
]


class TestToolLoop:
    @pytest.mark.parametrize("num_rounds", [1, 2, 3])
    def test_thinking_goes_on_after_results(self, server, num_rounds):
        """sglang #17551: everything after a result was taken for reasoning."""
        loop = request([LOOP[0], *LOOP[1:] * num_rounds], **THINKING)
        assert server.answer(loop, "so</think>Sunny.") == Answer("so", "Sunny.")
        assert server.answer(loop, "so</think>Then" + ONE) == Answer("so", "Then", [PARIS])

    def test_chat(self, server):
        assert server.answer(request(LOOP), "Sunny.") == Answer("", "Sunny.")

    def test_the_next_user_turn(self, server):
        messages = [*LOOP, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "?"}]
        assert server.answer(request(messages, **THINKING), "a</think>b") == Answer("a", "b")
        assert server.answer(request(messages), "b") == Answer("", "b")


class TestThinkingDecision:
    """Prompt and parser never disagree, whichever way thinking was asked for."""

    @pytest.mark.parametrize(
        "defaults", [None, {"thinking": True}, {"enable_thinking": True}, {"thinking": False}], ids=str
    )
    @pytest.mark.parametrize(
        "keys",
        [
            {},
            {"reasoning_effort": "none"},
            {"reasoning_effort": "high"},
            *(
                {"chat_template_kwargs": {key: value}}
                for key in ("thinking", "enable_thinking")
                for value in (True, False)
            ),
            {"chat_template_kwargs": {"thinking": True}, "reasoning_effort": "none"},
        ],
        ids=str,
    )
    def test_agreement(self, tokenizer, keys, defaults):
        server = Server(tokenizer, defaults)
        chat_request = request(**keys)
        thinks = server.prompt(chat_request)[-1] == tokenizer.convert_tokens_to_ids("<think>")
        expected = Answer("a", "b") if thinks else Answer("", "a</think>b")
        assert server.answer(chat_request, "a</think>b") == expected

    def test_the_requests_effort_overrides_the_servers_default(self, tokenizer):
        server = Server(tokenizer, {"thinking": True})
        assert server.answer(request(), "a</think>b") == Answer("a", "b")
        assert server.answer(request(reasoning_effort="none"), "b") == Answer("", "b")


class TestContinuation:
    def continued(self, message, **keys):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", **message}]
        return request(messages, add_generation_prompt=False, continue_final_message=True, **keys)

    def test_answer(self, server):
        assert server.answer(self.continued({"content": "Once"}), " upon") == Answer("", " upon")

    def test_answer_while_thinking(self, server):
        assert server.answer(self.continued({"content": "Once"}, **THINKING), " upon") == Answer("", " upon")

    @pytest.mark.parametrize("content", ["", [], [{"type": "text", "text": ""}]])
    def test_thoughts(self, server, content):
        chat_request = self.continued({"content": content, "reasoning": "So"}, **THINKING)
        assert server.answer(chat_request, " far</think>x") == Answer(" far", "x")

    def test_prefix(self, server):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once", "prefix": True}]
        assert server.answer(request(messages, **THINKING), " upon") == Answer("", " upon")


class TestHiddenReasoning:
    """With include_reasoning off vLLM constrains the reply from its first token, inside the thinking."""

    def test_structured_output_is_content(self, server):
        """vllm #41132: it landed in the reasoning."""
        chat_request = request(
            tools=(), response_format={"type": "json_object"}, include_reasoning=False, **THINKING
        )
        assert server.whole(chat_request, '{"a": 1}').content == '{"a": 1}'
        for pieces in (['{"a": 1}'], '{"a": 1}'):
            assert server.stream(chat_request, pieces) == Answer("", '{"a": 1}')

    def test_a_required_call(self, server):
        chat_request = request(tool_choice="required", include_reasoning=False, **THINKING)
        assert server.whole(chat_request, ONE).calls == [PARIS]
        assert server.stream(chat_request, ONE) == Answer("", "", [PARIS])

    def test_plain_thoughts_stay_hidden(self, server):
        chat_request = request(include_reasoning=False, **THINKING)
        assert server.stream(chat_request, "hm</think>Hi") == Answer("", "Hi")
        assert server.stream(chat_request, "hm") == Answer()

    @pytest.mark.parametrize("keys", [{}, {"parallel_tool_calls": False}], ids=str)
    def test_thoughts_that_a_grammar_admits_stay_hidden(self, server, keys):
        """Calls are held to it, the text around them is free: a reply cut while thinking is thought."""
        strict = WEATHER | {"function": WEATHER["function"] | {"strict": True}}
        chat_request = request(tools=[strict], include_reasoning=False, **keys, **THINKING)
        chat_request = server.parser(chat_request).adjust_request(chat_request)
        assert chat_request.structured_outputs.structural_tag
        assert server.whole(chat_request, "hm").content == ""
        assert server.stream(chat_request, "hm") == Answer()
        assert server.stream(chat_request, "hm</think>Hi") == Answer("", "Hi")


def test_visible_reasoning_with_structured_output(server):
    chat_request = request(tools=(), response_format={"type": "json_object"}, **THINKING)
    assert server.answer(chat_request, 'hm</think>{"a": 1}') == Answer("hm", '{"a": 1}')


def test_a_reply_without_thoughts_has_content(server):
    """vllm-ascend #8042: content was null."""
    assert server.answer(request(), "Hi") == Answer("", "Hi")
    assert server.whole(request(), "Hi").content == "Hi"


def test_usage_counts_the_thoughts(server, tokenizer):
    chat_request = request(**THINKING)
    for reply, expected in [("abc</think>d", 3), ("abc", 3), ("</think>d", 0), ("abc" + ONE, 5)]:
        parser = server.parser(chat_request)
        parser.parse(reply, chat_request, enable_auto_tools=True)
        assert parser.count_reasoning_tokens(tokenizer.encode(reply, add_special_tokens=False)) == expected
    parser = server.parser(request())
    assert parser.count_reasoning_tokens(tokenizer.encode("abc", add_special_tokens=False)) == 0


@pytest.mark.parametrize("tools", [[WEATHER], [NOW, WEATHER]])
def test_vllm_appends_nothing_to_finished_arguments(server, tools):
    chat_request = request(tools=tools)
    assert server.stream(chat_request, [ONE]) == Answer("", "", [PARIS])


@given(
    reply=st.lists(
        st.sampled_from(["a", "\n\n", "<", "<think>", "</think>", START, "</｜DSML｜", ONE, BARE, ONE[:60]])
    ).map("".join),
    keys=st.sampled_from([{}, THINKING, {"tool_choice": "none"}, {"tool_choice": "required", **THINKING}]),
    seed=st.integers(0, 99),
)
def test_chunking_never_matters(tokenizer, reply, keys, seed):
    server, chat_request = Server(tokenizer), request(**keys)
    at_once = server.stream(chat_request, [reply])
    assert server.stream(chat_request, cut(reply, seed)) == at_once
    assert server.stream(chat_request, reply) == at_once
