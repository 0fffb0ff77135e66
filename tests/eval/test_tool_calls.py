"""The scoring of tool calls, on replies that are written in the model's format and parsed by the plugin.

tests/eval/test_served_runs.py has the evaluation on a server.
"""

import math
import re
from types import SimpleNamespace as Space

import httpx
import openai
import pytest
from results_file import passed
from serving_runs.chat import Reply, StreamError, collected
from serving_runs.tool_cases import KINDS
from tool_calls import figures_of, is_wanted, play

from vllm_dsv32.serving.dsml import DsmlParser
from vllm_dsv32.serving.encoding import encode_messages
from vllm_dsv32.serving.schema import ToolSchema

CASES = [pytest.param(case, id=f"{kind}-{case.name}") for kind, make in KINDS.items() for case in make()]
EXAMPLES = {"flight": "LH716", "small talk": "Bye", "no arguments": "2025-12-01"}


def right_replies(case):
    """What a model would write that does all right."""
    for turn in case.turns:
        for calls in turn.rounds:
            yield (
                "",
                [(call.name, {name: example(value) for name, value in call.arguments.items()}) for call in calls],
            )
        yield EXAMPLES.get(case.name, turn.answer.partition("|")[0]), []


def example(value):
    """Of a pattern for a city: the city."""
    return re.sub(r"\\(.)", r"\1", value.pattern.partition(r"\b")[0]) if isinstance(value, re.Pattern) else value


def scripted(replies):
    """A model that says this, whatever it is asked; its calls take the way through prompt format and parser."""
    left = iter(replies)

    def reply(history, tools):
        content, calls = next(left)
        message = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = [
                {
                    "id": f"{len(history)}-{number}",
                    "type": "function",
                    "function": {"name": name, "arguments": text},
                }
                for number, (name, text) in enumerate(parsed(calls, tools))
            ]
        return Reply(message, "tool_calls" if calls else "stop", None)

    return reply


def parsed(calls, tools):
    """Names, and arguments as JSON."""
    made = [{"id": str(n), "function": {"name": name, "arguments": args}} for n, (name, args) in enumerate(calls)]
    history = [{"role": "user", "content": ""}, {"role": "assistant", "tool_calls": made}]
    said = encode_messages(history).rpartition("</think>")[2].removesuffix("<｜end▁of▁sentence｜>")
    parser = DsmlParser({tool["function"]["name"]: ToolSchema(tool["function"]["parameters"]) for tool in tools})
    texts = [""] * len(calls)
    for delta in (parser.feed(said), parser.finish()):
        for call in delta.calls:
            texts[call.index] += call.arguments
    return [(name, text) for (name, _), text in zip(calls, texts, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_the_right_calls_are_right(case):
    outcome = play(case, scripted(right_replies(case)))
    assert outcome.complaint == ""
    assert outcome.num_calls == sum(len(calls) for turn in case.turns for calls in turn.rounds)
    assert outcome.num_calls == outcome.num_valid_json == outcome.num_valid


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0].turns[0].rounds])
def test_no_call_where_one_is_wanted_is_wrong(case):
    outcome = play(case, scripted([("Sure, done.", [])]))
    assert outcome.complaint.startswith("expected ")
    assert outcome.complaint.endswith("got no call")


def case_of(kind, name):
    (case,) = [case for case in KINDS[kind]() if case.name == name]
    return case


FLIGHT = {"origin": "FRA", "destination": "NRT", "date": "2026-03-02", "passengers": 2, "cabin": "business"}


@pytest.mark.parametrize(
    ("changed", "num_valid"),
    [
        ({"destination": "HND"}, 1),
        ({"passengers": 3}, 1),
        ({"cabin": "economy"}, 1),
        ({"date": "2 March"}, 0),
        ({"passengers": None}, 0),
        ({"meal": "vegan"}, 0),
    ],
)
def test_wrong_arguments(changed, num_valid):
    case = case_of("single", "flight")
    assert play(case, scripted(right_replies(case))).complaint == ""
    outcome = play(case, scripted([("", [("search_flights", FLIGHT | changed)])]))
    assert outcome.complaint
    assert (outcome.num_calls, outcome.num_valid_json, outcome.num_valid) == (1, 1, num_valid)


def test_a_missing_argument_another_tool_and_a_further_call_are_wrong():
    case = case_of("single", "flight")
    short = {name: value for name, value in FLIGHT.items() if name != "cabin"}
    for calls in (
        [("search_flights", short)],
        [("find_hotels", {"city": "Tokyo"})],
        [("search_flights", FLIGHT), ("find_hotels", {"city": "Tokyo"})],
        [("search_flights", FLIGHT), ("search_flights", FLIGHT)],
    ):
        assert play(case, scripted([("", calls)])).complaint


def test_parallel_calls_may_come_in_any_order_and_get_their_own_results():
    case = case_of("parallel", "same tool")
    replies = list(right_replies(case))
    replies[0] = ("", replies[0][1][::-1])
    seen = []
    answer = scripted(replies)

    def reply(history, tools):
        seen.extend(message["content"] for message in history if message["role"] == "tool")
        return answer(history, tools)

    assert play(case, reply).complaint == ""
    assert seen == ["Foggy 17~22°C", "Sunny 25~31°C", "Cloudy 2~5°C"]


@pytest.mark.parametrize("arguments", ['{"a": ', "[]", '{"origin": NaN}', ""])
def test_arguments_that_are_no_json_object(arguments):
    message = {"tool_calls": [{"id": "1", "function": {"name": "search_flights", "arguments": arguments}}]}
    outcome = play(case_of("single", "flight"), lambda history, tools: Reply(message, "tool_calls", None))
    assert (outcome.num_calls, outcome.num_valid_json, outcome.num_valid) == (1, 0, 0)
    assert "no JSON" in outcome.complaint


def test_a_wrong_finish_reason_answer_and_stream_are_wrong():
    case = case_of("none", "sum")
    assert "finish_reason" in play(case, lambda history, tools: Reply({"content": "42"}, "length", None)).complaint
    assert "42" in play(case, lambda history, tools: Reply({"content": "41"}, "stop", None)).complaint

    def broken(history, tools):
        raise StreamError("the stream ended without a finish reason")

    assert play(case, broken).complaint == "the stream ended without a finish reason"


REQUEST = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions")


@pytest.mark.parametrize(
    "error",
    [
        openai.APITimeoutError(REQUEST),
        openai.InternalServerError("out of order", response=httpx.Response(500, request=REQUEST), body=None),
        httpx.ReadTimeout("in the middle of a stream"),
    ],
)
def test_a_request_that_fails_is_its_conversations_failure(error):
    def failing(history, tools):
        raise error

    outcome = play(case_of("single", "flight"), failing)
    assert outcome.complaint == f"the request failed: {type(error).__name__}: {error}"
    assert figures_of([outcome], 0.9)[0].value == 0


def streamed(*pieces, finish_reason="tool_calls"):
    """Chunks with pieces of calls: index, id, name, arguments."""
    deltas = [[Space(index=i, id=id_, function=Space(name=name, arguments=text))] for i, id_, name, text in pieces]
    choices = [Space(delta=Space(content=None, tool_calls=calls), finish_reason=None) for calls in deltas]
    choices.append(Space(delta=Space(content="", tool_calls=None), finish_reason=finish_reason))
    return [Space(choices=[choice], usage=None) for choice in choices]


def test_a_stream_is_collected():
    chunks = streamed((0, "a", "f", ""), (0, None, None, '{"x":'), (0, None, None, " 1}"), (1, "b", "g", "{}"))
    reply = collected([*chunks, Space(choices=[], usage=Space(prompt_tokens=7))])
    assert reply.calls == [{"name": "f", "arguments": '{"x": 1}'}, {"name": "g", "arguments": "{}"}]
    assert [call["id"] for call in reply.message["tool_calls"]] == ["a", "b"]
    assert (reply.finish_reason, reply.num_prompt_tokens) == ("tool_calls", 7)


@pytest.mark.parametrize(
    ("chunks", "complaint"),
    [
        (streamed((1, "a", "f", "{}")), "a piece of call 1 came before call 0 began"),
        (streamed((0, "a", "f", "{"), (0, "b", None, "}")), "call 0 has the ids a and b"),
        (streamed((0, "a", "f", "{}"), finish_reason=None), "the stream ended without a finish reason"),
    ],
)
def test_a_stream_that_makes_no_message(chunks, complaint):
    with pytest.raises(StreamError, match=complaint):
        collected(chunks)


def test_values():
    assert is_wanted(" a\n", "a")
    assert is_wanted(1.0, 1)
    assert is_wanted({"x": [1, {"y": "z"}], "more": 0}, {"x": [1, {"y": "z"}]})
    for value, wanted in (
        (True, 1),
        (1, True),
        ("1", 1),
        (1, "1"),
        ([1, 2], [2, 1]),
        ([1], [1, 2]),
        ({}, {"x": 1}),
    ):
        assert not is_wanted(value, wanted)
    assert is_wanted("Oslo, Norway", re.compile(r"oslo\b.*", re.IGNORECASE))
    assert not is_wanted("Near Oslo", re.compile(r"oslo\b.*", re.IGNORECASE))


def test_figures_and_their_marks():
    case = case_of("single", "flight")
    right = play(case, scripted(right_replies(case)))
    none = play(case, scripted([("no", [])]))
    figures = figures_of([right] * 9 + [none], 0.9)
    assert [figure.value for figure in figures] == [0.9, 1.0, 1.0]
    assert passed(figures)
    assert not passed(figures_of([right] * 8 + [none] * 2, 0.9))
    without_calls = figures_of([none], 0.0)
    assert math.isnan(without_calls[1].value)
    assert not passed(without_calls)
