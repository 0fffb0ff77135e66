"""Requests as vLLM's server makes them, and its parser composed of ours."""

from dataclasses import dataclass, field
from types import SimpleNamespace

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.abstract_parser import DelegatingParser

from serving.replies import cut
from text_cases.replies import function
from vllm_dsv32.serving.reasoning_parser import Dsv32ReasoningParser
from vllm_dsv32.serving.tool_parser import Dsv32ToolParser

MODEL = SimpleNamespace(hf_config=SimpleNamespace(model_type="deepseek_v32"))


class Parser(DelegatingParser):
    """What vLLM makes of --tool-call-parser deepseek_v32 --reasoning-parser deepseek_v3."""

    reasoning_parser_cls = Dsv32ReasoningParser
    tool_parser_cls = Dsv32ToolParser


WEATHER = function("weather", {"city": {"type": "string"}, "days": {"type": "integer"}}, ["city"])
NOW = function("now")


def request(messages=None, tools=(WEATHER, NOW), **keys):
    messages = messages or [{"role": "user", "content": "Hi"}]
    if tools:
        keys["tools"] = list(tools)
    return ChatCompletionRequest(model="m", messages=messages, **keys)


def template_kwargs(chat_request, server_defaults=None):
    """The effective chat_template_kwargs, as vLLM's server computes them."""
    return chat_request.build_chat_params(None, "auto").with_defaults(server_defaults).chat_template_kwargs


@dataclass
class Answer:
    """What the client gets."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list, compare=False)


class Server:
    """Runs a request the way vLLM's chat endpoint does, with a given reply in place of the model's."""

    def __init__(self, tokenizer, server_defaults=None):
        self.tokenizer = tokenizer
        self.server_defaults = server_defaults

    def parser(self, chat_request):
        return Parser(
            self.tokenizer,
            chat_request.tools,
            chat_template_kwargs=template_kwargs(chat_request, self.server_defaults),
            model_config=MODEL,
        )

    def prompt(self, chat_request):
        tools = [tool.model_dump() for tool in chat_request.tools] if chat_request.tools else None
        kwargs = template_kwargs(chat_request, self.server_defaults)
        return self.tokenizer.apply_chat_template(chat_request.messages, tools=tools, **kwargs)

    def whole(self, chat_request, reply):
        parser = self.parser(chat_request)
        reasoning, content, calls = parser.parse(reply, chat_request, enable_auto_tools=True)
        return Answer(
            reasoning or "",
            content or "",
            [(call.name, call.arguments) for call in calls or ()],
            [call.id for call in calls or ()],
        )

    def stream(self, chat_request, pieces):
        parser, answer = self.parser(chat_request), Answer()
        prompt = self.prompt(chat_request)
        pieces = [*pieces, ""]
        for i, piece in enumerate(pieces):
            ids = self.tokenizer.encode(piece, add_special_tokens=False)
            message = parser.parse_delta(piece, ids, chat_request, prompt, finished=i == len(pieces) - 1)
            if message is None:
                continue
            answer.reasoning += message.reasoning or ""
            answer.content += message.content or ""
            for call in message.tool_calls:
                if call.function.name is not None:
                    assert call.index == len(answer.calls)
                    answer.calls.append((call.function.name, ""))
                    answer.ids.append(call.id)
                name, arguments = answer.calls[call.index]
                answer.calls[call.index] = (name, arguments + call.function.arguments)
        return answer

    def answer(self, chat_request, reply):
        """The answer, after checking that it is the same whole and streamed, however it is cut."""
        whole = self.whole(chat_request, reply)
        assert self.stream(chat_request, [reply]) == whole
        assert self.stream(chat_request, reply) == whole
        for seed in range(5):
            assert self.stream(chat_request, cut(reply, seed)) == whole
        return whole
