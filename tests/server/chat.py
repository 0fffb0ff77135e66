"""Chat completions by OpenAI's client, whole and streamed, as an `Answer`."""

import openai

from server.process import MODEL, Server
from server.replies import TOOLS, Answer


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def complete(server: Server, messages: list[dict], *, stream: bool = False, **options) -> Answer:
    """The model's reply to a history."""
    reply = client(server).chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS, stream=stream, **options
    )
    return collected(reply) if stream else whole(reply.choices[0])


def ask(server: Server, question: str, *, thinking: bool | None = None, **options) -> Answer:
    """The answer to one question, the same whole and streamed; the thinking switch is left out if None."""
    if thinking is not None:
        options["extra_body"] = {"chat_template_kwargs": {"thinking": thinking}}
    messages = [{"role": "user", "content": question}]
    answer = complete(server, messages, **options)
    assert complete(server, messages, stream=True, **options) == answer
    return answer


def whole(choice) -> Answer:
    calls = choice.message.tool_calls or []
    return Answer(
        getattr(choice.message, "reasoning", None) or "",
        choice.message.content or "",
        [(call.function.name, call.function.arguments) for call in calls],
        choice.finish_reason,
        [call.id for call in calls],
    )


def collected(chunks) -> Answer:
    """The concatenation of a stream, each of whose deltas is checked for its form."""
    answer = Answer()
    for chunk in chunks:
        for choice in chunk.choices:
            assert answer.finish_reason is None, "nothing follows the finish reason"
            answer.finish_reason = choice.finish_reason
            answer.reasoning += getattr(choice.delta, "reasoning", None) or ""
            answer.content += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                if call.function.name is not None:
                    assert call.index == len(answer.calls), "calls are announced in order"
                    assert call.id not in (None, "", *answer.ids), "ids are unique"
                    answer.calls.append((call.function.name, ""))
                    answer.ids.append(call.id)
                name, arguments = answer.calls[call.index]
                answer.calls[call.index] = (name, arguments + (call.function.arguments or ""))
    return answer
