"""Conversations that call tools, with the calls that are right. No result is made by a real tool."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from small_model.tasks import TOOLS as DATE_AND_WEATHER
from small_model.tasks import tool_loop

__all__ = ["KINDS", "Case", "Round", "Turn", "Wanted"]


@dataclass(frozen=True)
class Wanted:
    """A call that must be made."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """By name: the value, or a pattern for all of a string. Others may be given if the schema takes them."""
    result: str = "done"
    """What the tool gives back."""


Round = list[Wanted]
"""Calls of one message, in any order."""


@dataclass(frozen=True)
class Turn:
    """A question, the rounds of calls that it takes, and what the answer after them must contain."""

    question: str
    rounds: list[Round] = field(default_factory=list)
    answer: str = ""
    """A pattern to be found, whatever the case of its letters."""


@dataclass(frozen=True)
class Case:
    """A conversation."""

    name: str
    tools: list[dict[str, Any]]
    turns: list[Turn]


def _tool(name: str, description: str, required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": required | optional, "required": list(required)}
    parameters["additionalProperties"] = False
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_TEXT = {"type": "string"}
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

_FLIGHTS = _tool(
    "search_flights",
    "Search flights between two airports. Cabin is economy unless the user asks for another.",
    {
        "origin": {"type": "string", "description": "IATA code"},
        "destination": {"type": "string", "description": "IATA code"},
        "date": {"type": "string", "description": "YYYY-mm-dd", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "passengers": {"type": "integer", "minimum": 1},
    },
    cabin={"type": "string", "enum": ["economy", "business", "first"]},
)
_LIGHT = _tool(
    "set_light",
    "Switch the light of a room on or off.",
    {"room": {"type": "string", "enum": ["kitchen", "bedroom", "hall"]}, "on": {"type": "boolean"}},
    brightness={"type": "number", "minimum": 0, "maximum": 1},
)
_ALARM = _tool(
    "set_alarm",
    "Set an alarm that repeats on days of the week.",
    {
        "time": {"type": "string", "description": "HH:MM, 24 hours"},
        "days": {"type": "array", "items": {"type": "string", "enum": list(_DAYS)}},
    },
)
_WRITE = _tool("write_file", "Write a text file, replacing it.", {"path": _TEXT, "content": _TEXT})
_RUN = _tool("run_command", "Run a shell command, exactly as given.", {"command": _TEXT})
_ORDER = _tool(
    "create_order",
    "Create an order of a customer.",
    {
        "customer": {
            "type": "object",
            "properties": {
                "name": _TEXT,
                "address": {
                    "type": "object",
                    "properties": {"street": _TEXT, "city": _TEXT, "postal_code": _TEXT},
                    "required": ["street", "city", "postal_code"],
                },
            },
            "required": ["name", "address"],
        },
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"sku": _TEXT, "quantity": {"type": "integer", "minimum": 1}},
                "required": ["sku", "quantity"],
            },
        },
    },
    gift={"type": "boolean"},
)
_CHART = _tool(
    "draw_chart",
    "Draw a line chart.",
    {
        "series": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "label": _TEXT,
                    "points": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
                },
                "required": ["label", "points"],
            },
        }
    },
    title=_TEXT,
)
_FIND_HOTELS = _tool("find_hotels", "Find hotels in a city.", {"city": _TEXT})
_BOOK_HOTEL = _tool(
    "book_hotel", "Book a hotel by its id.", {"hotel_id": _TEXT, "nights": {"type": "integer", "minimum": 1}}
)
_CANCEL = _tool("cancel_booking", "Cancel a booking by its id.", {"booking_id": _TEXT})
_HOTELS = [_FIND_HOTELS, _BOOK_HOTEL, _CANCEL]
_HOME = [_LIGHT, _ALARM, *DATE_AND_WEATHER]


def _place(city: str) -> re.Pattern[str]:
    """A city, with or without its country."""
    return re.compile(rf"{re.escape(city)}\b.*", re.IGNORECASE)


def _weather(city: str, date: str, result: str) -> Wanted:
    return Wanted("get_weather", {"location": _place(city), "date": date}, result)


def _order(name: str, street: str, city: str, postal_code: str, items: dict[str, int]) -> dict[str, Any]:
    address = {"street": street, "city": city, "postal_code": postal_code}
    return {
        "customer": {"name": name, "address": address},
        "items": [{"sku": sku, "quantity": quantity} for sku, quantity in items.items()],
    }


def _single() -> list[Case]:
    weather = _weather("Oslo", "2025-12-24", "Snowy -6~-2°C")
    flight = {"origin": "FRA", "destination": "NRT", "date": "2026-03-02", "passengers": 2, "cabin": "business"}
    days = list(_DAYS[:5])
    return [
        Case("weather", _HOME, [Turn("What will the weather be in Oslo on 2025-12-24?", [[weather]], "snow")]),
        Case("no arguments", _HOME, [Turn("What is today's date?", [[Wanted("get_date", {}, "2025-12-01")]], "1")]),
        Case(
            "flight",
            [_FLIGHTS, *_HOTELS],
            [
                Turn(
                    "Find business class flights from FRA to NRT on 2026-03-02 for two people.",
                    [[Wanted("search_flights", flight, "LH716, 13:55")]],
                    "LH ?716",
                )
            ],
        ),
        Case(
            "boolean",
            _HOME,
            [Turn("Please turn the kitchen light off.", [[Wanted("set_light", {"room": "kitchen", "on": False})]])],
        ),
        Case(
            "list",
            _HOME,
            [
                Turn(
                    "Wake me at 6:45 in the morning from Monday to Friday.",
                    [[Wanted("set_alarm", {"time": "06:45", "days": days})]],
                )
            ],
        ),
    ]


def _parallel() -> list[Case]:
    cities = {"Berlin": "Cloudy 2~5°C", "Lagos": "Sunny 25~31°C", "Lima": "Foggy 17~22°C"}
    date = "2025-12-02"
    three = [_weather(city, date, result) for city, result in cities.items()]
    rooms = [Wanted("set_light", {"room": room, "on": True}) for room in ("kitchen", "bedroom", "hall")]
    both = [Wanted("set_light", {"room": "hall", "on": False}), _weather("Porto", date, "Rainy 11~15°C")]
    asked = "Make all the calls that you need at once."
    return [
        Case(
            "same tool",
            _HOME,
            [Turn(f"Compare the weather in Berlin, Lagos and Lima on {date}. {asked}", [three], "Lagos")],
        ),
        Case("three rooms", _HOME, [Turn(f"Turn the light on in all three rooms. {asked}", [rooms])]),
        Case(
            "two tools",
            _HOME,
            [Turn(f"Turn the hall light off and tell me the weather in Porto on {date}. {asked}", [both], "rain")],
        ),
    ]


def _nested() -> list[Case]:
    one = _order("Ada Byron", "12 St James's Square", "London", "SW1Y 4LE", {"TEA-500": 2, "CUP-01": 6})
    gift = _order("Jürgen Groß", "Königstraße 5", "Köln", "50667", {"BOOK-77": 1})
    points = [
        {"label": "north", "points": [[0, 1.5], [1, -2]]},
        {"label": "south", "points": [[0, 3], [1, 4.25]]},
    ]
    return [
        Case(
            "order",
            [_ORDER, _WRITE],
            [
                Turn(
                    "Create an order for Ada Byron, 12 St James's Square, London SW1Y 4LE: "
                    "2 of TEA-500, then 6 of CUP-01.",
                    [[Wanted("create_order", one, "order 5512 created")]],
                    "5512",
                )
            ],
        ),
        Case(
            "order as a gift",
            [_ORDER, _WRITE],
            [
                Turn(
                    "Create an order, as a gift, for Jürgen Groß, Königstraße 5, 50667 Köln: one of BOOK-77.",
                    [[Wanted("create_order", gift | {"gift": True}, "order 5513 created")]],
                    "5513",
                )
            ],
        ),
        Case(
            "lists of lists",
            [_CHART, _WRITE],
            [
                Turn(
                    "Draw a chart of two series: first north with the points (0, 1.5) and (1, -2), "
                    "then south with (0, 3) and (1, 4.25).",
                    [[Wanted("draw_chart", {"series": points})]],
                )
            ],
        ),
    ]


_CHARACTERS = {
    "quotes and backslashes": r'She said "C:\new\table" isn\'t a path; \\server\share is.',
    "markup": '<p class="a">1 < 2 && 3 > 2 &amp; ]]></p><!-- </invoke> -->',
    "other scripts": "Größe: 5 µm → 北京、東京、서울, Αθήνα, 🦉👩‍🚀",
    "JSON in a string": '{"a": [1, "two", null], "b": {"c": "\\u00e9\\n"}}',
    "lines": "def f(x):\n    if x > 1:\n        return 'a\\tb'\n\n    return None",
}
"""Texts that a call's argument must hold to the letter."""
_COMMAND = r"""grep -rn --include='*.py' "\$HOME\|%d{2,}" . | awk -F: '{print $1 "\t" $2}' > "a b.txt" 2>&1"""


def _characters() -> list[Case]:
    cases = [
        Case(
            name,
            [_WRITE, _RUN],
            [
                Turn(
                    f"Write exactly the text between the rulers to notes.txt.\n-----\n{text}\n-----",
                    [[Wanted("write_file", {"path": "notes.txt", "content": text})]],
                )
            ],
        )
        for name, text in _CHARACTERS.items()
    ]
    command = (
        r"""grep -rn --include='*.py' "\$HOME\|%d{2,}" . | awk -F: '{print $1 "\t" $2}' > "out file.txt" 2>&1"""
    )
    question = f"Run exactly this command: {command}"
    return [
        *cases,
        Case("shell", [_WRITE, _RUN], [Turn(question, [[Wanted("run_command", {"command": command})]])]),
    ]


def _none() -> list[Case]:
    return [
        Case("sum", _HOME, [Turn("What is 17 + 25? Just the number.", answer="42")]),
        Case("knowledge", [_FLIGHTS, *_HOTELS], [Turn("Whose capital is Nairobi?", answer="Kenya")]),
        Case(
            "translation",
            [_WRITE, _RUN],
            [Turn("What is 'good morning' in German?", answer="Guten Morgen")],
        ),
        Case("small talk", _HOME, [Turn("Thank you, that is all for today.", answer=r"\w")]),
    ]


def _turns() -> list[Case]:
    found = '[{"hotel_id": "h-81", "name": "Fjord Inn"}, {"hotel_id": "h-92", "name": "Hotel Bryggen"}]'
    booked = '{"booking_id": "bk-20417", "status": "confirmed"}'
    hotels = [
        Turn(
            "Which hotels are there in Bergen?",
            [[Wanted("find_hotels", {"city": _place("Bergen")}, found)]],
            "Fjord",
        ),
        Turn(
            "Book Hotel Bryggen for three nights.",
            [[Wanted("book_hotel", {"hotel_id": "h-92", "nights": 3}, booked)]],
            "Bryggen|confirmed|bk-20417|booked",
        ),
        Turn(
            "I changed my mind, cancel that booking.",
            [[Wanted("cancel_booking", {"booking_id": "bk-20417"}, '{"status": "cancelled"}')]],
            "cancel",
        ),
    ]
    tomorrow = [[Wanted("get_date", {}, "2025-12-31")], [_weather("Hangzhou", "2026-01-01", "Cloudy 7~13°C")]]
    again = [[_weather("Beijing", "2026-01-01", "Sunny -4~3°C")]]
    return [
        Case("book and cancel", _HOTELS, hotels),
        Case(
            "next question",
            DATE_AND_WEATHER,
            [
                Turn("How's the weather in Hangzhou tomorrow?", tomorrow, "cloudy"),
                Turn("And in Beijing?", again, "sunny"),
            ],
        ),
    ]


def _loop() -> list[Case]:
    """The small model's task, with names and dates that it was not trained on."""
    source = random.Random("20251201 tool calls")
    cases = []
    for number in range(6):
        question, _, today, weather, sky, _ = tool_loop(source, "test").messages
        arguments = weather["tool_calls"][0]["function"]["arguments"]
        rounds = [
            [Wanted("get_date", {}, today["content"])],
            [_weather(arguments["location"], arguments["date"], sky["content"])],
        ]
        turn = Turn(question["content"], rounds, sky["content"].split()[0])
        cases.append(Case(f"date and weather {number + 1}", DATE_AND_WEATHER, [turn]))
    return cases


KINDS: dict[str, Callable[[], list[Case]]] = {
    "single": _single,
    "parallel": _parallel,
    "nested": _nested,
    "characters": _characters,
    "none": _none,
    "turns": _turns,
    "loop": _loop,
}
"""Cases by what is hard about them; ``none`` wants no call, ``turns`` goes on after results and answers."""
