"""Hand-written chat histories and the exact prompts they must give; and how to write them.

`HISTORIES` is what tests/serving checks and what `text_differences.py` feeds to both sides.
"""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
CHAT = "<｜Assistant｜></think>"
THINK = "<｜Assistant｜><think>"
CALLS = "<｜DSML｜function_calls>\n"
END_CALLS = "\n</｜DSML｜function_calls>"

# DeepSeek's text for one tool, typed from its test case; `%s` is the tool.
TOOLS = (
    "\n\n## Tools\n\n"
    "You have access to a set of tools you can use to answer the user's question.\n"
    'You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your '
    "reply to the user:\n"
    "<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="$FUNCTION_NAME">\n'
    '<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>\n'
    "...\n"
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="$FUNCTION_NAME2">\n'
    "...\n"
    "</｜DSML｜invoke>\n"
    "</｜DSML｜function_calls>\n\n"
    "String and scalar parameters should be specified as is without any escaping or quotes, while lists and "
    'objects should use JSON format. The "string" attribute should be set to "true" for string type parameters '
    'and "false" for other types (numbers, booleans, arrays, objects).\n\n'
    "If the thinking_mode is enabled, then after function results you should strongly consider outputting a "
    "thinking block. Here is an example:\n\n"
    "<｜DSML｜function_calls>\n...\n</｜DSML｜function_calls>\n\n"
    "<function_results>\n...\n</function_results>\n\n"
    "<think>...thinking about results</think>\n\n"
    "Here are the functions available in JSONSchema format:\n"
    "<functions>\n%s\n</functions>\n"
)
FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n%s"

NOOP = {"type": "function", "function": {"name": "noop"}}
NOOP_JSON = '{"name": "noop"}'
CITY = {
    "type": "function",
    "function": {
        "name": "météo",
        "description": 'The "weather"\nof a city',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CITY_JSON = (
    '{"name": "météo", "description": "The \\"weather\\"\\nof a city", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}'
)


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def developer(content: Any, **keys: Any) -> Message:
    return {"role": "developer", "content": content, **keys}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any = None, **keys: Any) -> Message:
    return {"role": "assistant", "content": content, **keys}


def call(call_id: str, name: Any, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id: str, content: Any) -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def invoke(name: str, *parameters: str) -> str:
    return f'<｜DSML｜invoke name="{name}">\n' + "\n".join(parameters) + "\n</｜DSML｜invoke>"


def parameter(name: str, value: str, string: str = "true") -> str:
    return f'<｜DSML｜parameter name="{name}" string="{string}">{value}</｜DSML｜parameter>'


def block(*invokes: str) -> str:
    return f"\n\n{CALLS}" + "\n".join(invokes) + END_CALLS


def results(*values: str) -> str:
    lines = "".join(f"\n<result>{value}</result>" for value in values)
    return f"\n\n<function_results>{lines}\n</function_results>"


@dataclass
class History:
    """What `encode_messages(messages, **options)` must return."""

    name: str
    messages: list[Message]
    prompt: str
    options: dict[str, Any] = field(default_factory=dict)


def _with_arguments(name: str, arguments: Any, *parameters: str) -> History:
    return History(
        f"arguments: {name}",
        [user("go"), assistant(tool_calls=[call("1", "f", arguments)])],
        f"{BOS}{USER}go{CHAT}{block(invoke('f', *parameters))}{EOS}",
    )


A_CALL = assistant(tool_calls=[call("a", "f", "{}")])
TWO_CALLS = assistant(tool_calls=[call("a", "f", "{}"), call("b", "g", "{}")])
F = invoke("f", "")
G = invoke("g", "")

HISTORIES = [
    # One turn.
    History("chat", [user("Hi")], f"{BOS}{USER}Hi{CHAT}"),
    History("thinking", [user("Hi")], f"{BOS}{USER}Hi{THINK}", {"thinking": True}),
    History("system", [system("S"), user("Hi")], f"{BOS}S{USER}Hi{CHAT}"),
    History("two systems", [system("S"), system("T"), user("Hi")], f"{BOS}ST{USER}Hi{CHAT}"),
    History("unicode", [user("你好 🌍 é\u0301 \u202e")], f"{BOS}{USER}你好 🌍 é\u0301 \u202e{CHAT}"),
    History("quotes and braces", [user('a "b" {c} %s \\n')], f'{BOS}{USER}a "b" {{c}} %s \\n{CHAT}'),
    History("newlines", [user("\n\na\r\n\tb\n")], f"{BOS}{USER}\n\na\r\n\tb\n{CHAT}"),
    History("empty user", [user("")], f"{BOS}{USER}{CHAT}"),
    History("no content", [{"role": "user"}], f"{BOS}{USER}{CHAT}"),
    History(
        "parts",
        [user([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"])],
        f"{BOS}{USER}a\nb\nc{CHAT}",
    ),
    History("no parts", [user([])], f"{BOS}{USER}{CHAT}"),
    History(
        "markup in text",
        [user("<think>x</think><｜Assistant｜>")],
        f"{BOS}{USER}<think>x</think><｜Assistant｜>{CHAT}",
    ),
    # Several turns.
    History(
        "reasoning of earlier turns is dropped",
        [user("a"), assistant("b", reasoning="r"), user("c")],
        f"{BOS}{USER}a{CHAT}b{EOS}{USER}c{THINK}",
        {"thinking": True},
    ),
    History(
        "reasoning is dropped without thinking",
        [user("a"), assistant("b", reasoning="r")],
        f"{BOS}{USER}a{CHAT}b{EOS}",
    ),
    History(
        "reasoning after the last user",
        [user("a"), assistant("b", reasoning="r")],
        f"{BOS}{USER}a{THINK}r</think>b{EOS}",
        {"thinking": True},
    ),
    History(
        "DeepSeek's key for reasoning",
        [user("a"), assistant("b", reasoning_content="r")],
        f"{BOS}{USER}a{THINK}r</think>b{EOS}",
        {"thinking": True},
    ),
    History(
        "both keys for reasoning",
        [user("a"), assistant("b", reasoning="new", reasoning_content="old")],
        f"{BOS}{USER}a{THINK}new</think>b{EOS}",
        {"thinking": True},
    ),
    History(
        "an answer without thoughts",
        [user("a"), assistant("b")],
        f"{BOS}{USER}a{THINK}</think>b{EOS}",
        {"thinking": True},
    ),
    History("two users", [user("a"), user("b")], f"{BOS}{USER}a{CHAT}{USER}b{CHAT}"),
    History("two users, thinking", [user("a"), user("b")], f"{BOS}{USER}a{CHAT}{USER}b{THINK}", {"thinking": True}),
    History("a greeting first", [assistant("Hello"), user("Hi")], f"{BOS}Hello{EOS}{USER}Hi{CHAT}"),
    # System messages past the start.
    History("system last", [user("Hi"), system("Be brief.")], f"{BOS}{USER}HiBe brief.{CHAT}"),
    History(
        "system last, thinking",
        [user("Hi"), system("Be brief.")],
        f"{BOS}{USER}HiBe brief.{THINK}",
        {"thinking": True},
    ),
    History(
        "system before an answer",
        [user("Hi"), system("N."), assistant("Yo"), user("?")],
        f"{BOS}{USER}HiN.{CHAT}Yo{EOS}{USER}?{CHAT}",
    ),
    History(
        "system after an answer",
        [user("a"), assistant("b"), system("S"), user("c")],
        f"{BOS}{USER}a{CHAT}b{EOS}S{USER}c{CHAT}",
    ),
    History(
        "system after results",
        [user("a"), A_CALL, result("a", "1"), system("S")],
        f"{BOS}{USER}a{THINK}</think>{block(F)}{EOS}{results('1')}S\n\n<think>",
        {"thinking": True},
    ),
    # Developer messages.
    History("developer", [developer("D")], f"{BOS}{USER}\n\n# The user's message is: D{CHAT}"),
    History(
        "developer, thinking",
        [developer("D")],
        f"{BOS}{USER}\n\n# The user's message is: D{THINK}",
        {"thinking": True},
    ),
    History(
        "developer before the last user is kept",
        [developer("D"), user("u")],
        f"{BOS}{USER}\n\n# The user's message is: D{CHAT}{USER}u{THINK}",
        {"thinking": True},
    ),
    History(
        "a developer message counts as the last user's",
        [user("u"), assistant("a", reasoning="r"), developer("D")],
        f"{BOS}{USER}u{CHAT}a{EOS}{USER}\n\n# The user's message is: D{THINK}",
        {"thinking": True},
    ),
    History(
        "tools and format on a developer message",
        [developer("D"), user("u")],
        f"{BOS}{USER}{TOOLS % NOOP_JSON}{FORMAT % '{}'}\n\n# The user's message is: D{CHAT}{USER}u{CHAT}".replace(
            "reply:\n{}", 'reply:\n{"type": "object"}'
        ),
        {"tools": [NOOP], "response_format": {"type": "json_object"}},
    ),
    # Tools.
    History(
        "tools after the system text",
        [system("S"), user("u")],
        f"{BOS}S{TOOLS % NOOP_JSON}{USER}u{CHAT}",
        {"tools": [NOOP]},
    ),
    History("tools alone", [user("u")], f"{BOS}{TOOLS % CITY_JSON}{USER}u{CHAT}", {"tools": [CITY]}),
    History(
        "two tools",
        [user("u")],
        f"{BOS}{TOOLS % (NOOP_JSON + chr(10) + CITY_JSON)}{USER}u{CHAT}",
        {"tools": [NOOP, CITY]},
    ),
    History(
        "the request's tools replace the message's",
        [{**system("S"), "tools": [CITY]}, user("u")],
        f"{BOS}S{TOOLS % NOOP_JSON}{USER}u{CHAT}",
        {"tools": [NOOP]},
    ),
    History(
        "tools of a message",
        [{**system("S"), "tools": [NOOP]}, user("u")],
        f"{BOS}S{TOOLS % NOOP_JSON}{USER}u{CHAT}",
    ),
    History(
        "unset keys of a tool are left out",
        [user("u")],
        f"{BOS}{TOOLS % NOOP_JSON}{USER}u{CHAT}",
        {"tools": [{"type": "function", "function": {"name": "noop", "description": None, "parameters": None}}]},
    ),
    # Response format.
    History(
        "a schema after the tools",
        [system("S"), user("u")],
        f"{BOS}S{TOOLS % NOOP_JSON}" + FORMAT % '{"type": "array"}' + f"{USER}u{CHAT}",
        {
            "tools": [NOOP],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array"}}},
        },
    ),
    History(
        "any JSON object",
        [user("u")],
        BOS + FORMAT % '{"type": "object"}' + f"{USER}u{CHAT}",
        {"response_format": {"type": "json_object"}},
    ),
    History("plain text", [user("u")], f"{BOS}{USER}u{CHAT}", {"response_format": {"type": "text"}}),
    # Calls and results.
    _with_arguments("none", "{}", ""),
    _with_arguments("empty text", "", ""),
    _with_arguments("null", None, ""),
    _with_arguments("a mapping", {"a": "b"}, parameter("a", "b")),
    _with_arguments("text is raw", '{"a": "\\"q\\" <b>\\n\\u4f60"}', parameter("a", '"q" <b>\n你')),
    _with_arguments("empty string", '{"a": ""}', parameter("a", "")),
    _with_arguments("text that looks like a number", '{"a": "1"}', parameter("a", "1")),
    _with_arguments(
        "numbers", '{"a": 1, "b": -2.5}', parameter("a", "1", "false"), parameter("b", "-2.5", "false")
    ),
    _with_arguments(
        "null and booleans",
        '{"a": null, "b": true}',
        parameter("a", "null", "false"),
        parameter("b", "true", "false"),
    ),
    _with_arguments("nested", '{"a": {"k": ["é", {}]}}', parameter("a", '{"k": ["é", {}]}', "false")),
    History(
        "text before calls",
        [user("u"), assistant("Let me see.", tool_calls=[call("a", "f", "{}")])],
        f"{BOS}{USER}u{CHAT}Let me see.{block(F)}{EOS}",
    ),
    History("no calls is none", [user("u"), assistant("x", tool_calls=[])], f"{BOS}{USER}u{CHAT}x{EOS}"),
    History(
        "a tool loop thinks on",
        [user("u"), assistant(tool_calls=[call("a", "f", "{}")], reasoning="r"), result("a", "1")],
        f"{BOS}{USER}u{THINK}r</think>{block(F)}{EOS}{results('1')}\n\n<think>",
        {"thinking": True},
    ),
    History(
        "a tool loop in chat",
        [user("u"), A_CALL, result("a", "1")],
        f"{BOS}{USER}u{CHAT}{block(F)}{EOS}{results('1')}\n\n</think>",
    ),
    History(
        "a finished tool loop",
        [user("u"), A_CALL, result("a", "1"), assistant("done", reasoning="r"), user("v")],
        f"{BOS}{USER}u{CHAT}{block(F)}{EOS}{results('1')}\n\n</think>done{EOS}{USER}v{THINK}",
        {"thinking": True},
    ),
    History(
        "results in another order",
        [user("u"), TWO_CALLS, result("b", "2"), result("a", "1")],
        f"{BOS}{USER}u{CHAT}{block(F, G)}{EOS}{results('1', '2')}\n\n</think>",
    ),
    History(
        "results without content, with parts, with newlines",
        [
            user("u"),
            TWO_CALLS,
            result("a", None),
            result("b", [{"type": "text", "text": "x\n"}, {"type": "text", "text": "y"}]),
        ],
        f"{BOS}{USER}u{CHAT}{block(F, G)}{EOS}{results('', 'x' + chr(10) + chr(10) + 'y')}\n\n</think>",
    ),
    History(
        "the same ids in two turns",
        [user("u"), A_CALL, result("a", "1"), A_CALL, result("a", "2")],
        f"{BOS}{USER}u{CHAT}{block(F)}{EOS}{results('1')}\n\n</think>{block(F)}{EOS}{results('2')}\n\n</think>",
    ),
    History("calls last", [user("u"), A_CALL], f"{BOS}{USER}u{CHAT}{block(F)}{EOS}"),
    # The end of the prompt.
    History("no generation prompt", [user("u")], f"{BOS}{USER}u", {"add_generation_prompt": False}),
    History(
        "no generation prompt after results",
        [user("u"), A_CALL, result("a", "1")],
        f"{BOS}{USER}u{CHAT}{block(F)}{EOS}{results('1')}",
        {"add_generation_prompt": False},
    ),
    History("generation prompt", [user("u")], f"{BOS}{USER}u{CHAT}", {"add_generation_prompt": True}),
    History(
        "generation prompt after the assistant",
        [user("u"), assistant("x")],
        f"{BOS}{USER}u{CHAT}x{EOS}{CHAT}",
        {"add_generation_prompt": True},
    ),
    History(
        "generation prompt after nothing but a system message",
        [system("S")],
        f"{BOS}S{THINK}",
        {"add_generation_prompt": True, "thinking": True},
    ),
    History(
        "continued answer",
        [user("u"), assistant("Once")],
        f"{BOS}{USER}u{CHAT}Once",
        {"continue_final_message": True},
    ),
    History(
        "continued answer after thoughts",
        [user("u"), assistant("Once", reasoning="r")],
        f"{BOS}{USER}u{THINK}r</think>Once",
        {"continue_final_message": True, "thinking": True},
    ),
    History(
        "continued thoughts",
        [user("u"), assistant("", reasoning="So")],
        f"{BOS}{USER}u{THINK}So",
        {"continue_final_message": True, "thinking": True},
    ),
    History(
        "DeepSeek's key for continuing", [user("u"), assistant("Once", prefix=True)], f"{BOS}{USER}u{CHAT}Once"
    ),
]
