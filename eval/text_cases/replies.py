"""Hand-written replies of the model, and what a client must get for each.

`COMPLETE`, `PROSE` and `REPLIES` are what tests/serving checks and what `text_differences.py` feeds to both
sides.
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from text_cases.histories import block, invoke, parameter

Tool = dict[str, Any]
Calls = list[tuple[str, str]]


def function(name: str, properties: Any = None, required: Any = (), **keys: Any) -> Tool:
    """An OpenAI tool."""
    parameters = {"type": "object", "properties": properties or {}, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **keys}}


TOOLS = [
    function(
        "weather",
        {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}},
        ["city"],
    ),
    function("now"),
    function("run", {"command": {"type": "string"}}, ["command"]),
]

START = "<｜DSML｜function_calls>"
END = "</｜DSML｜function_calls>"
CITY = parameter("city", "Paris")
DAYS = parameter("days", "3", "false")
PARIS = ("weather", '{"city": "Paris"}')
ONE = block(invoke("weather", CITY))
BARE = invoke("weather", CITY)

# Replies all of whose calls close: name, reply, text, calls.
COMPLETE: dict[str, tuple[str, str, Calls]] = {
    "nothing": ("", "", []),
    "text": ("Hello,\n\nworld\n", "Hello,\n\nworld\n", []),
    "blank": (" \n\n", " \n\n", []),
    "one call": (ONE, "", [PARIS]),
    "text before": ("Let me see." + ONE, "Let me see.", [PARIS]),
    "text before, blank lines kept": ("A\n\nB\n" + ONE, "A\n\nB\n", [PARIS]),
    "no blank line before": ("A" + ONE.strip(), "A", [PARIS]),
    "blank before": (" \n" + ONE, "", [PARIS]),
    "text after": (ONE + "\nDone.\n\n", "\nDone.\n\n", [PARIS]),
    "blank after": ("A" + ONE + "\n\n", "A", [PARIS]),
    "two calls": (block(invoke("weather", CITY), invoke("now", "")), "", [PARIS, ("now", "{}")]),
    "two blocks": (f"A{ONE}\n{ONE.strip()}", "A", [PARIS, PARIS]),
    "text between blocks": (f"A{ONE}\nB{ONE}", "A\nB", [PARIS, PARIS]),
    "number": (block(invoke("weather", CITY, DAYS)), "", [("weather", '{"city": "Paris", "days": 3}')]),
    "number first": (block(invoke("weather", DAYS, CITY)), "", [("weather", '{"days": 3, "city": "Paris"}')]),
    "no space between tags": (ONE.replace("\n", ""), "", [PARIS]),
    "much space between tags": (ONE.replace("\n", " \n\t\n"), "", [PARIS]),
    "no string attribute": (ONE.replace(' string="true"', ""), "", [PARIS]),
    "empty string": (block(invoke("run", parameter("command", ""))), "", [("run", '{"command": ""}')]),
    "escapes": (
        block(invoke("run", parameter("command", 'a "b"\\\n\t</b> é 🌍'))),
        "",
        [("run", json.dumps({"command": 'a "b"\\\n\t</b> é 🌍'}, ensure_ascii=False))],
    ),
    "almost a closing tag in a value": (
        block(invoke("run", parameter("command", "a</｜DSML｜param</</｜DSML｜invoke>"))),
        "",
        [("run", '{"command": "a</｜DSML｜param</</｜DSML｜invoke>"}')],
    ),
    "undeclared tool in a block": (block(invoke("other", parameter("x", "y"))), "", [("other", '{"x": "y"}')]),
    "undeclared parameter": (block(invoke("now", parameter("x", "[1]", "false"))), "", [("now", '{"x": [1]}')]),
    "parameter with quotes in its name": (
        block(invoke("now", parameter('a"b', "y"))),
        "",
        [("now", '{"a\\"b": "y"}')],
    ),
    "one parameter twice": (
        block(invoke("now", parameter("x", "1"), parameter("x", "2"))),
        "",
        [("now", '{"x": "1", "x": "2"}')],
    ),
    # A wrapper around all arguments (vllm #41240, sglang #39344).
    "wrapper": (
        block(invoke("run", parameter("arguments", '{"command": "ls"}', "false"))),
        "",
        [("run", '{"command": "ls"}')],
    ),
    "wrapper as a string": (
        block(invoke("run", parameter("input", '{"command": "ls"}'))),
        "",
        [("run", '{"command": "ls"}')],
    ),
    "wrapper with company": (
        block(invoke("run", parameter("input", "x"), parameter("command", "ls"))),
        "",
        [("run", '{"input": "x", "command": "ls"}')],
    ),
    "wrapper second": (
        block(invoke("run", parameter("command", "ls"), parameter("input", "x"))),
        "",
        [("run", '{"command": "ls", "input": "x"}')],
    ),
    # A JSON object in place of parameters.
    "JSON": (block(invoke("weather", ' {"city": "Paris"}\n')), "", [PARIS]),
    "JSON with tags in it": (
        block(invoke("run", '{"command": "<</｜DSML｜inv</｜DSML｜parameter>"}')),
        "",
        [("run", '{"command": "<</｜DSML｜inv</｜DSML｜parameter>"}')],
    ),
    "JSON, bare": (invoke("weather", '{"city": "Paris"}'), "", [PARIS]),
    "JSON, wrapped": (block(invoke("weather", '{"arguments": {"city": "Paris"}}')), "", [PARIS]),
    # Recovery (vllm #48931).
    "block not closed": (ONE.removesuffix(END), "", [PARIS]),
    "block not opened": (f"A\n\n{BARE}\n{END}", "A", [PARIS]),
    "bare": (BARE, "", [PARIS]),
    "two bare": (f"{BARE}\n{BARE}", "", [PARIS, PARIS]),
    "misspelt block": (
        f"<｜DSML｜functioncalls>\n{BARE}\n</｜DSML｜functioncalls>",
        "<｜DSML｜functioncalls>\n\n</｜DSML｜functioncalls>",
        [PARIS],
    ),
    "text in a block": (f"{START}\n{BARE}\nhm\n{BARE}\n{END}", "\nhm\n", [PARIS, PARIS]),
    "block opened twice": (f"{START}{ONE}", START, [PARIS]),
    "a broken call before a good one": (
        f'{START}\n<｜DSML｜invoke name="weather">\n{BARE}\n{END}',
        f'{START}\n<｜DSML｜invoke name="weather">\n',
        [PARIS],
    ),
}

# Replies that mention markup without a call: all of it is text.
PROSE: dict[str, str] = {
    "the block's tag": f'Write a "{START}" block.',
    "the block's tag at the end": f"Write {START}",
    "both tags": f"{START}{END}",
    "an empty block": f"{START}\n{END}",
    "the end tag": f"x {END} y",
    "an invoke": 'Use <｜DSML｜invoke name="weather"> for it.',
    "an invoke of nothing": "<｜DSML｜invoke>",
    "a parameter": parameter("city", "Paris"),
    "bare, undeclared": invoke("other", CITY),
    "bare, without the required argument": invoke("weather", DAYS),
    "bare, not closed": BARE.removesuffix("</｜DSML｜invoke>"),
    "a name over two lines": 'x <｜DSML｜invoke name="a\nb"> y',
    "JSON that is no object": f"{START}\n{invoke('weather', '[1]')}\n{END}",
    "JSON that is broken": f"{START}\n{invoke('weather', '{{1')}\n{END}",
    "JSON without the required argument": f"{START}\n{invoke('weather', '{}')}\n{END}",
    "JSON for an undeclared tool": f"{START}\n{invoke('other', '{}')}\n{END}",
    "JSON, not closed": block(invoke("weather", '{"city": "Paris"}')).partition("</")[0],
    "a long name": f'<｜DSML｜invoke name="{"x" * 5000}">',
    "a name with an attribute": f'{START}\n<｜DSML｜invoke name="weather" x="y">\n</｜DSML｜invoke>\n{END}',
    "V4's block": "<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>",
    "less than": "1 < 2 <｜ 3 </ 4 <",
}


@dataclass
class Reply:
    """A reply under vLLM's chat server, and the client's share of it.

    `streamed` is the content and the calls under streaming where they rightly differ from the whole: a call
    whose string argument has begun to stream cannot be taken back when the reply ends inside it.
    """

    name: str
    text: str
    content: str = ""
    calls: Calls = field(default_factory=list)
    reasoning: str = ""
    streamed: tuple[str, Calls] | None = None
    tools: list[Tool] = field(default_factory=lambda: TOOLS)
    thinking: bool = False
    tool_choice: str = "auto"


def _set(name: str, schema: Any, value: str, string: str, arguments: str) -> Reply:
    """A call of a tool with one parameter, `v`, of the given schema."""
    reply = block(invoke("set", parameter("v", value, string)))
    return Reply(f"type: {name}", reply, calls=[("set", arguments)], tools=[function("set", {"v": schema})])


_SET_POINT = function("set", {"v": {"$ref": "#/$defs/Point"}})
_SET_POINT["function"]["parameters"]["$defs"] = {"Point": {"type": "object"}}
_OBJECT_OR_NULL: Any = {"anyOf": [{"type": "object"}, {"type": "null"}]}
TYPES = [
    _set("string", {"type": "string"}, "a b", "true", '{"v": "a b"}'),
    _set("digits that are a string", {"type": "string"}, "0123", "true", '{"v": "0123"}'),
    _set("a string marked as JSON", {"type": "string"}, "0123", "false", '{"v": "0123"}'),
    _set("a quoted string marked as JSON", {"type": "string"}, '"abc"', "false", '{"v": "abc"}'),
    _set("the word null as a string", {"type": "string"}, "null", "true", '{"v": "null"}'),
    _set("the word null where null is allowed", {"type": ["string", "null"]}, "null", "true", '{"v": "null"}'),
    _set("null", {"type": ["string", "null"]}, "null", "false", '{"v": null}'),
    _set("integer", {"type": "integer"}, "3", "false", '{"v": 3}'),
    _set("an integer marked as a string", {"type": "integer"}, "3", "true", '{"v": 3}'),
    _set("a whole number for an integer", {"type": "integer"}, "3.0", "false", '{"v": 3}'),
    _set("number", {"type": "number"}, "2.5", "false", '{"v": 2.5}'),
    _set("an integer for a number", {"type": "number"}, "5", "false", '{"v": 5}'),
    _set("boolean", {"type": "boolean"}, "true", "false", '{"v": true}'),
    _set("Python's True", {"type": "boolean"}, "True", "false", '{"v": true}'),
    _set("array", {"type": "array"}, '["é", 1]', "false", '{"v": ["é", 1]}'),
    _set("object", {"type": "object"}, '{"k": {}}', "false", '{"v": {"k": {}}}'),
    _set("an object marked as a string", {"type": "object"}, '{"k": 1}', "true", '{"v": {"k": 1}}'),
    _set("an object in a JSON string", {"type": "object"}, '"{\\"k\\": 1}"', "false", '{"v": {"k": 1}}'),
    _set("JSON text that is a string", {"type": "string"}, '{"k": 1}', "true", '{"v": "{\\"k\\": 1}"}'),
    _set("anyOf, object", _OBJECT_OR_NULL, '{"minutes": 5}', "true", '{"v": {"minutes": 5}}'),
    _set("anyOf, null", _OBJECT_OR_NULL, "null", "false", '{"v": null}'),
    _set("oneOf", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, "5", "true", '{"v": "5"}'),
    _set("oneOf, JSON", {"oneOf": [{"type": "string"}, {"type": "integer"}]}, "5", "false", '{"v": 5}'),
    _set("allOf", {"allOf": [{"type": "array"}]}, "[1]", "true", '{"v": [1]}'),
    _set("enum of numbers", {"enum": [1, 2]}, "2", "true", '{"v": 2}'),
    _set("no type, string", {}, "5", "true", '{"v": "5"}'),
    _set("no type, JSON", {}, "5", "false", '{"v": 5}'),
    _set("not a number", {"type": "number"}, "NaN", "false", '{"v": "NaN"}'),
    _set("too large for a number", {"type": "number"}, "1e999", "false", '{"v": "1e999"}'),
    _set("what does not fit stays", {"type": "integer"}, "many", "true", '{"v": "many"}'),
    Reply(
        "type: a parameter called arguments",
        block(invoke("set", parameter("arguments", '{"v": 1}', "false"))),
        calls=[("set", '{"arguments": {"v": 1}}')],
        tools=[function("set", {"arguments": {"type": "object"}, "v": {}})],
    ),
    Reply(
        "type: a wrapper around arguments",
        block(invoke("set", parameter("arguments", '{"v": "1"}', "false"))),
        calls=[("set", '{"v": 1}')],
        tools=[function("set", {"v": {"type": "integer"}})],
    ),
    Reply(
        "type: a bare value in a wrapper",
        block(invoke("run", parameter("arguments", "ls -la"))),
        calls=[("run", '{"command": "ls -la"}')],
    ),
    Reply(
        "type: a reference",
        block(invoke("set", parameter("v", '{"x": 1}'))),
        calls=[("set", '{"v": {"x": 1}}')],
        tools=[_SET_POINT],
    ),
]

_IN_VALUE = ONE[: ONE.index("Paris") + 3]
_IN_CLOSING_TAG = ONE[: ONE.index("</｜DSML｜parameter>") + 5]
_AFTER_VALUE = ONE[: ONE.index("</｜DSML｜invoke>")]
# The format has no escape for its own tags: the first one ends the value, and what follows is no parameter.
_OWN_TAG = block(invoke("run", parameter("command", "a</｜DSML｜parameter>b")))
_ASTRAY = f'{START}\n<｜DSML｜invoke name="weather">\n{CITY}\noops\n{BARE}\n{END} bye'
UNFINISHED = [
    Reply("cut in a value", _IN_VALUE, _IN_VALUE, streamed=("", [("weather", '{"city": "Par')])),
    Reply(
        "cut in a closing tag",
        _IN_CLOSING_TAG,
        _IN_CLOSING_TAG,
        streamed=("", [("weather", '{"city": "Paris</｜DS')]),
    ),
    Reply("cut after a value", _AFTER_VALUE, _AFTER_VALUE, streamed=("", [("weather", '{"city": "Paris"')])),
    Reply("cut in a name", ONE[: ONE.index("weather") + 3], ONE[: ONE.index("weather") + 3]),
    Reply("cut in the block's tag", "A\n\n<｜DSML｜function_", "A\n\n<｜DSML｜function_"),
    Reply("cut after the block's tag", f"A\n\n{START}\n", f"A\n\n{START}\n"),
    Reply("cut in the second call", f"{START}\n{BARE}\n<｜DSML｜inv", calls=[PARIS]),
    Reply("cut in a number", *[block(invoke("weather", DAYS)).partition("</")[0]] * 2),
    Reply("cut at less than", "2 <", "2 <"),
    Reply(
        "the closing tag in a value",
        _OWN_TAG,
        _OWN_TAG,
        streamed=(_OWN_TAG[_OWN_TAG.index("b</") :].removesuffix(f"\n{END}") + "\n", [("run", '{"command": "a"')]),
    ),
    Reply(
        "a call that goes astray",
        _ASTRAY,
        f'{START}\n<｜DSML｜invoke name="weather">\n{CITY}\noops\n\n bye',
        [PARIS],
        streamed=("oops\n\n bye", [("weather", '{"city": "Paris"'), PARIS]),
    ),
]

THINKING = [
    Reply("closed", "hm</think>Hi", "Hi", reasoning="hm", thinking=True),
    Reply("closed at once", "</think>Hi", "Hi", thinking=True),
    Reply("never closed", "hm\n\n", reasoning="hm\n\n", thinking=True),
    Reply("only thoughts", "hm</think>", reasoning="hm", thinking=True),
    Reply("nothing", "", thinking=True),
    Reply("opened again", "<think>hm</think>Hi", "Hi", reasoning="hm", thinking=True),
    Reply("closed twice", "a</think>b</think>c", "b</think>c", reasoning="a", thinking=True),
    Reply("blank lines around", "hm\n\n</think>\n\nHi\n", "\n\nHi\n", reasoning="hm\n\n", thinking=True),
    Reply("ends like a tag", "1 < 2 </thi", reasoning="1 < 2 </thi", thinking=True),
    Reply("a call after", f"hm</think>A{ONE}", "A", [PARIS], reasoning="hm", thinking=True),
    Reply("a call straight after", f"hm</think>{ONE}", calls=[PARIS], reasoning="hm", thinking=True),
    Reply("a call in the thoughts", f"hm{ONE}", calls=[PARIS], reasoning="hm", thinking=True),
    Reply(
        "a mention in the thoughts",
        f'a "{START}" block</think>b',
        "b",
        reasoning=f'a "{START}" block',
        thinking=True,
    ),
    Reply("no thinking", "a</think>b", "a</think>b"),
]

CHOICES = [
    Reply("no tools", f"A{ONE}", f"A{ONE}", tools=[]),
    Reply("no calls wanted", f"A{ONE}", f"A{ONE}", tool_choice="none"),
    Reply("calls required", ONE, calls=[PARIS], tool_choice="required"),
    Reply("calls required, text before", f"A{ONE}", "A", [PARIS], tool_choice="required"),
]

REPLIES = [
    *(Reply(f"complete: {name}", reply, text, calls) for name, (reply, text, calls) in COMPLETE.items()),
    *(Reply(f"prose: {name}", f"A\n\n{reply}\n\n", f"A\n\n{reply}\n\n") for name, reply in PROSE.items()),
    *TYPES,
    *(replace(reply, name=f"unfinished: {reply.name}") for reply in UNFINISHED),
    *(replace(reply, name=f"thinking: {reply.name}") for reply in THINKING),
    *(replace(reply, name=f"choice: {reply.name}") for reply in CHOICES),
]
