"""Chat histories that have no prompt, and a part of the reason that the client must be told.

`REFUSALS` is what tests/serving checks and what `text_differences.py` feeds to both sides.
"""

from typing import Any

from text_cases.histories import A_CALL, TWO_CALLS, assistant, call, developer, result, system, user

# Messages, options, and a part of the reason.
REFUSALS: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "no messages": ([], {}, "messages is empty"),
    "not an object": (["hi"], {}, "messages[0]: expected an object, got str"),
    "unknown role": ([user("a"), {"role": "boss", "content": "b"}], {}, "messages[1]: unknown role 'boss'"),
    "no role": ([{"content": "b"}], {}, "messages[0]: unknown role None"),
    "image": (
        [user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}])],
        {},
        "messages[0]: content part of type 'image_url': DeepSeek-V3.2 reads text only",
    ),
    "content is a number": ([user(5)], {}, "messages[0]: content must be a string or a list of parts, got int"),
    "text is a number": ([user([{"type": "text", "text": 5}])], {}, "messages[0]: content part 'text' must hold"),
    "empty developer": ([developer("")], {}, "messages[0]: a developer message needs content"),
    "reasoning is a list": ([assistant("a", reasoning=["r"])], {}, "messages[0]: reasoning must be a string"),
    "arguments are not JSON": (
        [user("u"), assistant(tool_calls=[call("a", "f", "{")])],
        {},
        "messages[1]: tool_calls[0].function.arguments is not JSON",
    ),
    "arguments are a list": (
        [user("u"), assistant(tool_calls=[call("a", "f", "[1]")])],
        {},
        "messages[1]: tool_calls[0].function.arguments must be a JSON object, got list",
    ),
    "arguments are too deep": (
        [user("u"), assistant(tool_calls=[call("a", "f", '{"a":' + "[" * 100_000)])],
        {},
        "messages[1]: tool_calls[0].function.arguments is not JSON",
    ),
    "arguments hold half a character": (
        [user("u"), assistant(tool_calls=[call("a", "f", '{"a": "\\ud800"}')])],
        {},
        "messages[1]: holds a lone surrogate",
    ),
    "call without a name": (
        [user("u"), assistant(tool_calls=[call("a", None, "{}")])],
        {},
        "messages[1]: tool_calls[0].function.name must be a string, got None",
    ),
    "call of no function": (
        [user("u"), assistant(tool_calls=[{"id": "a", "type": "custom"}])],
        {},
        "messages[1]: tool_calls[0] is not a call of a function",
    ),
    "one id twice": (
        [user("u"), assistant(tool_calls=[call("a", "f", "{}"), call("a", "g", "{}")])],
        {},
        "messages[1]: tool_calls[1].id 'a' stands twice",
    ),
    "result without an id": (
        [user("u"), A_CALL, {"role": "tool", "content": "1"}],
        {},
        "messages[2]: a tool message needs the tool_call_id it answers, got None",
    ),
    "result of an unknown call": (
        [user("u"), A_CALL, result("z", "1")],
        {},
        "messages[2]: answers tool call 'z', but messages[1] made only 'a'",
    ),
    "result without a call": (
        [user("u"), result("a", "1")],
        {},
        "messages[1]: answers tool call 'a', but no call waits for a result",
    ),
    "result first": ([result("a", "1")], {}, "messages[0]: answers tool call 'a', but no call waits"),
    "result too many": (
        [user("u"), A_CALL, result("a", "1"), result("a", "1")],
        {},
        "messages[3]: answers tool call 'a', but no call waits for a result",
    ),
    "result twice": (
        [user("u"), TWO_CALLS, result("a", "1"), result("a", "1")],
        {},
        "messages[3]: answers tool call 'a' a second time",
    ),
    "results missing before the user": (
        [user("u"), TWO_CALLS, result("a", "1"), user("v")],
        {},
        "messages[1]: tool calls without a result before messages[3], of role 'user': 'b'",
    ),
    "results missing at the end": (
        [user("u"), TWO_CALLS, result("b", "1")],
        {},
        "messages[1]: tool calls without a result before the end: 'a'",
    ),
    "no results at all": (
        [user("u"), A_CALL],
        {"add_generation_prompt": True},
        "messages[1]: tool calls without a result before the end: 'a'",
    ),
    "system between call and result": (
        [user("u"), A_CALL, system("s"), result("a", "1")],
        {},
        "messages[1]: tool calls without a result before messages[2], of role 'system': 'a'",
    ),
    "continued user": (
        [user("u")],
        {"continue_final_message": True},
        "messages[0]: only an assistant message can be continued, got role 'user'",
    ),
    "continued calls": (
        [user("u"), A_CALL],
        {"continue_final_message": True},
        "messages[1]: a message with tool calls is complete",
    ),
    "two endings": (
        [user("u"), assistant("a")],
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message and add_generation_prompt exclude each other",
    ),
    "a tool that is none": ([user("u")], {"tools": [{"name": "f"}]}, "tools[0]: expected"),
    "a message's tool that is none": ([{**system("s"), "tools": [5]}], {}, "messages[0].tools[0]: expected"),
}
