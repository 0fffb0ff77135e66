"""Written replies through a real server, as a client gets them: exact, whole and streamed.

Three servers: a plain one, one that streams every fourth token, one that gains tokens from drafts.
"""

import json
import re
from contextlib import nullcontext

import pytest

from server.chat import ask, client, complete
from server.conftest import serve_replies
from server.process import MODEL, Server
from server.replies import BEIJING, CASES, HANGZHOU, LONG, UNCLOSED, Answer

STREAM_INTERVAL = 4
NUM_DRAFTS = 3
LOOKUP = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
FLAGS = {
    "interval": (
        *("--stream-interval", str(STREAM_INTERVAL)),
        *("--default-chat-template-kwargs", json.dumps({"thinking": True})),
    ),
    "speculation": ("--speculative-config", json.dumps(LOOKUP)),
}


@pytest.fixture(scope="module", params=["plain", "interval", "speculation"])
def any_server(request, tmp_path_factory):
    if request.param == "plain":
        started = nullcontext(request.getfixturevalue("replay_server"))
    else:
        started = serve_replies(tmp_path_factory.mktemp("replay"), *FLAGS[request.param])
    with started as running:
        yield running


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.question)
def test_reply(any_server: Server, case):
    answer = ask(any_server, case.question, thinking=case.thinking, **case.options)
    assert answer.reasoning == case.reasoning
    assert answer.content == case.content
    assert answer.parsed_calls() == case.calls
    assert answer.finish_reason == case.finish_reason


def test_a_call_that_does_not_end(any_server: Server):
    """Whole, it is text. Streamed, it was announced with its first argument and stays unfinished."""
    messages = [{"role": "user", "content": "a call that does not end"}]
    options = {"extra_body": {"chat_template_kwargs": {"thinking": False}}}
    assert complete(any_server, messages, **options) == Answer(content=UNCLOSED, finish_reason="stop")
    name, arguments = HANGZHOU
    calls = [(name, json.dumps(arguments).removesuffix("}"))]
    streamed = complete(any_server, messages, stream=True, **options)
    assert streamed == Answer(calls=calls, finish_reason="tool_calls")


@pytest.mark.parametrize("any_server", ["interval"], indirect=True)
def test_a_stream_interval_bundles_tokens(any_server: Server):
    pieces = streamed_pieces(any_server, "a long text")
    assert "".join(pieces) == LONG
    # A token is a character here. The first one goes out alone; the last bundle may be short.
    assert len(pieces) <= len(LONG) / STREAM_INTERVAL + 2


@pytest.mark.parametrize("any_server", ["interval"], indirect=True)
def test_thinking_by_the_servers_default(any_server: Server):
    thoughts = {"reasoning": "Let me see:\n\n1 < 2.", "content": "It is so.", "finish_reason": "stop"}
    text = {"content": "Let me see:\n\n1 < 2.</think>It is so.", "finish_reason": "stop"}
    question = "reasoning and content"
    assert ask(any_server, question) == Answer(**thoughts)
    assert ask(any_server, question, thinking=True) == Answer(**thoughts)
    assert ask(any_server, question, thinking=False) == Answer(**text)
    assert ask(any_server, question, reasoning_effort="none") == Answer(**text)


@pytest.mark.parametrize("any_server", ["speculation"], indirect=True)
def test_a_step_may_bring_several_tokens(any_server: Server):
    before = num_accepted(any_server)
    pieces = streamed_pieces(any_server, "a long text")
    assert "".join(pieces) == LONG
    after = num_accepted(any_server)
    # The text repeats itself: in most of its steps, each draft was right, up to the last one.
    assert after[NUM_DRAFTS - 1] - before[NUM_DRAFTS - 1] > len(LONG) / (NUM_DRAFTS + 1) / 2


class TestToolChoice:
    """Of the server that decides nothing by itself."""

    def test_none(self, replay_server: Server):
        answer = ask(replay_server, "a call only", tool_choice="none")
        (case,) = (case for case in CASES if case.question == "a call only")
        assert answer == Answer(content=case.reply, finish_reason="stop")

    def test_no_thinking_without_being_asked(self, replay_server: Server):
        answer = ask(replay_server, "reasoning and content")
        assert answer == Answer(content="Let me see:\n\n1 < 2.</think>It is so.", finish_reason="stop")

    def test_required(self, replay_server: Server):
        answer = ask(replay_server, "reasoning and two calls", thinking=True, tool_choice="required")
        assert answer.reasoning == "Both cities."
        assert answer.parsed_calls() == [HANGZHOU, BEIJING]
        assert (answer.content, answer.finish_reason) == ("", "tool_calls")

    def test_required_takes_over_a_call_straight_in_the_thoughts(self, replay_server: Server):
        """The grammar starts where the call is seen for one, with a block of its own."""
        answer = ask(replay_server, "thoughts that end in a call", thinking=True, tool_choice="required")
        assert answer.reasoning == "The date first.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke"
        assert len(answer.parsed_calls()) == 1
        assert (answer.content, answer.finish_reason) == ("", "tool_calls")

    def test_required_holds_a_model_that_wants_to_talk_to_a_call(self, replay_server: Server):
        answer = ask(replay_server, "content", tool_choice="required")
        assert len(answer.parsed_calls()) == 1
        assert (answer.content, answer.finish_reason) == ("", "tool_calls")

    def test_named(self, replay_server: Server):
        """One call, of that tool. vLLM reports "stop" then, as OpenAI does."""
        answer = ask(replay_server, "reasoning and two calls", thinking=True, tool_choice=NAMED)
        assert answer.reasoning == "Both cities."
        assert answer.parsed_calls() == [HANGZHOU]
        assert (answer.content, answer.finish_reason) == ("", "stop")

    def test_named_holds_a_model_that_wants_another_tool_to_this_one(self, replay_server: Server):
        answer = ask(replay_server, "arguments of every type", tool_choice=NAMED)
        assert [name for name, _ in answer.parsed_calls()] == ["get_weather"]

    @pytest.mark.parametrize("choice", ["auto", "required"])
    def test_one_call_at_a_time(self, replay_server: Server, choice):
        answer = ask(
            replay_server,
            "reasoning and two calls",
            thinking=True,
            tool_choice=choice,
            parallel_tool_calls=False,
        )
        assert answer.reasoning == "Both cities."
        assert answer.parsed_calls() == [HANGZHOU]
        assert (answer.content, answer.finish_reason) == ("", "tool_calls")


def streamed_pieces(server: Server, question: str) -> list[str]:
    """The contents of a stream's chunks, less the empty ones."""
    chunks = client(server).chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        stream=True,
        extra_body={"chat_template_kwargs": {"thinking": False}},
    )
    return [piece for chunk in chunks if (piece := chunk.choices[0].delta.content)]


def num_accepted(server: Server) -> list[float]:
    """How many drafts were accepted so far, by their place in the step."""
    pattern = r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{.*position="(\d+)".*\} (\S+)$'
    found = re.findall(pattern, server.get("/metrics")[1], re.MULTILINE)
    return [float(count) for _, count in sorted(found)]
