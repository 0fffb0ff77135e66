"""The tool loop over each of vLLM's chat APIs, by the vendors' own clients."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import anthropic

from server import chat
from server.process import MODEL, Server
from server.replies import TOOLS, run_tool

FUNCTIONS = [tool["function"] for tool in TOOLS]
THINKING = {"chat_template_kwargs": {"thinking": True}}


@dataclass
class SubTurn:
    """One reply of the model."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, dict]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list, compare=False)


class ToolLoop(ABC):
    """A conversation: `ask` runs the tools that the model calls until it answers."""

    def __init__(self, server: Server, *, stream: bool):
        self.server = server
        self.stream = stream
        self.history: list[dict] = []

    def ask(self, question: str) -> list[SubTurn]:
        self.history.append({"role": "user", "content": question})
        turns = [self.reply()]
        while calls := turns[-1].calls:
            results = [run_tool(name, arguments) for name, arguments in calls]
            self.add_results(dict(zip(turns[-1].ids, results, strict=True)))
            turns.append(self.reply())
        return turns

    @abstractmethod
    def reply(self) -> SubTurn:
        """Have the model reply, and append that to the history."""

    @abstractmethod
    def add_results(self, results: dict[str, str]) -> None:
        """Append the results of calls, by the calls' ids."""


class ChatLoop(ToolLoop):
    """`/v1/chat/completions`. The client clears the reasoning of earlier questions, as DeepSeek advises."""

    def ask(self, question):
        for message in self.history:
            message.pop("reasoning", None)
        return super().ask(question)

    def reply(self):
        answer = chat.complete(self.server, self.history, stream=self.stream, extra_body=THINKING)
        functions = [{"name": name, "arguments": arguments} for name, arguments in answer.calls]
        message = {"role": "assistant", "content": answer.content, "reasoning": answer.reasoning}
        if functions:
            message["tool_calls"] = [
                {"id": id_, "type": "function", "function": function}
                for id_, function in zip(answer.ids, functions, strict=True)
            ]
        self.history.append(message)
        return SubTurn(answer.reasoning, answer.content, answer.parsed_calls(), answer.ids)

    def add_results(self, results):
        self.history += [{"role": "tool", "tool_call_id": id_, "content": text} for id_, text in results.items()]


class ResponsesLoop(ToolLoop):
    """`/v1/responses`, without state on the server. The client sends everything back, reasoning too."""

    def reply(self):
        tools = [{"type": "function", **function} for function in FUNCTIONS]
        response = chat.client(self.server).responses.create(
            model=MODEL, input=self.history, tools=tools, stream=self.stream, extra_body=THINKING
        )
        streamed = None
        if self.stream:
            streamed, response = self.collected(response)
        assert response.status == "completed"
        turn = SubTurn()
        for item in response.output:
            self.history.append(item.model_dump(exclude_none=True))
            match item.type:
                case "reasoning":
                    turn.reasoning += "".join(part.text for part in item.content)
                case "message":
                    turn.content += "".join(part.text for part in item.content)
                case "function_call":
                    turn.calls.append((item.name, json.loads(item.arguments)))
                    turn.ids.append(item.call_id)
        assert streamed in (None, turn), "the deltas differ from the completed response"
        return turn

    @staticmethod
    def collected(events):
        """What the deltas say, and the completed response."""
        turn, names, arguments, response = SubTurn(), [], [], None
        for event in events:
            match event.type:
                case "response.reasoning_text.delta":
                    turn.reasoning += event.delta
                case "response.output_text.delta":
                    turn.content += event.delta
                case "response.output_item.added" if event.item.type == "function_call":
                    names.append(event.item.name)
                    arguments.append("")
                case "response.function_call_arguments.delta":
                    arguments[-1] += event.delta
                case "response.completed":
                    response = event.response
        turn.calls = list(zip(names, map(json.loads, arguments), strict=True))
        return turn, response

    def add_results(self, results):
        self.history += [
            {"type": "function_call_output", "call_id": id_, "output": text} for id_, text in results.items()
        ]


class MessagesLoop(ToolLoop):
    """Anthropic's `/v1/messages`. The client sends everything back, thinking too."""

    def reply(self):
        client = anthropic.Anthropic(base_url=self.server.url, api_key="none", max_retries=0, timeout=300)
        options = {
            "model": MODEL,
            "max_tokens": 1000,
            "messages": self.history,
            "tools": [
                {"input_schema" if key == "parameters" else key: value for key, value in function.items()}
                for function in FUNCTIONS
            ],
            "extra_body": THINKING,
        }
        if self.stream:
            with client.messages.stream(**options) as events:
                message = events.get_final_message()
        else:
            message = client.messages.create(**options)
        turn, blocks = SubTurn(), []
        for block in message.content:
            match block.type:
                case "thinking":
                    turn.reasoning += block.thinking
                    blocks.append(
                        {"type": "thinking", "thinking": block.thinking, "signature": block.signature or ""}
                    )
                case "text":
                    turn.content += block.text
                    blocks.append({"type": "text", "text": block.text})
                case "tool_use":
                    turn.calls.append((block.name, block.input))
                    turn.ids.append(block.id)
                    blocks.append({"type": "tool_use", "id": block.id, "name": block.name, "input": block.input})
        assert message.stop_reason == ("tool_use" if turn.calls else "end_turn")
        self.history.append({"role": "assistant", "content": blocks})
        return turn

    def add_results(self, results):
        blocks = [{"type": "tool_result", "tool_use_id": id_, "content": text} for id_, text in results.items()]
        self.history.append({"role": "user", "content": blocks})
