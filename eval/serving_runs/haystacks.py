"""Texts in which codes are to be found: prose for any model, records for the small model of this repository.

Made from a random source, so nothing has to be downloaded, and no two texts share more than their introduction,
which is shorter than a block of a prefix cache. Among the codes that are asked for stand others, whose names are
the same by half.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from small_model.tasks import about_tokens, needle

__all__ = ["DEPTH_BANDS", "TEXTS", "Haystack", "Needle", "codes_in", "prose", "records"]

DEPTH_BANDS = 5
"""Equal parts of a text, from its beginning to its end, that needles are put in by turns."""


@dataclass(frozen=True)
class Needle:
    """One code to be found."""

    code: str
    depth: float
    """Where it stands: 0 at the beginning of the prompt, 1 at its end."""

    @property
    def band(self) -> int:
        return min(int(self.depth * DEPTH_BANDS), DEPTH_BANDS - 1)


@dataclass(frozen=True)
class Haystack:
    """A prompt that ends with a question, and what is asked for, in order."""

    prompt: str
    needles: list[Needle]

    @property
    def codes(self) -> list[str]:
        return [needle.code for needle in self.needles]


def codes_in(answer: str) -> list[str]:
    """The numbers of an answer."""
    return re.findall(r"\d+", answer)


# Prose ------------------------------------------------------------------------------------------------------

_FIRST_NAMES = (
    *("Maria", "Tomas", "Ingrid", "Yusuf", "Clara", "Pavel", "Amina", "Henrik"),
    *("Lucia", "Omar", "Freya", "Dmitri", "Nadia", "Hugo", "Leila"),
)
_LAST_NAMES = (
    *("Novak", "Lindgren", "Okafor", "Moreau", "Castillo", "Petrov", "Haddad", "Jensen"),
    *("Romano", "Fischer", "Tanaka", "Walsh"),
)
_PLACES = (
    *("the harbour office", "the old library", "the village school", "the railway station", "the botanical garden"),
    *("the town hall", "the bakery on the corner", "the ferry terminal", "the weather station", "the museum"),
    *("the market square", "the upper reservoir", "the theatre", "the boatyard", "the observatory"),
)
_TIMES = (
    *("Early in the morning", "Later that week", "On a rainy afternoon", "Before the festival", "That winter"),
    *("After lunch", "Toward evening", "A few days later", "Without any warning", "As so often in spring"),
    *("While the others slept", "At the end of the season", "Once the road was open", "During the long meeting"),
)
_DEEDS = (
    *(
        "repaired the wooden gate",
        "counted the empty crates",
        "wrote a long letter home",
        "painted the window frames",
    ),
    *(
        "sorted the photographs",
        "argued about the timetable",
        "carried a ladder across the yard",
        "tuned the piano",
    ),
    *("planted two rows of beans", "looked for a missing umbrella", "read the minutes aloud", "made a pot of soup"),
    *("measured the depth of the well", "borrowed a bicycle", "mended the fishing nets", "watched the swallows"),
)
_REMARKS = (
    *(
        "nobody asked why",
        "the work took longer than planned",
        "the wind had turned by then",
        "it was hardly worth it",
    ),
    *("the neighbours were pleased", "the keys had been left in the door", "everyone agreed to wait"),
    *("the lamps were already lit", "the dog refused to come along", "the price of timber had gone up again"),
    *("the paint was still wet", "there was little else to do", "the newspaper mentioned it in passing"),
)
_INTRODUCTION = (
    "Below is the chronicle of a small town. Somewhere in it are the locker codes of some people. "
    "Read it; there is a question at the end.\n\n"
)
_SENTENCES_A_PARAGRAPH = 6
_NUM_OTHERS = 4
"""Codes that are not asked for, to each that is."""


def prose(source: random.Random, num_words: int, index: int) -> Haystack:
    """A chronicle of about so many words, with one to three codes to be found.

    Args:
        source: of randomness.
        num_words: of the prompt; it is longer where the codes alone take more.
        index: of the text; with it the needles go through the depth bands.
    """
    people = [(first, last) for first in _FIRST_NAMES for last in _LAST_NAMES]
    asked = source.sample(people, source.choice((1, 1, 2, 3)))
    alike = [person for person in people if person not in asked and _is_alike(person, asked)]
    keys = asked + source.sample(alike, min(len(alike), _NUM_OTHERS * len(asked)))
    codes = source.sample(range(100_000, 1_000_000), len(keys))
    said = [_locker(person, str(code)) for person, code in zip(keys, codes, strict=True)]
    question = (
        f"\n\nQuestion: what is the locker code of {', and of '.join(' '.join(person) for person in asked)}? "
        "Answer with the number alone, or with the numbers in the order of the question."
    )
    sentences = []
    length = len(" ".join((_INTRODUCTION, question, *said)).split())
    while length < num_words:
        sentences.append(_sentence(source))
        length += len(sentences[-1].split())
    for number, sentence in enumerate(said):
        band = (index + number) % DEPTH_BANDS if number < len(asked) else source.randrange(DEPTH_BANDS)
        place = int((band + source.random()) / DEPTH_BANDS * len(sentences))
        sentences.insert(place, sentence)
    paragraphs = (
        " ".join(sentences[begin : begin + _SENTENCES_A_PARAGRAPH])
        for begin in range(0, len(sentences), _SENTENCES_A_PARAGRAPH)
    )
    prompt = _INTRODUCTION + "\n".join(paragraphs) + question
    return _haystack(
        prompt, [(str(code), sentence) for code, sentence in zip(codes, said, strict=True)][: len(asked)]
    )


def _is_alike(person: tuple[str, str], asked: list[tuple[str, str]]) -> bool:
    return any(first == person[0] or last == person[1] for first, last in asked)


def _locker(person: tuple[str, str], code: str) -> str:
    return f"The locker code of {' '.join(person)} is {code}."


def _sentence(source: random.Random) -> str:
    who = f"{source.choice(_FIRST_NAMES)} {source.choice(_LAST_NAMES)}"
    deed, place = source.choice(_DEEDS), source.choice(_PLACES)
    when, remark = source.choice(_TIMES), source.choice(_REMARKS)
    return source.choice(
        (
            f"{when}, {who} {deed} near {place}, and {remark}.",
            f"{who} {deed} at {place}; {remark}.",
            f"{when} someone at {place} remembered that {who} once {deed}.",
            f"It was {who} who {deed}, although {remark}.",
            f"Behind {place}, {who} {deed} and {source.choice(_DEEDS)}.",
        )
    )


# Records ----------------------------------------------------------------------------------------------------


def records(source: random.Random, num_tokens: int, index: int) -> Haystack:
    """The small model's own task, of keys that it was not trained on, about so many of its tokens long."""
    chat = needle(source, "test", num_tokens, about_tokens)
    found = [(*codes_in(line), line) for line in chat.answer.splitlines()]
    return _haystack(chat.messages[0]["content"], found)


def _haystack(prompt: str, found: list[tuple[str, str]]) -> Haystack:
    return Haystack(prompt, [Needle(code, prompt.index(sentence) / len(prompt)) for code, sentence in found])


TEXTS: dict[str, Callable[[random.Random, int, int], Haystack]] = {"prose": prose, "records": records}
"""Makers of a text: from a random source, a size in a unit of their own, and the number of the text."""
