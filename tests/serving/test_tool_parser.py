import importlib.util
import json
from types import SimpleNamespace

import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.utils.tool_calls_utils import maybe_filter_parallel_tool_calls
from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.tool_strict_level import ToolStrictLevel
from xgrammar.testing import _is_grammar_accept_string as accepts

from serving.replies import cut
from serving.server import NOW, WEATHER, Parser, Server, request
from text_cases.histories import assistant, block, call, invoke, parameter, user
from text_cases.replies import function
from vllm_dsv32.serving.encoding import encode_messages
from vllm_dsv32.serving.tool_parser import Dsv32ToolParser

CITY = parameter("city", "Paris")
DAYS = parameter("days", "3", "false")
ONE = block(invoke("weather", CITY))
TWO = block(invoke("weather", CITY), invoke("now", ""))
NAMED = {"type": "function", "function": {"name": "weather"}}
THINKING = {"chat_template_kwargs": {"thinking": True}}


@pytest.fixture
def server(tokenizer):
    return Server(tokenizer)


def extract(tokenizer, chat_request, reply):
    found = Dsv32ToolParser(tokenizer, chat_request.tools).extract_tool_calls(reply, chat_request)
    return found.content, [(call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls]


class TestContract:
    def test_is_a_tool_parser_vllm_can_load(self):
        ToolParserManager.register_lazy_module("dsv32_test", "vllm_dsv32.serving.tool_parser", "Dsv32ToolParser")
        try:
            assert ToolParserManager.get_tool_parser("dsv32_test") is Dsv32ToolParser
        finally:
            ToolParserManager.lazy_parsers.pop("dsv32_test", None)
            ToolParserManager.tool_parsers.pop("dsv32_test", None)

    def test_required_and_named_go_through_the_structural_tag(self):
        assert Dsv32ToolParser.structural_tag_model == "deepseek_v3_2"
        assert Dsv32ToolParser.supports_required_and_named is False

    def test_never_by_json_even_without_the_structural_tag(self, monkeypatch):
        monkeypatch.setenv("VLLM_ENFORCE_STRICT_TOOL_CALLING", "0")
        source = importlib.util.find_spec(Dsv32ToolParser.__module__).origin
        spec = importlib.util.spec_from_file_location("tool_parser_without_enforcement", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.Dsv32ToolParser.supports_required_and_named is False

    def test_constructed_without_tools(self, tokenizer):
        chat_request = request(tools=[WEATHER])
        found = Dsv32ToolParser(tokenizer).extract_tool_calls(ONE, chat_request)
        assert found.tools_called
        assert found.content is None

    def test_tags_reach_the_parser(self, tokenizer):
        parser = Dsv32ToolParser(tokenizer)
        assert parser.adjust_request(request()).skip_special_tokens is False
        untouched = request().skip_special_tokens
        assert parser.adjust_request(request(tool_choice="none")).skip_special_tokens == untouched
        assert parser.adjust_request(request(tools=())).skip_special_tokens == untouched

    def test_each_delta_names_its_call(self, tokenizer):
        chat_request = request()
        parser = Dsv32ToolParser(tokenizer, chat_request.tools)
        messages = [
            parser.extract_tool_calls_streaming("", "", piece, [], [], [], chat_request) for piece in cut(TWO, 3)
        ]
        deltas = [delta for message in messages if message for delta in message.tool_calls]
        heads = [delta for delta in deltas if delta.id]
        assert [(head.index, head.type, head.function.name) for head in heads] == [
            (0, "function", "weather"),
            (1, "function", "now"),
        ]
        for delta in deltas:
            assert delta.function.arguments is not None
            if delta not in heads:
                assert delta.model_dump(exclude_unset=True).keys() == {"index", "function"}
        assert parser.get_remaining_unstreamed_args() == ""

    def test_a_message_for_nothing_is_none(self, tokenizer):
        chat_request = request()
        parser = Dsv32ToolParser(tokenizer, chat_request.tools)
        assert parser.extract_tool_calls_streaming("", "", "<", [], [], [], chat_request) is None
        assert parser.finish_streaming().content == "<"
        assert parser.finish_streaming() is None


SCHEDULE = function(
    "schedule",
    {
        "wait": {"anyOf": [{"type": "object"}, {"type": "null"}]},
        "patches": {"allOf": [{"type": "array"}]},
        "name": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
        "point": {"$ref": "#/$defs/Point"},
    },
)
SCHEDULE["function"]["parameters"]["$defs"] = {"Point": {"type": "object"}}


class TestTypes:
    """vllm #43255: what composed schemas allow."""

    @pytest.mark.parametrize("string", ["true", "false"])
    def test_composed(self, tokenizer, string):
        reply = block(
            invoke(
                "schedule",
                parameter("wait", '{"type": "for", "minutes": 2880}', string),
                parameter("patches", '[{"op": "replace"}]', string),
                parameter("point", '{"x": 1}', string),
            )
        )
        wait = {"type": "for", "minutes": 2880}
        arguments = {"wait": wait, "patches": [{"op": "replace"}], "point": {"x": 1}}
        assert extract(tokenizer, request(tools=[SCHEDULE]), reply) == (None, [("schedule", arguments)])

    @pytest.mark.parametrize(("string", "expected"), [("true", "5"), ("false", 5)])
    def test_the_attribute_decides_where_the_schema_does_not(self, tokenizer, string, expected):
        reply = block(invoke("schedule", parameter("name", "5", string)))
        assert extract(tokenizer, request(tools=[SCHEDULE]), reply) == (None, [("schedule", {"name": expected})])


class TestResponsesApi:
    def test_function_tools(self, tokenizer):
        tools = [{"type": "function", "name": "weather", "parameters": WEATHER["function"]["parameters"]}]
        responses_request = ResponsesRequest(input="Hi", tools=tools)
        bare = invoke("weather", CITY, DAYS)
        assert extract(tokenizer, responses_request, bare) == (None, [("weather", {"city": "Paris", "days": 3})])

    def test_custom_tools(self, tokenizer):
        """Their only parameter is called `input`: not a wrapper."""
        responses_request = ResponsesRequest(input="Hi", tools=[{"type": "custom", "name": "patch"}])
        bare = invoke("patch", parameter("input", '{"a": 1}'))
        assert extract(tokenizer, responses_request, bare) == (None, [("patch", {"input": '{"a": 1}'})])

    def test_no_tools(self, tokenizer):
        for responses_request in (ResponsesRequest(input="Hi"), SimpleNamespace(tool_choice="auto", tools=[])):
            assert extract(tokenizer, responses_request, ONE) == (ONE, [])


def grammar_of(tokenizer, chat_request, strict_level=ToolStrictLevel.AUTO):
    """The grammar that vLLM constrains the reply with; None if it is free."""

    class StrictParser(Parser):
        tool_strict_level = strict_level

    parser = StrictParser(tokenizer, chat_request.tools)
    adjusted = parser.adjust_request(chat_request)
    if adjusted.structured_outputs is None:
        return None
    return xgrammar.Grammar.from_structural_tag(adjusted.structured_outputs.structural_tag)


class TestGrammar:
    """What vLLM and xgrammar enforce is the DSML that the encoder writes and the parser reads."""

    STRICT = function("weather", WEATHER["function"]["parameters"]["properties"], ["city"], strict=True)

    def rendered(self, *calls):
        calls = [call(str(i), name, json.dumps(arguments)) for i, (name, arguments) in enumerate(calls)]
        prompt = encode_messages([user("u"), assistant(tool_calls=calls)])
        return prompt.split("</think>")[1].removesuffix("<｜end▁of▁sentence｜>")

    def test_auto_is_free(self, tokenizer):
        assert grammar_of(tokenizer, request(tool_choice="auto")) is None

    def test_none_is_free(self, tokenizer):
        assert grammar_of(tokenizer, request(tool_choice="none")) is None

    @pytest.mark.parametrize("thinking", [{}, THINKING], ids=["chat", "thinking"])
    def test_required(self, tokenizer, thinking):
        """The same under thinking: the grammar starts after the thoughts."""
        grammar = grammar_of(tokenizer, request(tools=[self.STRICT, NOW], tool_choice="required", **thinking))
        assert accepts(grammar, self.rendered(("weather", {"city": "Paris", "days": 3})))
        assert accepts(grammar, self.rendered(("weather", {"city": "Paris"}), ("now", {})))
        assert not accepts(grammar, "No.")
        assert not accepts(grammar, self.rendered(("other", {})))
        assert not accepts(grammar, self.rendered(("weather", {})))
        assert not accepts(grammar, self.rendered(("weather", {"city": "Paris", "days": "3"})))

    def test_named(self, tokenizer):
        grammar = grammar_of(tokenizer, request(tools=[self.STRICT, NOW], tool_choice=NAMED))
        assert accepts(grammar, self.rendered(("weather", {"city": "Paris"})))
        assert not accepts(grammar, self.rendered(("now", {})))
        assert not accepts(grammar, self.rendered(("weather", {"city": "a"}), ("weather", {"city": "b"})))

    def test_tools_that_are_not_strict_take_any_arguments(self, tokenizer):
        grammar = grammar_of(tokenizer, request(tool_choice="required"))
        assert accepts(grammar, self.rendered(("weather", {"days": "many", "x": [1, {"y": None}]})))
        assert accepts(grammar, self.rendered(("now", {})))

    def test_no_parallel_calls(self, tokenizer):
        for choice in ("required", "auto"):
            keys = {"tool_choice": choice, "parallel_tool_calls": False}
            grammar = grammar_of(tokenizer, request(tools=[WEATHER, NOW], **keys))
            assert accepts(grammar, self.rendered(("weather", {"city": "Paris"})))
            assert not accepts(grammar, self.rendered(("weather", {"city": "Paris"}), ("now", {})))

    def test_auto_with_strict_tools(self, tokenizer):
        grammar = grammar_of(tokenizer, request(tools=[self.STRICT], tool_choice="auto"))
        assert accepts(grammar, "Just text.")
        assert accepts(grammar, "Text." + self.rendered(("weather", {"city": "Paris"})))
        assert not accepts(grammar, "Text." + self.rendered(("other", {})))

    def test_a_response_format_with_tools_is_an_alternative(self, tokenizer):
        response_format = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
        chat_request = request(tools=[self.STRICT], tool_choice="auto", response_format=response_format)
        grammar = grammar_of(tokenizer, chat_request)
        assert accepts(grammar, '{"a": 1}')
        assert accepts(grammar, self.rendered(("weather", {"city": "Paris"})))
        assert not accepts(grammar, "Just text.")

    @given(
        city=st.text(st.characters(codec="utf-8", exclude_characters="<\0"), max_size=20),
        days=st.none() | st.integers(-9999, 9999),
    )
    def test_what_is_accepted_is_parsed(self, tokenizer, city, days):
        grammar = grammar_of(tokenizer, request(tools=[self.STRICT], tool_choice="required"))
        arguments = {"city": city} | ({} if days is None else {"days": days})
        reply = self.rendered(("weather", arguments))
        assert accepts(grammar, reply)
        chat_request = request(tools=[self.STRICT], tool_choice="required")
        assert extract(tokenizer, chat_request, reply) == (None, [("weather", arguments)])


def test_vllm_drops_further_calls_where_the_grammar_did_not(server):
    chat_request = request(parallel_tool_calls=False)
    answer = server.whole(chat_request, TWO)
    choice = SimpleNamespace(tool_calls=[SimpleNamespace(index=i) for i in range(len(answer.calls))])
    assert len(maybe_filter_parallel_tool_calls(choice, chat_request).tool_calls) == 1


@given(
    reply=st.text() | st.text('<>/｜DSML｜invoke nameparameterstringtruefunction_calls"=\n'),
    seed=st.integers(0, 99),
)
def test_never_raises(tokenizer, reply, seed):
    server = Server(tokenizer)
    for chat_request in (request(), request(**THINKING), request(tool_choice="none")):
        whole = server.whole(chat_request, reply)
        assert server.stream(chat_request, cut(reply, seed)) == whole
