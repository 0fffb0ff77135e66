"""Chat messages to a DeepSeek-V3.2 prompt: pure functions over the format that DeepSeek's encoder defines.

A prompt is BOS, then one piece for each message. Where the assistant is to speak stands an *opener*:
`<｜Assistant｜>` and a think token after the user, a think token alone after the results of tools. The
think token is `<think>` from the last user message on, if the request thinks, and `</think>` before.
An opener is written only when the next message (or the end of the prompt) shows that it is the
assistant's turn, so a system message in between never lands inside that turn.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_dsv32.errors import MessageError
from vllm_dsv32.serving import tokens as t
from vllm_dsv32.serving.messages import ToolCall, Turn, error, is_unicode, read_message, read_text, read_tools

_TOOLS_TEMPLATE = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "{t.CALLS_START}" block like the following as part of your reply to \
the user:
{t.CALLS_START}
{t.INVOKE_START}$FUNCTION_NAME">
{t.PARAMETER_START}$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{t.PARAMETER_END}
...
{t.INVOKE_END}
{t.INVOKE_START}$FUNCTION_NAME2">
...
{t.INVOKE_END}
{t.CALLS_END}

String and scalar parameters should be specified as is without any escaping or quotes, while lists and \
objects should use JSON format. The "string" attribute should be set to "true" for string type parameters \
and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a \
thinking block. Here is an example:

{t.CALLS_START}
...
{t.CALLS_END}

{t.RESULTS_START}
...
{t.RESULTS_END}

{t.THINK_START}...thinking about results{t.THINK_END}

Here are the functions available in JSONSchema format:
<functions>
%s
</functions>
"""

_RESPONSE_FORMAT_TEMPLATE = """## Response Format:

You MUST strictly adhere to the following schema to reply:
%s"""

_DEVELOPER_TEMPLATE = "\n\n# The user's message is: %s"


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Iterable[Mapping[str, Any]] | None = None,
    response_format: Any = None,
    thinking: bool = False,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
) -> str:
    """The prompt for a history of OpenAI chat messages, in time linear in its length.

    Args:
        messages: the history, oldest first; not modified.
        tools: OpenAI tools of the request. They go on the leading system or developer message, in place of
            its own `tools`; without such a message they open the prompt.
        response_format: OpenAI's `response_format`, or a JSON schema; placed like `tools`.
        thinking: whether the model thinks from the last user message on.
        add_generation_prompt: True always ends the prompt with an opener, False never; None is DeepSeek's
            encoder, which opens the assistant's turn unless the assistant spoke last.
        continue_final_message: the prompt ends inside the last message, the assistant's: in its text, or in
            its reasoning if it has no text yet. DeepSeek's `prefix` key on that message says the same.

    Raises:
        MessageError: the history has no prompt; the message names the culprit's index and the reason.
    """
    turns = [read_message(index, message) for index, message in enumerate(messages)]
    if not turns:
        raise MessageError("messages is empty, expected at least one message")
    _check_ending(turns, add_generation_prompt, continue_final_message)
    prompt = _Prompt(thinking, last_user=max(_indices_of_users(turns), default=-1))

    request_tools = read_tools(tools)
    if request_tools or response_format is not None:
        if turns[0].role not in ("system", "developer"):
            opening = Turn("system", "", tools=request_tools, response_format=response_format)
            prompt.parts.append(_system_part(opening))
        else:
            turns[0] = turns[0]._replace(
                tools=request_tools or turns[0].tools,
                response_format=turns[0].response_format if response_format is None else response_format,
            )

    final = len(turns) - 1 if continue_final_message or turns[-1].prefix else None
    for index, turn in enumerate(turns):
        prompt.add(index, turn, is_continued=index == final)
    if final is None:
        prompt.close(add_generation_prompt)
    return "".join(prompt.parts)


def ends_in_open_thinking(
    final_message: Mapping[str, Any] | None,
    *,
    thinking: bool,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
) -> bool:
    """Whether the prompt that `encode_messages` makes of a history ends inside the model's thinking.

    Of the history only its last message matters. For a parser that does not see the prompt.
    """
    if not thinking:
        return False
    message = final_message or {}
    if continue_final_message or message.get("prefix"):
        return final_message is not None and not read_text(message)
    if add_generation_prompt is None:
        return message.get("role") != "assistant"
    return add_generation_prompt


class _Prompt:
    """The pieces of a prompt under construction, and what the next piece depends on."""

    def __init__(self, thinking: bool, last_user: int) -> None:
        self.parts: list[str] = [t.BOS]
        self._thinking = thinking
        self._last_user = last_user
        # The opener that waits for the assistant's turn, and whether the one just written was <think>.
        self._opener = ""
        self._is_thinking = False
        self._open_calls: _OpenCalls | None = None

    def add(self, index: int, turn: Turn, *, is_continued: bool = False) -> None:
        """Append the message at `index`."""
        if self._open_calls is not None and turn.role != "tool":
            raise self._open_calls.unanswered(f"messages[{index}], of role {turn.role!r}")
        if turn.role != "system":
            self._open()
        match turn.role:
            case "system":
                self._append(index, _system_part(turn))
            case "developer":
                self._append(index, t.USER, _developer_part(turn))
                self._opener = t.ASSISTANT + self._think_token(index)
            case "user":
                self._append(index, t.USER, turn.text)
                self._opener = t.ASSISTANT + self._think_token(index)
            case "tool":
                self._append(index, *self._result_parts(index, turn))
            case _:
                self._append(index, *self._assistant_parts(index, turn, is_continued))

    def close(self, add_generation_prompt: bool | None) -> None:
        """End the prompt, with an opener if there is to be one."""
        if self._open_calls is not None and (self._open_calls.results or add_generation_prompt):
            raise self._open_calls.unanswered("the end")
        if add_generation_prompt and not self._opener:
            self._opener = t.ASSISTANT + (t.THINK_START if self._thinking else t.THINK_END)
        if add_generation_prompt is not False:
            self._open()

    def _open(self) -> None:
        self.parts.append(self._opener)
        self._is_thinking = self._opener.endswith(t.THINK_START)
        self._opener = ""

    def _think_token(self, index: int) -> str:
        return t.THINK_START if self._thinking and index >= self._last_user else t.THINK_END

    def _append(self, index: int, *parts: str) -> None:
        if not all(map(is_unicode, parts)):
            raise error(index, "holds a lone surrogate, which is not valid Unicode text")
        self.parts.extend(parts)

    def _assistant_parts(self, index: int, turn: Turn, is_continued: bool) -> list[str]:
        parts = []
        if self._thinking and index > self._last_user:
            parts.append(turn.reasoning)
            stays_open = is_continued and not turn.text
            if (self._is_thinking or turn.reasoning) and not stays_open:
                parts.append(t.THINK_END)
        parts.append(turn.text)
        if turn.calls:
            parts.extend(_calls_parts(turn.calls))
            self._open_calls = _OpenCalls(index, turn.calls)
        if not is_continued:
            parts.append(t.EOS)
        self._is_thinking = False
        return parts

    def _result_parts(self, index: int, turn: Turn) -> list[str]:
        """Take one result; once all calls have theirs, the block of results, in the order of the calls."""
        if self._open_calls is None:
            raise error(index, f"answers tool call {turn.call_id!r}, but no call waits for a result")
        self._open_calls.take(index, turn)
        results = self._open_calls.all_results()
        if results is None:
            return []
        self._open_calls = None
        self._opener = "\n\n" + self._think_token(index)
        parts = ["\n\n", t.RESULTS_START]
        for result in results:
            parts += ["\n", t.RESULT_START, result, t.RESULT_END]
        return [*parts, "\n", t.RESULTS_END]


class _OpenCalls:
    """The calls of one assistant message, while some of them have no result."""

    def __init__(self, index: int, calls: Sequence[ToolCall]) -> None:
        self.index = index
        self.results: dict[str, str] = {}
        self._ids = {call.id: None for call in calls}

    def take(self, index: int, turn: Turn) -> None:
        """Record the tool message at `index` as the result of the call that it names."""
        call_id = turn.call_id or ""
        if call_id not in self._ids:
            known = ", ".join(map(repr, self._ids))
            raise error(index, f"answers tool call {call_id!r}, but messages[{self.index}] made only {known}")
        if call_id in self.results:
            raise error(index, f"answers tool call {call_id!r} a second time")
        self.results[call_id] = turn.text

    def all_results(self) -> list[str] | None:
        """The results in the order of the calls, or None while one is missing."""
        if len(self.results) < len(self._ids):
            return None
        return [self.results[call_id or ""] for call_id in self._ids]

    def unanswered(self, before: str) -> MessageError:
        """The error for a history in which something else comes before the results."""
        missing = ", ".join(repr(call_id) for call_id in self._ids if call_id not in self.results)
        return error(self.index, f"tool calls without a result before {before}: {missing}")


def _indices_of_users(turns: Sequence[Turn]) -> list[int]:
    return [index for index, turn in enumerate(turns) if turn.role in ("user", "developer")]


def _check_ending(turns: Sequence[Turn], add_generation_prompt: bool | None, continue_final_message: bool) -> None:
    last = len(turns) - 1
    if continue_final_message and add_generation_prompt:
        raise MessageError("continue_final_message and add_generation_prompt exclude each other; set one")
    is_continued = continue_final_message or turns[last].prefix
    if is_continued and turns[last].role != "assistant":
        raise error(last, f"only an assistant message can be continued, got role {turns[last].role!r}")
    if is_continued and turns[last].calls:
        raise error(last, "a message with tool calls is complete and cannot be continued")


def _system_part(turn: Turn) -> str:
    return turn.text + _instructions(turn)


def _developer_part(turn: Turn) -> str:
    return _instructions(turn) + _DEVELOPER_TEMPLATE % turn.text


def _instructions(turn: Turn) -> str:
    """What a system or developer message carries besides its text."""
    part = ""
    if turn.tools:
        part += "\n\n" + _TOOLS_TEMPLATE % "\n".join(_to_json(function) for function in turn.tools)
    if (schema := _response_schema(turn.response_format)) is not None:
        part += "\n\n" + _RESPONSE_FORMAT_TEMPLATE % _to_json(schema)
    return part


def _response_schema(response_format: Any) -> Any:
    """The JSON schema that OpenAI's `response_format` asks for; None if it asks for none."""
    if not isinstance(response_format, Mapping):
        return response_format or None
    match response_format.get("type"):
        case "json_schema" if isinstance(response_format.get("json_schema"), Mapping):
            wrapper = response_format["json_schema"]
            return wrapper.get("schema", wrapper.get("json_schema"))
        case "json_object":
            return {"type": "object"}
        case "text" | "structural_tag":
            return None
        case _:
            return dict(response_format) or None


def _calls_parts(calls: Iterable[ToolCall]) -> list[str]:
    parts = [t.CALLS_SEPARATOR, t.CALLS_START, "\n"]
    for call in calls:
        parts += [t.INVOKE_START, call.name, '">\n']
        for number, (name, value) in enumerate(call.arguments.items()):
            is_string, text = ("true", value) if isinstance(value, str) else ("false", _to_json(value))
            start = f'{t.PARAMETER_START}{name}" string="{is_string}">'
            parts += ["\n" if number else "", start, text, t.PARAMETER_END]
        parts += ["\n", t.INVOKE_END, "\n"]
    return [*parts, t.CALLS_END]


def _to_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # A lone surrogate has no UTF-8; escaped, it has.
    return text if is_unicode(text) else json.dumps(value)
