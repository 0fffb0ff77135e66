"""The tool parser `deepseek_v32`: the DSML parser behind vLLM's interface."""

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaMessage,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tokenizers import TokenizerLike
from vllm.tool_parsers.abstract_tool_parser import Tool, ToolParser
from vllm.tool_parsers.utils import get_function_tools

from vllm_dsv32.serving.dsml import CallDelta, Delta, DsmlParser
from vllm_dsv32.serving.schema import ToolSchema


class Dsv32ToolParser(ToolParser):
    """Finds the tool calls in DeepSeek-V3.2's replies. One object for one reply.

    `required` and named tool choices are enforced by xgrammar's structural tag for this model, which
    constrains the reply, after its thoughts, to the DSML that `DsmlParser` reads.
    """

    structural_tag_model = "deepseek_v3_2"
    # Not by vLLM's JSON list of calls, also where the operator switched structural tags off.
    supports_required_and_named = False
    # vLLM then hands over each delta once, accumulates no text, and calls `finish_streaming` at the end.
    engine_based_streaming = True

    def __init__(self, tokenizer: TokenizerLike, tools: list[Tool] | None = None) -> None:
        super().__init__(tokenizer, tools)
        self._declared = list(tools or ())
        self._stream: DsmlParser | None = None

    def adjust_request(self, request: Any) -> Any:
        """Have the tags reach the parser, should the tokenizer call them special."""
        request = super().adjust_request(request)
        if request.tools and request.tool_choice != "none":
            request.skip_special_tokens = False
        return request

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        """Split a whole reply into content and calls."""
        parser = self._parser_for(request, stream_arguments=False)
        if parser is None:
            return ExtractedToolCallInformation(tools_called=False, tool_calls=[], content=model_output or None)
        deltas = [parser.feed(model_output), parser.finish()]
        calls = [
            ToolCall(function=FunctionCall(name=call.name or "", arguments=call.arguments))
            for delta in deltas
            for call in delta.calls
        ]
        content = "".join(delta.text for delta in deltas)
        return ExtractedToolCallInformation(tools_called=bool(calls), tool_calls=calls, content=content or None)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        """Take the next piece of a reply, `delta_text`; nothing else of the arguments is read but `request`."""
        if self._stream is None:
            self._stream = self._parser_for(request, stream_arguments=True)
        if self._stream is None:
            return DeltaMessage(content=delta_text) if delta_text else None
        return _message(self._stream.feed(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        """Take the end of a streamed reply."""
        return None if self._stream is None else _message(self._stream.finish())

    def _parser_for(self, request: Any, *, stream_arguments: bool) -> DsmlParser | None:
        """A parser for the tools that the request declares; None if its reply holds no calls."""
        tools = self._declared
        if request is not None:
            if request.tool_choice == "none":
                return None
            tools = list(request.tools or tools)
            if not tools:
                return None
        return DsmlParser(_schemas(tools), stream_arguments=stream_arguments)


def _schemas(tools: Sequence[Tool]) -> dict[str, ToolSchema]:
    """The schema of each tool by its name, as the prompt shows it to the model."""
    functions = [getattr(tool, "function", tool) for tool in get_function_tools(tools)]
    return {function.name: ToolSchema(function.parameters) for function in functions}


def _message(delta: Delta) -> DeltaMessage | None:
    """The message for what a piece settled; None if it settled nothing."""
    if not delta.text and not delta.calls:
        return None
    if not delta.calls:
        return DeltaMessage(content=delta.text)
    # One validation of it all is cheaper than an object at a time. What is not set is not sent.
    fields: dict[str, Any] = {"tool_calls": [_call(call) for call in delta.calls]}
    if delta.text:
        fields["content"] = delta.text
    return DeltaMessage.model_validate(fields)


def _call(call: CallDelta) -> dict[str, Any]:
    """OpenAI's form of one call's news."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {
        "index": call.index,
        "id": make_tool_call_id(),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
