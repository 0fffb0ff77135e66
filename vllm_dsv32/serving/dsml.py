"""An incremental parser of DSML, the markup in which DeepSeek-V3.2 calls tools.

It is fed a reply's text in pieces of any size and returns what each piece settles::

    text<blank line>
    <｜DSML｜function_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

What it returns depends on the characters fed, never on how they were cut. Work per piece is bounded by the
piece and by what is held back, never by the reply so far.

**What is a call.** An invoke inside the block is a call once it closes. An invoke outside a block (a *bare*
one), or one that holds a JSON object in place of parameters, is a call only if moreover its tool is declared
and its required arguments are there. All other text is text, markup included: nothing that is fed is lost,
save the markup of calls and blank space around it.

**Streaming.** With `stream_arguments`, a call inside the block is announced with the first character of its
first string argument, which goes out as it arrives; only a possible closing tag is held back. A call so
announced cannot be taken back: should the reply end or stray before the call closes, its arguments stay
unfinished, as OpenAI's do at the token limit. Without `stream_arguments` the same text stays text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vllm_dsv32.serving import tokens as t
from vllm_dsv32.serving.schema import ToolSchema, parse_json, read_value, to_json

_SPACE: Final = " \t\r\n"
# A name longer than this is none: the text is prose that mentions a tag.
_MAX_NAME: Final = 512
_NAME_END: Final = '">'
_STRING_ATTRIBUTES: Final = {'" string="true': True, '" string="false': False}


@dataclass(slots=True)
class CallDelta:
    """News of one call: its name, when it is announced, and the next piece of its JSON arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Delta:
    """What a piece of the reply settled."""

    text: str = ""
    calls: list[CallDelta] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    """The invoke that is being read."""

    name: str
    schema: ToolSchema
    # Whether it departs from the format, so that its declaration has to vouch for it.
    needs_check: bool
    is_announced: bool = False
    # Arguments read so far, and how many of them went out.
    arguments: list[tuple[str, Any]] = field(default_factory=list)
    num_sent: int = 0
    # The parameter that is being read.
    parameter: str = ""
    is_string: bool | None = None
    is_streamed: bool = False
    # What is held of its value; a streamed value is open instead, from its first character on.
    value: list[str] = field(default_factory=list)
    is_open: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether no argument was read yet."""
        return not self.arguments and not self.num_sent


class DsmlParser:
    """Splits one reply into text and calls. One object for one reply: `feed` it, then `finish` it."""

    def __init__(self, tools: Mapping[str, ToolSchema], *, stream_arguments: bool = True) -> None:
        self._tools = tools
        self._stream_arguments = stream_arguments
        self._state: Callable[[], bool] = self._read_text
        self._buffer = ""
        self._position = 0
        self._delta = Delta()
        self._num_calls = 0
        self._call: _Call | None = None
        # The source of what is being read, in case it turns out to be text.
        self._source: list[str] = []
        self._is_in_block = False
        self._awaits_block_end = False
        self._text = _TextOutput()

    def feed(self, piece: str) -> Delta:
        """Take the next piece of the reply."""
        if self._call is not None and self._call.is_open and not self._buffer and piece and "<" not in piece:
            # Inside a streamed value, where most pieces fall: there can be no tag.
            return Delta(calls=[CallDelta(self._num_calls - 1, arguments=_escape(piece))])
        self._buffer += piece
        while self._state():
            pass
        self._buffer = self._buffer[self._position :]
        self._position = 0
        return self._take_delta()

    def finish(self) -> Delta:
        """Take the end of the reply: whatever was held back is settled now."""
        rest, self._buffer = self._buffer, ""
        call = self._call
        if call is None or not call.is_announced:
            # Between the calls of a block nothing but markup is held back.
            if self._state != self._read_between:
                self._give_up(rest)
        elif self._state == self._read_value:
            self._send_unfinished(call, rest)
        self._call = None
        self._state = self._read_text
        self._text.finish(self._num_calls > 0)
        return self._take_delta()

    def _take_delta(self) -> Delta:
        delta, self._delta = self._delta, Delta()
        delta.text = self._text.take()
        return delta

    # The states. Each consumes what it can and returns whether another state may go on.

    def _read_text(self) -> bool:
        tags = [t.CALLS_START]
        if self._tools:
            tags.append(t.INVOKE_START)
        if self._awaits_block_end:
            tags.append(t.CALLS_END)
        buffer, start = self._buffer, self._position
        at = buffer.find("<", start)
        while at >= 0:
            self._position = at
            tag = self._next_tag(*tags)
            if tag != "":
                self._text.write(buffer[start:at])
                return tag is not None and self._enter(tag)
            at = buffer.find("<", at + 1)
        self._text.write(buffer[start:])
        self._position = len(buffer)
        return False

    def _enter(self, tag: str) -> bool:
        if tag == t.CALLS_END:
            self._awaits_block_end = False
            return True
        self._source = [tag]
        self._is_in_block = tag == t.CALLS_START
        self._state = self._read_block_start if self._is_in_block else self._read_name
        return True

    def _read_block_start(self) -> bool:
        self._skip_space()
        tag = self._next_tag(t.INVOKE_START)
        if tag:
            self._keep(tag)
            self._state = self._read_name
        return self._settled(tag)

    def _read_between(self) -> bool:
        """Between two invokes of a block, or before its end."""
        self._skip_space()
        tag = self._next_tag(t.INVOKE_START, t.CALLS_END)
        if tag == t.INVOKE_START:
            self._keep(tag)
            self._state = self._read_name
        elif tag == t.CALLS_END:
            self._source.clear()
            self._awaits_block_end = False
            self._state = self._read_text
        return self._settled(tag)

    def _read_name(self) -> bool:
        name = self._next_name()
        if name is None:
            return False
        if not name or '"' in name or not (self._is_in_block or name in self._tools):
            self._give_up("")
            return True
        schema = self._tools.get(name) or ToolSchema(None)
        self._call = _Call(name, schema, needs_check=not self._is_in_block)
        self._state = self._read_body
        return True

    def _read_body(self) -> bool:
        """Between two parameters of an invoke, or before its end."""
        self._skip_space()
        tag = self._next_tag(t.PARAMETER_START, t.INVOKE_END)
        if tag:
            self._keep(tag)
        if tag == t.PARAMETER_START:
            self._state = self._read_parameter_name
        elif tag == t.INVOKE_END:
            return self._end_call()
        elif tag == "" and self._may_hold_json():
            self._state = self._read_json
            return True
        return self._settled(tag)

    def _read_json(self) -> bool:
        """An object in place of an invoke's parameters."""
        call = self._current_call()
        chunk, is_complete = self._next_until(t.INVOKE_END)
        call.value.append(chunk)
        if not is_complete:
            return False
        value = parse_json("".join(call.value))
        if not isinstance(value, dict):
            self._give_up("")
            return True
        call.needs_check = True
        call.arguments = list(value.items())
        return self._end_call()

    def _read_parameter_name(self) -> bool:
        name = self._next_name()
        if not name:
            return self._settled(name)
        call = self._current_call()
        call.parameter, call.is_string = name, None
        for attribute, is_string in _STRING_ATTRIBUTES.items():
            if name.endswith(attribute):
                call.parameter, call.is_string = name.removesuffix(attribute), is_string
        types = call.schema.types_of(call.parameter)
        call.is_streamed = (
            self._stream_arguments
            and self._is_in_block
            and call.is_string is True
            and (types is None or "string" in types)
            and not (call.is_empty and call.schema.may_wrap(call.parameter))
        )
        call.value, call.is_open = [], False
        self._state = self._read_value
        return True

    def _read_value(self) -> bool:
        call = self._current_call()
        chunk, is_complete = self._next_until(t.PARAMETER_END)
        if chunk:
            self._take_value(call, chunk)
        if is_complete:
            self._end_parameter(call)
            self._state = self._read_body
        return is_complete

    # What the states share.

    def _current_call(self) -> _Call:
        if self._call is None:
            raise RuntimeError("a parameter outside an invoke")
        return self._call

    def _skip_space(self) -> None:
        start = self._position
        while self._position < len(self._buffer) and self._buffer[self._position] in _SPACE:
            self._position += 1
        self._keep(self._buffer[start : self._position])

    def _keep(self, source: str) -> None:
        """Keep the source of what is being read, as long as it may turn out to be text."""
        if source and (self._call is None or not self._call.is_announced):
            self._source.append(source)

    def _next_tag(self, *tags: str) -> str | None:
        """Consume and return the tag that stands next; "" if none of them can, None if that is open yet."""
        num_left = len(self._buffer) - self._position
        for tag in tags:
            if self._buffer.startswith(tag, self._position):
                self._position += len(tag)
                return tag
            if num_left < len(tag) and tag.startswith(self._buffer[self._position :]):
                return None
        return ""

    def _next_name(self) -> str | None:
        """Consume a name and the end of its tag; "" if none can come, None if that is open yet."""
        head = self._buffer[self._position : self._position + _MAX_NAME]
        name, end, _ = head.partition(_NAME_END)
        if "\n" in name or "<" in name or (not end and len(head) == _MAX_NAME):
            return ""
        if not end:
            return None
        self._position += len(name) + len(end)
        self._keep(name + end)
        return name

    def _next_until(self, tag: str) -> tuple[str, bool]:
        """Consume up to the tag, and it too if it is there; else all but what may be its start."""
        start, found = self._position, self._buffer.find(tag, self._position)
        if found >= 0:
            end, self._position = found, found + len(tag)
        else:
            held = self._buffer.rfind("<", max(start, len(self._buffer) - len(tag)))
            end = held if held >= 0 and tag.startswith(self._buffer[held:]) else len(self._buffer)
            self._position = end
        self._keep(self._buffer[start : self._position])
        return self._buffer[start:end], found >= 0

    def _may_hold_json(self) -> bool:
        call = self._current_call()
        is_object = self._buffer.startswith("{", self._position)
        return is_object and call.is_empty and call.name in self._tools

    def _settled(self, found: str | None) -> bool:
        """Go on after a look-ahead: with what was found, or as text if it was nothing; wait if it is open."""
        if found == "":
            self._give_up("")
            return True
        return found is not None

    def _give_up(self, rest: str) -> None:
        """What is being read is no call: it is text. A call already announced stays as it is."""
        if self._call is not None and self._call.is_announced:
            self._awaits_block_end = True
        self._text.write("".join(self._source) + rest)
        self._source = []
        self._call = None
        self._state = self._read_text

    # Calls.

    def _take_value(self, call: _Call, chunk: str) -> None:
        if not call.is_streamed:
            call.value.append(chunk)
            return
        if not call.is_open:
            call.is_open = True
            self._announce(call)
            self._send(self._argument_start(call, call.parameter) + '"')
        self._send(_escape(chunk))

    def _end_parameter(self, call: _Call) -> None:
        if call.is_open:
            call.is_open = False
            self._send('"')
            return
        value = read_value("".join(call.value), call.is_string, call.schema.types_of(call.parameter))
        call.arguments.append((call.parameter, value))
        if call.is_announced:
            self._send_arguments(call)

    def _end_call(self) -> bool:
        call = self._current_call()
        if not call.is_announced:
            arguments = call.arguments
            if len(arguments) == 1:
                arguments = call.schema.unwrap(*arguments[0])
            if call.needs_check and not call.schema.required <= {name for name, _ in arguments}:
                self._give_up("")
                return True
            call.arguments = arguments
            self._announce(call)
        self._send("}" if call.num_sent else "{}")
        self._call = None
        self._source = []
        self._awaits_block_end = True
        self._state = self._read_between if self._is_in_block else self._read_text
        return True

    def _announce(self, call: _Call) -> None:
        if call.is_announced:
            return
        call.is_announced = True
        self._source = []
        self._text.end_before_call()
        self._delta.calls.append(CallDelta(self._num_calls, call.name))
        self._num_calls += 1
        self._send_arguments(call)

    def _send_arguments(self, call: _Call) -> None:
        """Send the arguments that are complete and were held back."""
        pending, call.arguments = call.arguments, []
        for name, value in pending:
            self._send(self._argument_start(call, name) + to_json(value))

    def _argument_start(self, call: _Call, name: str) -> str:
        call.num_sent += 1
        return ("{" if call.num_sent == 1 else ", ") + to_json(name) + ": "

    def _send(self, arguments: str) -> None:
        index = self._num_calls - 1
        if not self._delta.calls or self._delta.calls[-1].index != index:
            self._delta.calls.append(CallDelta(index))
        self._delta.calls[-1].arguments += arguments

    def _send_unfinished(self, call: _Call, rest: str) -> None:
        """The reply ended inside a value of an announced call."""
        if call.is_open:
            self._send(_escape(rest))
        elif unfinished := "".join(call.value) + rest:
            self._send(self._argument_start(call, call.parameter) + unfinished)


def _escape(text: str) -> str:
    """The inside of a JSON string."""
    return to_json(text)[1:-1]


class _TextOutput:
    """The text of a reply, less the blank space that only separates it from calls.

    Held back are: blank space at the start of the reply or after a call, until text follows; and at most
    one blank line at the end of text, which `CALLS_SEPARATOR` may turn out to be.
    """

    def __init__(self) -> None:
        self._ready: list[str] = []
        self._held: list[str] = []
        # True at the start of the reply and after a call.
        self._is_blank = True

    def write(self, text: str) -> None:
        if not text:
            return
        if self._is_blank and not text.strip(_SPACE):
            self._held.append(text)
            return
        text = "".join(self._held) + text
        self._is_blank = False
        num_newlines = len(text) - len(text.rstrip("\n"))
        end = len(text) - min(num_newlines, len(t.CALLS_SEPARATOR))
        self._ready.append(text[:end])
        self._held = [text[end:]]

    def end_before_call(self) -> None:
        """A call follows."""
        held = "".join(self._held)
        if not self._is_blank:
            self._ready.append(held.removesuffix(t.CALLS_SEPARATOR))
        self._held = []
        self._is_blank = True

    def finish(self, has_calls: bool) -> None:
        """The reply ends; blank space after its last call says nothing."""
        if not (self._is_blank and has_calls):
            self._ready.extend(self._held)
        self._held = []

    def take(self) -> str:
        """The text that is settled since the last time."""
        text = "".join(self._ready)
        self._ready = []
        return text
