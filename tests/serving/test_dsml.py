import json
import time

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from serving.replies import TOOLS, Parsed, cut, stream, whole
from text_cases.histories import block, invoke, parameter
from text_cases.replies import BARE, CITY, COMPLETE, DAYS, END, ONE, PARIS, PROSE, START
from vllm_dsv32.serving.dsml import DsmlParser
from vllm_dsv32.serving.encoding import encode_messages
from vllm_dsv32.serving.schema import ToolSchema
from vllm_dsv32.serving.tokens import PARAMETER_END


@pytest.mark.parametrize("name", COMPLETE)
def test_complete(name):
    reply, text, calls = COMPLETE[name]
    assert whole(reply) == Parsed(text, calls)
    assert stream([reply]) == Parsed(text, calls)
    assert stream(reply) == Parsed(text, calls), "character by character"
    for seed in range(10):
        assert stream(cut(reply, seed)) == Parsed(text, calls)
        assert stream(cut(reply, seed, longest=60)) == Parsed(text, calls)


@pytest.mark.parametrize("name", PROSE)
def test_prose(name):
    reply = PROSE[name]
    for around in (reply, f"A\n\n{reply}\n\n"):
        assert whole(around) == stream(around) == stream([around]) == Parsed(around, [])


@pytest.mark.parametrize("reply", [ONE, "A" + ONE, BARE, block(invoke("now", "")), *PROSE.values()])
def test_without_tools_everything_but_blocks_is_text(reply):
    parsed = whole(reply, tools={})
    assert parsed == stream(reply, tools={})
    assert bool(parsed.calls) == (START in reply and reply not in PROSE.values())


class TestStreaming:
    def feed_all(self, *pieces):
        parser = DsmlParser(TOOLS)
        return [parser.feed(piece) for piece in pieces]

    def test_string_arguments_stream_as_they_come(self):
        *_, delta, more = self.feed_all(
            '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="run">\n',
            parameter("command", "ls -l").removesuffix("</｜DSML｜parameter>"),
            " a",
        )
        assert [(call.index, call.name, call.arguments) for call in delta.calls] == [
            (0, "run", '{"command": "ls -l')
        ]
        assert [(call.index, call.name, call.arguments) for call in more.calls] == [(0, None, " a")]

    def test_only_a_possible_closing_tag_is_held_back(self):
        head = '<｜DSML｜function_calls><｜DSML｜invoke name="run"><｜DSML｜parameter name="command" string="true">'
        parser = DsmlParser(TOOLS)
        parser.feed(head)
        sent = [parser.feed(piece).calls for piece in ("a<", "b</｜DS", "c", "</｜DSML｜parameter>")]
        assert [call.arguments for calls in sent for call in calls] == ['{"command": "a', "<b", "</｜DSc", '"']

    def test_text_streams_as_it_comes(self):
        texts = [delta.text for delta in self.feed_all("Hel", "lo <", "b", "\n", "\n", "\n", "x")]
        assert texts == ["Hel", "lo ", "<b", "", "", "\n", "\n\nx"]

    def test_numbers_wait_for_their_end(self):
        parser = DsmlParser(TOOLS)
        parser.feed('<｜DSML｜function_calls><｜DSML｜invoke name="weather">' + CITY)
        assert parser.feed('<｜DSML｜parameter name="days" string="false">1').calls == []
        (call,) = parser.feed("2</｜DSML｜parameter>").calls
        assert call.arguments == ', "days": 12'

    def test_many_calls_in_one_piece(self):
        (delta,) = self.feed_all(block(invoke("weather", CITY), invoke("now", ""), invoke("weather", CITY, DAYS)))
        assert [(call.index, call.name) for call in delta.calls] == [(0, "weather"), (1, "now"), (2, "weather")]

    def test_an_announced_call_that_never_closes_stays_unfinished(self):
        cut_off = ONE[: ONE.index("Paris") + 3]
        assert stream(cut_off) == stream([cut_off]) == Parsed("", [("weather", '{"city": "Par')])
        assert whole(cut_off) == Parsed(cut_off, [])

    def test_a_closing_tag_that_never_comes_is_flushed(self):
        cut_off = ONE[: ONE.index("</｜DSML｜parameter>") + 5]
        assert stream(cut_off) == Parsed("", [("weather", '{"city": "Paris</｜DS')])

    def test_an_announced_call_that_goes_astray(self):
        astray = f'{START}\n<｜DSML｜invoke name="weather">\n{CITY}\noops\n{BARE}\n{END} bye'
        assert (
            stream(astray) == stream([astray]) == Parsed("oops\n\n bye", [("weather", '{"city": "Paris"'), PARIS])
        )
        as_text = f'{START}\n<｜DSML｜invoke name="weather">\n{CITY}\noops\n\n bye'
        assert whole(astray) == Parsed(as_text, [PARIS])


FRAGMENTS = [
    "text ", "\n", "\n\n", " ", "<", "</", "｜DSML｜", "é🌍", '">', '"', "{", "5",
    START, END, START[:9], END[:12],
    '<｜DSML｜invoke name="', '<｜DSML｜invoke name="weather">', '<｜DSML｜invoke name="now">',
    '<｜DSML｜invoke name="other">',
    "</｜DSML｜invoke>", '<｜DSML｜parameter name="', '<｜DSML｜parameter name="city" string="true">',
    '<｜DSML｜parameter name="days" string="false">', '<｜DSML｜parameter name="arguments" string="true">',
    "</｜DSML｜parameter>", "</｜DSML｜parameter", CITY, DAYS, BARE, ONE, '{"city": "é"}', "}",
]  # fmt: skip
SOUP = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)


@given(reply=SOUP, seed=st.integers(0, 1000))
def test_chunking_never_matters(reply, seed):
    at_once = stream([reply])
    assert stream(reply) == at_once
    assert stream(cut(reply, seed)) == at_once


def _count_text(*texts):
    """How often the characters that no markup holds occur."""
    return [sum(text.count(character) for text in texts) for character in "é🌍5"]


@given(reply=SOUP)
def test_no_text_is_lost(reply):
    for parsed in (whole(reply), stream(reply)):
        assert _count_text(reply) == _count_text(parsed.text, *(part for call in parsed.calls for part in call))
    for name, arguments in whole(reply).calls:
        assert name
        assert isinstance(json.loads(arguments), dict)
    if not whole(reply).calls:
        assert whole(reply).text == reply


@given(cities=st.lists(st.text(), max_size=3), text=st.text(), end=st.integers(0, 400))
def test_a_truncated_reply_loses_nothing(cities, text, end):
    reply = text + block(*(invoke("weather", parameter("city", city)) for city in cities)) if cities else text
    cut_off = reply[:end]
    parsed = whole(cut_off)
    if not parsed.calls:
        assert parsed.text == cut_off
    streamed = stream(cut_off)
    assert streamed.calls[: len(parsed.calls)] == parsed.calls
    assert len(streamed.calls) - len(parsed.calls) <= 1
    if len(streamed.calls) == len(parsed.calls):
        assert streamed == parsed


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner | st.text(), max_size=3) | st.dictionaries(st.text(), inner | st.text(), max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.text(st.characters(exclude_characters='"<>\n', exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(
    text=st.text().filter(lambda text: text == text.strip() and "｜DSML｜" not in text),
    calls=st.lists(
        st.tuples(NAMES, st.dictionaries(NAMES, JSON_VALUES | st.text(), max_size=4)), min_size=1, max_size=3
    ),
    seed=st.integers(0, 1000),
)
def test_what_is_rendered_is_parsed_back(text, calls, seed):
    # The format has no escape for the tag that ends a value.
    assume(PARAMETER_END not in json.dumps(calls, ensure_ascii=False))
    message = {
        "role": "assistant",
        "content": text,
        "tool_calls": [
            {"id": str(i), "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for i, (name, arguments) in enumerate(calls)
        ],
    }
    prompt = encode_messages([{"role": "user", "content": ""}, message])
    reply = prompt.split("</think>", 1)[1].removesuffix("<｜end▁of▁sentence｜>")
    parsed = stream(cut(reply, seed))
    assert parsed == whole(reply)
    assert parsed.text == text
    assert [(name, json.loads(arguments)) for name, arguments in parsed.calls] == calls


@pytest.mark.parametrize(
    "head",
    [
        pytest.param("", id="text"),
        pytest.param("<｜DSML｜function_calls>\n", id="blank space in a block"),
        pytest.param(ONE[: ONE.index("Paris")], id="string"),
        pytest.param(block(invoke("weather", DAYS)).partition("3<")[0], id="number"),
        pytest.param(BARE[: BARE.index("Paris")], id="bare"),
        pytest.param(f'{START}<｜DSML｜invoke name="weather">{{', id="JSON"),
    ],
)
@pytest.mark.parametrize("piece", ["word ", "\n", "<", "</｜DSML｜"])
def test_work_per_piece_does_not_grow(head, piece):
    def seconds(num_pieces):
        parser = DsmlParser(TOOLS)
        parser.feed(head)
        start = time.process_time()
        for _ in range(num_pieces):
            parser.feed(piece)
        parser.finish()
        return time.process_time() - start

    seconds(100)
    assert min(seconds(16_000) for _ in range(3)) < 40 * min(seconds(2_000) for _ in range(3))


def test_schema_of_the_named_tool_is_used():
    tools = {
        "a": ToolSchema({"properties": {"x": {"type": "integer"}}}),
        "b": ToolSchema({"properties": {"x": {"type": "string"}}}),
    }
    reply = block(invoke("a", parameter("x", "5", "false")), invoke("b", parameter("x", "5", "false")))
    assert whole(reply, tools).calls == [("a", '{"x": 5}'), ("b", '{"x": "5"}')]


@pytest.mark.parametrize("as_parameter", [True, False])
def test_values_of_any_depth_are_parsed(as_parameter):
    """What can be read may be too deep to be written; such a value stays text, an object is no call's arguments."""
    tools = {"run": ToolSchema({"properties": {"x": {}}})}
    outcomes = set()
    for depth in range(400, 1100):
        value = "[" * depth + "]" * depth
        reply = block(invoke("run", parameter("x", value, "false") if as_parameter else f'{{"x": {value}}}'))
        parsed = whole(reply, tools)
        assert parsed == stream([reply], tools)
        (arguments,) = [arguments for _, arguments in parsed.calls] or [""]
        assert parsed.text == ("" if arguments else reply)
        outcomes.add(arguments.replace(value, "_"))
    assert outcomes == ({'{"x": _}', '{"x": "_"}'} if as_parameter else {'{"x": _}', ""})
