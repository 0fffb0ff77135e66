"""What the replaying servers say, and what clients must make of it."""

import json
from dataclasses import dataclass, field
from typing import Any


def block(*invokes):
    return "\n\n<｜DSML｜function_calls>\n" + "\n".join(invokes) + "\n</｜DSML｜function_calls>"


def invoke(name, *parameters):
    return f'<｜DSML｜invoke name="{name}">\n' + "\n".join(parameters) + "\n</｜DSML｜invoke>"


def parameter(name, value, string="true"):
    return f'<｜DSML｜parameter name="{name}" string="{string}">{value}</｜DSML｜parameter>'


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_date",
            "description": "Today's date.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city on a day.",
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {"type": "string", "description": "The city"},
                    "date": {"type": "string", "description": "The day, as YYYY-mm-dd"},
                },
                "required": ["location", "date"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "plan_trip",
            "parameters": {
                "type": "object",
                "properties": {
                    "stops": {"type": "array", "items": {"type": "string"}},
                    "days": {"type": "integer"},
                    "by_train": {"type": "boolean"},
                    "note": {"type": "string"},
                },
                "required": ["stops"],
            },
        },
    },
]

DATE = invoke("get_date")


def weather(location, date="2025-12-02"):
    return invoke("get_weather", parameter("location", location), parameter("date", date))


def run_tool(name: str, arguments: dict[str, Any]) -> str:
    """The result of a call of `get_date` or `get_weather`."""
    if name == "get_date":
        assert arguments == {}
        return "2025-12-01"
    assert name == "get_weather"
    assert set(arguments) == {"location", "date"}
    return "Cloudy 7~13°C"


@dataclass
class Answer:
    """What a client gets; the arguments of calls as text, as they came."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish_reason: str | None = None
    ids: list[str] = field(default_factory=list, compare=False)

    def parsed_calls(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


@dataclass
class Case:
    """A user's message, which names it, the model's reply, and the answer to the client."""

    question: str
    reply: str
    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    finish_reason: str = "stop"
    thinking: bool = False
    options: dict[str, Any] = field(default_factory=dict)


HANGZHOU = ("get_weather", {"location": "Hangzhou", "date": "2025-12-02"})
BEIJING = ("get_weather", {"location": "Beijing", "date": "2025-12-02"})
CASES = [
    Case("content", "Grüße, 你好!\n\n- a < b\n", content="Grüße, 你好!\n\n- a < b\n"),
    Case(
        "reasoning and content",
        "Let me see:\n\n1 < 2.</think>It is so.",
        reasoning="Let me see:\n\n1 < 2.",
        content="It is so.",
        thinking=True,
    ),
    Case(
        "reasoning and two calls",
        "Both cities.</think>" + block(weather("Hangzhou"), weather("Beijing")),
        reasoning="Both cities.",
        calls=[HANGZHOU, BEIJING],
        finish_reason="tool_calls",
        thinking=True,
    ),
    Case(
        "reasoning, content and a call",
        "The date first.</think>I look up the date." + block(DATE),
        reasoning="The date first.",
        content="I look up the date.",
        calls=[("get_date", {})],
        finish_reason="tool_calls",
        thinking=True,
    ),
    Case(
        "content and a call",
        "I look it up." + block(weather("Hangzhou")),
        content="I look it up.",
        calls=[HANGZHOU],
        finish_reason="tool_calls",
    ),
    Case("a call only", block(weather("Hangzhou")), calls=[HANGZHOU], finish_reason="tool_calls"),
    Case(
        "arguments of every type",
        block(
            invoke(
                "plan_trip",
                parameter("stops", '["杭州", "Zürich"]', "false"),
                parameter("days", "3", "false"),
                parameter("by_train", "true", "false"),
                parameter("note", 'two "lines"\nand a \\ and 1 < 2 </'),
            )
        ),
        calls=[
            (
                "plan_trip",
                {
                    "stops": ["杭州", "Zürich"],
                    "days": 3,
                    "by_train": True,
                    "note": 'two "lines"\nand a \\ and 1 < 2 </',
                },
            )
        ],
        finish_reason="tool_calls",
    ),
    Case(
        "thoughts that end in a call",
        "The date first." + block(DATE),
        reasoning="The date first.",
        calls=[("get_date", {})],
        finish_reason="tool_calls",
        thinking=True,
    ),
    Case(
        "a call outside a block",
        f"So:\n\n{weather('Hangzhou')}",
        content="So:",
        calls=[HANGZHOU],
        finish_reason="tool_calls",
    ),
    Case(
        "a block that holds no call",
        "As in:\n\n<｜DSML｜function_calls>\nget_date()\n</｜DSML｜function_calls>",
        content="As in:\n\n<｜DSML｜function_calls>\nget_date()\n</｜DSML｜function_calls>",
    ),
    Case(
        "a call of an unknown tool outside a block",
        "Hm.</think>See " + invoke("launch", parameter("x", "1", "false")),
        reasoning="Hm.",
        content="See " + invoke("launch", parameter("x", "1", "false")),
        thinking=True,
    ),
    Case("a tag that does not end", "See <｜DSML｜function_ca", content="See <｜DSML｜function_ca"),
    Case(
        "thoughts that do not end",
        "Round and round and </thin",
        reasoning="Round and round and </thin",
        thinking=True,
    ),
    Case(
        "more than max_tokens",
        "Ten and more tokens.",
        content="Ten and mo",
        finish_reason="length",
        options={"max_tokens": 10},
    ),
]

# The second argument is complete, the call is not.
UNCLOSED = block(weather("Hangzhou")).partition("</｜DSML｜invoke>")[0]
LONG = "All work and no play makes Jack a dull boy. " * 5

# Of recipes/clients.md.
CLIENT_QUESTION = "Which is larger, 9.11 or 9.9?"
CLIENT_REPLY = "0.11 is less than 0.9.</think>9.9 is larger."

# Of recipes/tool_loop.py.
FIRST_QUESTION = "How is the weather in Hangzhou tomorrow?"
SECOND_QUESTION = "And in Beijing?"
FIRST_REPLIES = [
    "I need to know today's date.</think>" + block(DATE),
    "So tomorrow is 2025-12-02.</think>Let me look." + block(weather("Hangzhou")),
    "Cloudy it is.</think>Tomorrow will be cloudy in Hangzhou, 7~13°C.",
]
SECOND_REPLIES = [
    "The date has not changed.</think>" + block(weather("Beijing")),
    "It is the same.</think>Beijing will be cloudy, too.",
]

REPLIES = {case.question: [case.reply] for case in CASES} | {
    "a long text": [LONG],
    "a call that does not end": [UNCLOSED],
    CLIENT_QUESTION: [CLIENT_REPLY],
    FIRST_QUESTION: FIRST_REPLIES,
    SECOND_QUESTION: SECOND_REPLIES,
}
