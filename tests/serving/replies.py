"""Replies of the model: how to cut them, and how to put what a parser returns together again."""

import random
from dataclasses import dataclass, field

from text_cases import replies
from vllm_dsv32.serving.dsml import DsmlParser
from vllm_dsv32.serving.schema import ToolSchema

TOOLS = {tool["function"]["name"]: ToolSchema(tool["function"]["parameters"]) for tool in replies.TOOLS}


@dataclass
class Parsed:
    """A reply put together from deltas."""

    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    def add(self, delta):
        self.text += delta.text
        for call in delta.calls:
            if call.name is not None:
                assert call.index == len(self.calls), "calls are announced in order"
                self.calls.append((call.name, ""))
            name, arguments = self.calls[call.index]
            self.calls[call.index] = (name, arguments + call.arguments)


def _parse(pieces, tools, stream_arguments):
    parser = DsmlParser(tools, stream_arguments=stream_arguments)
    parsed = Parsed()
    for piece in pieces:
        parsed.add(parser.feed(piece))
    parsed.add(parser.finish())
    return parsed


def whole(reply, tools=TOOLS):
    """The reply parsed at once, as without streaming."""
    return _parse([reply], tools, stream_arguments=False)


def stream(pieces, tools=TOOLS):
    """The reply parsed in pieces, as with streaming; a str is fed character by character."""
    return _parse(pieces, tools, stream_arguments=True)


def cut(reply, seed, longest=12):
    """The reply in random pieces, empty ones among them."""
    source = random.Random(seed)
    pieces, start = [], 0
    while start < len(reply):
        end = start + source.randint(0, longest)
        pieces.append(reply[start:end])
        start = end
    return pieces
