import math
from types import SimpleNamespace

import pytest
from transformers import TokenizersBackend
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.reasoning.deepseek_v3_reasoning_parser import DeepSeekV3ReasoningParser
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.v1.structured_output import ConstraintBounds, StructuredOutputManager

from serving.replies import cut
from serving.server import MODEL, NOW, Server, request, template_kwargs
from text_cases.histories import HISTORIES, block, invoke
from text_cases.replies import CITY
from vllm_dsv32.errors import ConfigError
from vllm_dsv32.serving.encoding import encode_messages
from vllm_dsv32.serving.reasoning_parser import Dsv32ReasoningParser

BLOCK = block(invoke("weather", CITY))
THINKING = {"chat_template_kwargs": {"thinking": True}}


@pytest.fixture
def encode(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture
def thinking(tokenizer):
    return Dsv32ReasoningParser(tokenizer, **THINKING)


@pytest.fixture
def chatting(tokenizer):
    return Dsv32ReasoningParser(tokenizer)


class TestOverIds:
    @pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.name)
    def test_every_prompt(self, history, tokenizer, encode):
        """The prompt decides, whatever the parser was told and whatever older turns hold."""
        prompt = encode_messages(history.messages, **history.options)
        is_open = prompt.rfind("<think>") > prompt.rfind("</think>")
        has_think_token = "think>" in prompt
        for parser in (Dsv32ReasoningParser(tokenizer), Dsv32ReasoningParser(tokenizer, **THINKING)):
            if has_think_token:
                assert parser.is_reasoning_end(encode(prompt)) is not is_open

    @pytest.mark.parametrize(
        ("reply", "is_end"),
        [
            ("", False),
            ("hm", False),
            ("hm</think>", True),
            ("hm</think>Hi", True),
            ("hm" + BLOCK, True),
            ("a <｜DSML｜function_calls> block", False),
            ("<think>hm", False),
            ("<think>hm</think>x", True),
        ],
    )
    def test_a_reply_alone(self, thinking, chatting, encode, reply, is_end):
        assert thinking.is_reasoning_end(encode(reply)) is is_end
        assert chatting.is_reasoning_end(encode(reply)) is (is_end or "<think>" not in reply)

    @pytest.mark.parametrize("size", [1, 2, 7, 1000])
    def test_as_the_reply_grows(self, thinking, encode, size):
        """A tool loop's prompt shows blocks and closed thoughts of old; only the reply's own count."""
        loop = next(history for history in HISTORIES if history.name == "a tool loop thinks on")
        prompt = encode(encode_messages(loop.messages, tools=[NOW], **loop.options))
        for reply, ends_at in [
            ("hm</think>Hi", "hm</think>"),
            ("hm", None),
            (f"hm{BLOCK}", "hm\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke"),
        ]:
            ids = encode(reply)
            end = len(encode(ends_at)) if ends_at else math.inf
            for start in range(0, len(ids), size):
                delta = ids[start : start + size]
                seen = prompt + ids[: start + size]
                has_ended = thinking.is_reasoning_end_streaming(seen, delta)
                if start + size < end:
                    assert not has_ended
                elif start < end:
                    assert has_ended

    def test_a_block_before_the_thinking_is_old(self, thinking, encode):
        old, reply = encode("<｜DSML｜function_calls>\n<｜DSML｜invoke<think>"), encode("hm")
        assert not thinking.is_reasoning_end_streaming(old + reply, reply)
        assert not thinking.is_reasoning_end(old + reply)

    @pytest.mark.parametrize(
        ("text", "content"),
        [
            ("hm</think>Hi", "Hi"),
            ("hm</think>", ""),
            ("hm", ""),
            (f"hm{BLOCK}", BLOCK.strip()),
            ("<think>a</think>b<think>c</think>d", "d"),
        ],
    )
    def test_content_ids(self, thinking, tokenizer, encode, text, content):
        assert tokenizer.decode(thinking.extract_content_ids(encode(text))) == content

    def test_content_ids_of_a_chat(self, chatting, encode):
        assert chatting.extract_content_ids(encode("Hi")) == encode("Hi")

    @pytest.mark.parametrize(
        ("reply", "count"),
        [
            ("", 0),
            ("abc", 3),
            ("abc</think>d", 3),
            ("<think>abc</think>d", 3),
            ("ab<｜DSML｜c", 5),
            ("abc" + BLOCK, 5),
            (f"abc{BLOCK}</think>d", 5),
        ],
    )
    def test_count(self, thinking, chatting, encode, reply, count):
        assert thinking.count_reasoning_tokens(encode(reply)) == count
        assert chatting.count_reasoning_tokens(encode(reply)) == 0


class TestContract:
    def test_tags(self, thinking, chatting):
        for parser in (thinking, chatting):
            assert (parser.reasoning_start_str, parser.reasoning_end_str) == ("<think>", "</think>")

    def test_special_tokens_reach_the_parser(self, thinking, chatting):
        assert thinking.adjust_request(request()).skip_special_tokens is False
        assert chatting.adjust_request(request()).skip_special_tokens == request().skip_special_tokens

    def test_a_foreign_tokenizer_is_refused(self, tokenizer):
        class Foreign:
            def get_vocab(self):
                return {"a": 0}

        with pytest.raises(ConfigError, match="the tokenizer has no token <think>"):
            Dsv32ReasoningParser(Foreign(), model_config=MODEL)

    def test_streamed_without_a_prompt(self, thinking, chatting):
        def stream(parser, reply):
            messages = [parser.extract_reasoning_streaming("", "", piece, [], [], []) for piece in cut(reply, 0)]
            return [
                "".join(getattr(message, field) or "" for message in messages if message)
                for field in ("reasoning", "content")
            ]

        assert stream(thinking, "hm</think>Hi") == ["hm", "Hi"]
        assert thinking.has_engine_confirmed_reasoning_end()
        assert stream(chatting, "Hi") == ["", "Hi"]


class TestResponsesApi:
    @pytest.mark.parametrize(
        ("item", "reply", "expected"),
        [
            (
                {
                    "type": "reasoning",
                    "id": "r",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "So"}],
                },
                " far</think>x",
                (" far", "x"),
            ),
            ({"role": "assistant", "content": "Once"}, " upon", (None, " upon")),
        ],
        ids=["thoughts", "answer"],
    )
    def test_continuation(self, tokenizer, item, reply, expected):
        """Unstreamed, the parser does not see the prompt."""
        items = [{"role": "user", "content": "Hi"}, item | {"status": "incomplete"}]
        responses_request = ResponsesRequest(input=items, **THINKING)
        parser = Dsv32ReasoningParser(tokenizer, chat_template_kwargs=template_kwargs(responses_request))
        assert parser.extract_reasoning(reply, responses_request) == expected

    def test_hidden_thoughts_stay_hidden(self, tokenizer):
        """There vLLM constrains what follows the thoughts, hidden or not."""
        text = {"format": {"type": "json_object"}}
        responses_request = ResponsesRequest(input="Hi", text=text, include_reasoning=False, **THINKING)
        parser = Dsv32ReasoningParser(tokenizer, **THINKING)
        assert parser.extract_reasoning("hm", responses_request) == ("hm", None)
        assert parser.get_streaming_fallback_content("hm", responses_request) is None


class TestStructuredOutput:
    """vLLM's engine core asks the parser where the grammar starts."""

    @pytest.fixture
    def bounds(self, tokenizer, encode):
        def bounds(chat_request, reply, *, committed=True):
            manager = object.__new__(StructuredOutputManager)
            manager.enable_in_reasoning = False
            manager.reasoner_cls = Dsv32ReasoningParser
            manager.tokenizer = tokenizer
            prompt, ids = Server(tokenizer).prompt(chat_request), encode(reply)
            engine_request = SimpleNamespace(
                prompt_token_ids=prompt,
                all_token_ids=prompt + ids if committed else prompt,
                structured_output_request=SimpleNamespace(
                    reasoning_ended=None,
                    reasoner=None,
                    reasoning_parser_kwargs={"chat_template_kwargs": template_kwargs(chat_request)},
                ),
            )
            return manager._get_constraint_bounds(engine_request, ids, spec_tokens_committed=committed), len(ids)

        return bounds

    def test_chat_is_constrained_from_the_start(self, bounds):
        assert bounds(request(), "Hi") == (ConstraintBounds(0, 0), 2)

    @pytest.mark.parametrize("committed", [True, False])
    def test_thoughts_are_not_constrained(self, bounds, committed):
        found, length = bounds(request(**THINKING), "hm", committed=committed)
        assert found == ConstraintBounds(length + 1, length + 1)

    @pytest.mark.parametrize("committed", [True, False])
    def test_constrained_after_the_thoughts(self, bounds, committed):
        """vllm #41132. Several tokens a step: the bound lies inside the step."""
        found, _ = bounds(request(**THINKING), "hm</think>Hi", committed=committed)
        assert found == ConstraintBounds(3, 3)

    def test_constrained_after_the_thoughts_without_template_kwargs(self, tokenizer, encode):
        """Offline, vLLM constructs the parser without the request's; the prompt still shows the thinking."""
        prompt = Server(tokenizer).prompt(request(**THINKING))
        assert not Dsv32ReasoningParser(tokenizer=tokenizer).is_reasoning_end(prompt)


@pytest.fixture(scope="module")
def other_tokenizer(tokenizer_path):
    """The same vocabulary, not loaded in DeepSeek-V3.2's tokenizer mode."""
    return get_cached_tokenizer(TokenizersBackend.from_pretrained(tokenizer_path))


class TestOtherModels:
    """For any model but DeepSeek-V3.2 the parser is vLLM's own."""

    @pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2", None])
    @pytest.mark.parametrize("kwargs", [{}, {"thinking": True}, {"enable_thinking": True}], ids=str)
    def test_is_vllms(self, other_tokenizer, model_type, kwargs):
        config = model_type and SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type))
        parser = Dsv32ReasoningParser(other_tokenizer, chat_template_kwargs=kwargs, model_config=config)
        theirs = DeepSeekV3ReasoningParser(other_tokenizer, chat_template_kwargs=kwargs, model_config=config)
        assert type(parser) is type(theirs)
        assert type(parser._parser) is type(theirs._parser)
        assert parser._model_config is config
        assert parser.engine_based_streaming is theirs.engine_based_streaming is False
        for reply in ("hm</think>Hi", "hm", "<think>hm</think>Hi", "hm" + BLOCK):
            ids = other_tokenizer.encode(reply, add_special_tokens=False)
            assert parser.extract_reasoning(reply, None) == theirs.extract_reasoning(reply, None)
            assert parser.is_reasoning_end(ids) == theirs.is_reasoning_end(ids)
            assert parser.extract_content_ids(ids) == theirs.extract_content_ids(ids)

    def test_the_models_type_decides_where_the_tokenizer_does_not(self, other_tokenizer):
        assert type(Dsv32ReasoningParser(other_tokenizer, model_config=MODEL)) is Dsv32ReasoningParser
        assert type(Dsv32ReasoningParser(other_tokenizer)) is DeepSeekV3ReasoningParser
