"""What replies to a chat: a server of the OpenAI API, or transformers in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving_runs.chat import open_client

from vllm_dsv32.serving.dsml import DsmlParser
from vllm_dsv32.serving.encoding import encode_messages
from vllm_dsv32.serving.schema import ToolSchema
from vllm_dsv32.serving.thoughts import ThoughtSplitter

__all__ = ["Replier", "served", "transformed"]

Replier = Callable[[list[dict[str, Any]], list[dict[str, Any]], bool], dict[str, Any]]
"""From messages, tools and whether to think to the assistant's next message, in the OpenAI API's form."""

MAX_TOKENS = 200


def served(base_url: str, model: str | None = None) -> Replier:
    """Replies of a server at temperature 0; OPENAI_API_KEY is its key.

    Args:
        base_url: such as ``http://127.0.0.1:8000/v1``.
        model: the name it is served under; by default the first that the server names.
    """
    client = open_client(base_url, timeout=900)
    name = model or client.models.list().data[0].id

    def reply(messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: bool) -> dict[str, Any]:
        options: dict[str, Any] = {"tools": tools} if tools else {}
        response = client.chat.completions.create(
            model=name,
            messages=messages,
            temperature=0,
            max_tokens=MAX_TOKENS,
            extra_body={"chat_template_kwargs": {"thinking": thinking}},
            **options,
        )
        return response.choices[0].message.model_dump(exclude_none=True)

    return reply


def transformed(path: Path, chunk: int = 512) -> Replier:
    """Replies of transformers' own model in float32, greedy; only prompt format and parsers are ours.

    Args:
        path: of the checkpoint.
        chunk: tokens of a prompt at once, which bounds the memory that attention written out takes.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, DynamicCache

    # By class, not through Auto*: once vLLM is imported, it maps this model type to V3's configuration.
    config = DeepseekV32Config.from_pretrained(path)
    model = DeepseekV32ForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))

    @torch.no_grad()
    def complete(prompt: str) -> str:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        cache = DynamicCache(config=config)
        generated: list[int] = []
        pieces = [ids[begin : begin + chunk] for begin in range(0, len(ids), chunk)]
        while len(generated) < MAX_TOKENS:
            for piece in pieces:
                logits = model(torch.tensor([piece]), past_key_values=cache, logits_to_keep=1).logits
            generated.append(int(logits[0, -1].argmax()))
            if generated[-1] == config.eos_token_id:
                break
            pieces = [generated[-1:]]
        return tokenizer.decode(generated, skip_special_tokens=True)

    def reply(messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: bool) -> dict[str, Any]:
        prompt = encode_messages(messages, tools=tools or None, thinking=thinking, add_generation_prompt=True)
        return _parsed(complete(prompt), tools, thinking)

    return reply


def _parsed(text: str, tools: list[dict[str, Any]], thinking: bool) -> dict[str, Any]:
    splitter = ThoughtSplitter(is_thinking=thinking)
    reasoning, said = splitter.feed(text)
    reasoning += splitter.finish()
    schemas = {tool["function"]["name"]: ToolSchema(tool["function"]["parameters"]) for tool in tools}
    parser = DsmlParser(schemas, stream_arguments=False)
    deltas = [parser.feed(said), parser.finish()]
    calls = [
        {"id": f"{call.name}-{len(text)}", "type": "function"}
        | {"function": {"name": call.name, "arguments": call.arguments}}
        for delta in deltas
        for call in delta.calls
    ]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(delta.text for delta in deltas)}
    if reasoning:
        message["reasoning"] = reasoning
    return message | ({"tool_calls": calls} if calls else {})
