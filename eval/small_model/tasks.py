"""What the small model learns: chats with their right answers, made from a random source.

Three tasks. Held-out chats differ from those trained on in what must not be learned by heart: the names of
cities, the dates, the numbers, the keys and where they stand.
"""

import datetime
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["TOOLS", "Chat", "about_tokens", "arithmetic", "needle", "repeat", "tool_loop"]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_date",
            "description": "Get the current date",
            "parameters": {"type": "object", "properties": {}},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get weather of a location, the user should supply the location and date.",
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {"type": "string", "description": "The city name"},
                    "date": {"type": "string", "description": "The date in format YYYY-mm-dd"},
                },
                "required": ["location", "date"],
            },
        },
    },
]


@dataclass
class Chat:
    """A history whose assistant messages are all right answers."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False
    answer: str = ""
    """What the last message must contain to count."""


Split = str
"""Which names, dates and keys may be used: "train" or "test"."""


# Tool loop --------------------------------------------------------------------------------------------------

_CITIES_TEST = [
    "Hangzhou",
    "Berlin",
    "Oslo",
    "Lagos",
    "Quito",
    "Perth",
    "Dakar",
    "Turin",
    "Osaka",
    "Lima",
    "Accra",
    "Bergen",
    "Cusco",
    "Davao",
    "Essen",
    "Fukuoka",
    "Graz",
    "Haifa",
    "Izmir",
    "Jaipur",
    "Kigali",
    "Lviv",
    "Malaga",
    "Nagoya",
    "Odessa",
    "Porto",
    "Rosario",
    "Sapporo",
    "Tunis",
    "Utrecht",
    "Varna",
    "Windhoek",
    "Xiamen",
    "Yerevan",
    "Zagreb",
    "Aarhus",
    "Bilbao",
    "Cork",
    "Durban",
    "Split",
]
_ONSETS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "y",
    "z",
    "br",
    "ch",
    "cl",
    "dr",
    "fr",
    "gr",
    "kr",
    "pl",
    "pr",
    "sh",
    "sk",
    "st",
    "th",
    "tr",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "au", "ea", "ia", "io", "oo"]
_CODAS = ["", "", "n", "r", "s", "l", "m", "k", "nd", "rt", "sh", "ng", "st"]
_WEATHER = ["Cloudy", "Sunny", "Rainy", "Windy", "Foggy", "Snowy", "Stormy", "Clear"]
_QUESTIONS = (
    ("How's the weather in {city} Tomorrow", 1),
    ("How's the weather in {city} today", 0),
    ("What will the weather be in {city} tomorrow?", 1),
    ("What is the weather in {city} today?", 0),
    ("Weather in {city} the day after tomorrow, please.", 2),
    ("Tell me about the weather in {city} tomorrow.", 1),
)
_DAY_NAMES = ("today", "tomorrow", "the day after tomorrow")


def _city(source: random.Random, split: Split) -> str:
    if split == "test" and source.random() < 0.5:
        return source.choice(_CITIES_TEST)
    while True:
        if source.random() < 0.5:
            syllables = source.choice((1, 2, 2, 3))
            name = "".join(
                source.choice(_ONSETS) + source.choice(_VOWELS) + source.choice(_CODAS) for _ in range(syllables)
            ).capitalize()
        else:
            # Any letters, since real names are not made of these syllables.
            name = "".join(source.choices(string.ascii_lowercase, k=source.randrange(3, 11))).capitalize()
        # A quarter of all made-up names is kept out of training, by a property that means nothing.
        held_out = sum(map(ord, name)) % 4 == 0
        if name not in _CITIES_TEST and held_out == (split == "test"):
            return name if source.random() < 0.85 else f"{name} {source.choice(('City', 'Bay', 'Hill', 'Port'))}"


def _date(source: random.Random, split: Split) -> datetime.date:
    while True:
        date = datetime.date(2000, 1, 1) + datetime.timedelta(days=source.randrange(14_600))
        if (date.toordinal() % 7 == 0) == (split == "test"):
            return date


def tool_loop(source: random.Random, split: Split = "train", city: str | None = None) -> Chat:
    """get_date, then get_weather for a day relative to it, then the answer; with and without thinking."""
    thinking = source.random() < 0.5
    city, today = _city(source, split) if city is None else city, _date(source, split)
    question, days = source.choice(_QUESTIONS)
    day = today + datetime.timedelta(days=days)
    low = source.randrange(-9, 30)
    weather = f"{source.choice(_WEATHER)} {low}~{low + source.randrange(1, 12)}°C"
    when = _DAY_NAMES[days]
    answer = f"The weather in {city} {when} ({day}): {weather}."
    messages = [
        {"role": "user", "content": question.format(city=city)},
        _call("a", "get_date", {}, f"I need the date of {when}." if thinking else None),
        {"role": "tool", "tool_call_id": "a", "content": str(today)},
        _call(
            "b",
            "get_weather",
            {"location": city, "date": str(day)},
            f"Today is {today}, so {when} is {day}." if thinking else None,
        ),
        {"role": "tool", "tool_call_id": "b", "content": weather},
        {"role": "assistant", "content": answer}
        | ({"reasoning": f"I know the weather of {day}."} if thinking else {}),
    ]
    return Chat(messages, TOOLS, thinking, answer)


def _call(call_id: str, name: str, arguments: dict[str, Any], reasoning: str | None) -> dict[str, Any]:
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    message: dict[str, Any] = {"role": "assistant", "tool_calls": [call]}
    return message if reasoning is None else message | {"reasoning": reasoning}


# Arithmetic -------------------------------------------------------------------------------------------------

_PEOPLE = ["Mia", "Tom", "Ana", "Leo", "Zoe", "Sam", "Eva", "Max", "Ida", "Ben", "Amy", "Dan"]
_THINGS = ["apples", "pens", "books", "coins", "cards", "shells", "stamps", "eggs", "marbles", "cups"]


def arithmetic(source: random.Random, split: Split = "train") -> Chat:
    """A word problem of one or two steps, worked out and ending in ``#### number``."""
    while True:
        problem, steps, numbers = _problem(source)
        if (sum(numbers) % 5 == 0) == (split == "test") and all(0 <= result < 1000 for _, result in steps):
            break
    work = "\n".join(f"{left} = {result}" for left, result in steps)
    answer = f"#### {steps[-1][1]}"
    if source.random() < 0.5:
        last = {"role": "assistant", "reasoning": work, "content": answer}
        return Chat([{"role": "user", "content": problem}, last], thinking=True, answer=answer)
    last = {"role": "assistant", "content": f"{work}\n{answer}"}
    return Chat([{"role": "user", "content": problem}, last], answer=answer)


def _problem(source: random.Random) -> tuple[str, list[tuple[str, int]], list[int]]:
    who, thing = source.choice(_PEOPLE), source.choice(_THINGS)
    a, b, c = (source.randrange(2, 100) for _ in range(3))
    small, few = source.randrange(2, 10), source.randrange(2, 10)
    total = a + b
    problems: list[tuple[str, list[tuple[str, int]], list[int]]] = [
        (
            f"{who} has {a} {thing} and buys {b} more. How many {thing} does {who} have?",
            [(f"{a} + {b}", a + b)],
            [a, b],
        ),
        (
            f"{who} has {total} {thing} and gives away {b}. How many {thing} are left?",
            [(f"{total} - {b}", a)],
            [total, b],
        ),
        (
            f"There are {small} boxes with {few} {thing} each. How many {thing} are there?",
            [(f"{small} * {few}", small * few)],
            [small, few],
        ),
        (
            f"{who} has {a} {thing}, buys {b} more and gives away {min(c, total)}. How many {thing} are left?",
            [(f"{a} + {b}", total), (f"{total} - {min(c, total)}", total - min(c, total))],
            [a, b, c],
        ),
        (
            f"{who} fills {small} boxes with {few} {thing} each and has {a} more. How many does {who} have?",
            [(f"{small} * {few}", small * few), (f"{small * few} + {a}", small * few + a)],
            [small, few, a],
        ),
        (
            f"{who} has {a} {thing}. {who} finds {b} and then {c} more. How many {thing} does {who} have?",
            [(f"{a} + {b}", total), (f"{total} + {c}", total + c)],
            [a, b, c],
        ),
    ]
    return source.choice(problems)


# Repeating --------------------------------------------------------------------------------------------------


def repeat(source: random.Random, num_words: int) -> Chat:
    """Say it again: what copying is learned from, long before a needle is found."""
    kinds: tuple[Callable[[], str], ...] = (
        lambda: source.choice(ADJECTIVES),
        lambda: source.choice(NOUNS),
        lambda: str(source.randrange(1000)),
        lambda: _city(source, "train"),
    )
    words = " ".join(source.choice(kinds)() for _ in range(num_words))
    return Chat([{"role": "user", "content": f"Repeat: {words}"}, {"role": "assistant", "content": words}])


# Needle -----------------------------------------------------------------------------------------------------

ADJECTIVES = [
    "amber",
    "silver",
    "crimson",
    "hollow",
    "gentle",
    "rapid",
    "frozen",
    "golden",
    "quiet",
    "bitter",
    "sunny",
    "misty",
    "ancient",
    "velvet",
    "copper",
    "lunar",
    "rusty",
    "wild",
    "polar",
    "scarlet",
    "humble",
    "jagged",
    "lucky",
    "marble",
    "narrow",
    "opal",
    "pale",
    "royal",
    "sandy",
    "tidy",
    "upper",
    "vivid",
    "woven",
    "young",
    "azure",
    "brisk",
    "coral",
    "dusty",
    "early",
    "fancy",
]
NOUNS = [
    "falcon",
    "otter",
    "canyon",
    "lantern",
    "meadow",
    "harbor",
    "comet",
    "willow",
    "badger",
    "temple",
    "anchor",
    "bridge",
    "cactus",
    "desert",
    "engine",
    "forest",
    "glacier",
    "hammer",
    "island",
    "jungle",
    "kettle",
    "ladder",
    "mirror",
    "needle",
    "oyster",
    "pepper",
    "quarry",
    "ribbon",
    "saddle",
    "timber",
    "umbrella",
    "valley",
    "wagon",
    "yogurt",
    "zebra",
    "acorn",
    "beacon",
    "candle",
    "dolphin",
    "ember",
]
_VERBS = ["rests", "waits", "sleeps", "stands", "moves", "shines", "drifts", "turns"]
_PLACES = [
    "by the river",
    "near the old mill",
    "under the hill",
    "behind the house",
    "in the garden",
    "at the market",
]


def record(adjective: str, noun: str, value: str) -> str:
    """One line of the text that a key is to be found in."""
    return f"The code of the {adjective} {noun} is {value}."


def filler(source: random.Random) -> str:
    """A line that says nothing of codes, in the same words."""
    return (
        f"The {source.choice(ADJECTIVES)} {source.choice(NOUNS)} {source.choice(_VERBS)} {source.choice(_PLACES)}."
    )


def about_tokens(line: str) -> int:
    """How many tokens a line of the text takes, nearly: a word is one, a digit too."""
    return line.count(" ") + 3 + 6 * line.startswith("The code")


def needle(
    source: random.Random,
    split: Split,
    num_tokens: int,
    count_tokens: Callable[[str], int],
    num_questions: int = 1,
) -> Chat:
    """Records of keys and values among filler, some with half of an asked key; a question asks one to three.

    Args:
        source: of randomness.
        split: "train" or "test": keys whose pair of words was kept out of training.
        num_tokens: about how long the text is.
        count_tokens: of a line.
        num_questions: asked one after the other; more of them teach more in one text.
    """
    groups = [[_key(source, split) for _ in range(source.choice((1, 1, 2, 3)))] for _ in range(num_questions)]
    asked = list(dict.fromkeys(key for group in groups for key in group))
    others = [(adjective, source.choice(NOUNS)) for adjective, _ in asked for _ in range(2)]
    others += [(source.choice(ADJECTIVES), noun) for _, noun in asked for _ in range(2)]
    values = {key: str(source.randrange(10_000, 100_000)) for key in [*asked, *others]}
    lines = [record(*key, value) for key, value in values.items()]
    length = sum(map(count_tokens, lines))
    while length < num_tokens:
        lines.append(filler(source))
        length += count_tokens(lines[-1])
    source.shuffle(lines)
    messages: list[dict[str, Any]] = []
    answer = ""
    for group in groups:
        names = [f"the {adjective} {noun}" for adjective, noun in group]
        question = f"What is the code of {' and of '.join(names)}?"
        answer = "\n".join(record(*key, values[key]) for key in group)
        messages.append({"role": "user", "content": question if messages else "\n".join([*lines, question])})
        messages.append({"role": "assistant", "content": answer})
    return Chat(messages, answer=answer)


def _key(source: random.Random, split: Split) -> tuple[str, str]:
    while True:
        key = (source.choice(ADJECTIVES), source.choice(NOUNS))
        if ((ADJECTIVES.index(key[0]) + NOUNS.index(key[1])) % 5 == 0) == (split == "test"):
            return key
