"""The text side of DeepSeek-V3.2 twice, behind the same calls: this plugin's and the one inside vLLM.

Both get what `vllm serve --tokenizer-mode deepseek_v32 --tool-call-parser deepseek_v32 --reasoning-parser
deepseek_v3` gives them: a chat request goes through the renderer, a reply through vLLM's `DelegatingParser`,
composed of a side's own reasoning parser and tool parser.
"""

import logging
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers.decoders import DecodeStream
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.abstract_parser import DelegatingParser
from vllm.reasoning.deepseek_v3_reasoning_parser import DeepSeekV3ReasoningParser
from vllm.renderers.base import BaseRenderer
from vllm.renderers.deepseek_v32 import DeepseekV32Renderer
from vllm.renderers.params import ChatParams
from vllm.tokenizers.deepseek_v32 import DeepseekV32Tokenizer
from vllm.tool_parsers.deepseekv32_engine_tool_parser import DeepSeekV32EngineToolParser

from vllm_dsv32.serving.reasoning_parser import Dsv32ReasoningParser
from vllm_dsv32.serving.renderer import Dsv32Renderer
from vllm_dsv32.serving.tokenizer import Dsv32Tokenizer
from vllm_dsv32.serving.tool_parser import Dsv32ToolParser
from vllm_dsv32.tools.tiny_tokenizer import tokenizer_size, write_tokenizer

# A delta of a streamed reply: its text and its token ids.
Delta = tuple[str, list[int]]

# What renderers and parsers read of vLLM's configuration.
_MODEL = SimpleNamespace(
    model="tiny",
    hf_config=SimpleNamespace(model_type="deepseek_v32"),
    hf_text_config=SimpleNamespace(model_type="deepseek_v32"),
    hf_overrides=None,
    is_encoder_decoder=False,
    is_multimodal_model=False,
    supports_multimodal_inputs=False,
    multimodal_config=None,
    allowed_local_media_path="",
    allowed_media_domains=None,
    enable_prompt_embeds=False,
    renderer_num_workers=1,
    max_model_len=1 << 21,
    encoder_config=None,
    get_vocab_size=tokenizer_size,
)
_CONFIG: Any = SimpleNamespace(model_config=_MODEL, parallel_config=SimpleNamespace(_api_process_rank=0))


@dataclass
class Answer:
    """What the client gets."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    # The characters that the largest streamed piece brought.
    largest_piece: int = field(default=0, compare=False)

    def shown(self) -> dict[str, Any]:
        """What a report shows of it."""
        return {"reasoning": self.reasoning, "content": self.content, "calls": self.calls}


@dataclass
class Side:
    """One implementation of the text side."""

    name: str
    tokenizer: Any
    renderer: BaseRenderer[Any]
    parser_class: type[DelegatingParser]
    tool_parser_class: type[DelegatingParser]
    """The tool parser alone, as without --reasoning-parser."""

    def render(self, messages: Sequence[Any], options: dict[str, Any]) -> str:
        """The prompt that the server makes of a history; vLLM's renderer writes into the messages."""
        kwargs = {"tokenize": False, **options}
        params = ChatParams(response_format=kwargs.pop("response_format", None), chat_template_kwargs=kwargs)
        prompt: Any = self.renderer.render_messages(list(messages), params)[1]
        return prompt["prompt"]

    def parser(self, request: ChatCompletionRequest, *, with_reasoning: bool = True) -> DelegatingParser:
        """A parser for one reply to the request."""
        parser_class = self.parser_class if with_reasoning else self.tool_parser_class
        kwargs = request.build_chat_params(None, "auto").chat_template_kwargs
        return parser_class(self.tokenizer, request.tools, chat_template_kwargs=kwargs, model_config=_MODEL)

    def prompt_ids(self, request: ChatCompletionRequest) -> list[int]:
        """The token ids of the request's prompt."""
        kwargs = request.build_chat_params(None, "auto").chat_template_kwargs
        return self.tokenizer.apply_chat_template(request.messages, **{**kwargs, "tokenize": True})

    def whole(self, request: ChatCompletionRequest, reply: str) -> Answer:
        """The answer without streaming."""
        reasoning, content, calls = self.parser(request).parse(reply, request, enable_auto_tools=True)
        return Answer(reasoning or "", content or "", [(call.name, call.arguments) for call in calls or ()])

    def stream(
        self, request: ChatCompletionRequest, deltas: Sequence[Delta], *, with_reasoning: bool = True
    ) -> Answer:
        """The answer put together from what is streamed."""
        parser, prompt = self.parser(request, with_reasoning=with_reasoning), self.prompt_ids(request)
        answer = Answer()
        for number, (text, ids) in enumerate(deltas, 1):
            message = parser.parse_delta(text, ids, request, prompt, finished=number == len(deltas))
            if message is None:
                continue
            answer.reasoning += message.reasoning or ""
            answer.content += message.content or ""
            pieces = [message.reasoning, message.content, *(call.function.arguments for call in message.tool_calls)]
            answer.largest_piece = max(answer.largest_piece, sum(len(piece or "") for piece in pieces))
            for call in message.tool_calls:
                if call.function.name is not None:
                    answer.calls.append((call.function.name, ""))
                name, arguments = answer.calls[call.index]
                answer.calls[call.index] = (name, arguments + (call.function.arguments or ""))
        return answer


@contextmanager
def open_sides() -> Iterator[tuple[Side, Side]]:
    """The plugin's side and vLLM's, over the same tokenizer: one token per byte, DeepSeek's control tokens."""
    logging.getLogger("vllm").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        ours: Any = Dsv32Tokenizer.from_pretrained(folder)
        theirs: Any = DeepseekV32Tokenizer.from_pretrained(folder)
    plugin = Side(
        "plugin",
        ours,
        Dsv32Renderer(_CONFIG, ours),
        _compose(Dsv32ReasoningParser, Dsv32ToolParser),
        _compose(None, Dsv32ToolParser),
    )
    in_tree = Side(
        "in-tree",
        theirs,
        DeepseekV32Renderer(_CONFIG, theirs),
        _compose(DeepSeekV3ReasoningParser, DeepSeekV32EngineToolParser),
        _compose(None, DeepSeekV32EngineToolParser),
    )
    try:
        yield plugin, in_tree
    finally:
        plugin.renderer.shutdown()
        in_tree.renderer.shutdown()


def chat_request(
    tools: Sequence[Any] = (), *, messages: Sequence[Any] = (), thinking: bool = False, **keys: Any
) -> ChatCompletionRequest:
    """A request as the server reads it."""
    messages = messages or [{"role": "user", "content": "Hi"}]
    if tools:
        keys["tools"] = list(tools)
    if thinking:
        keys["chat_template_kwargs"] = {"thinking": True}
    return ChatCompletionRequest(model="m", messages=messages, **keys)


def cut(tokenizer: Any, reply: str, tokens_per_delta: int) -> list[Delta]:
    """A reply as vLLM's detokenizer hands it on: so many tokens a delta, then the empty last one."""
    ids = tokenizer.encode(reply, add_special_tokens=False)
    detokenizer, backend = DecodeStream(skip_special_tokens=False), tokenizer.backend_tokenizer
    deltas: list[Delta] = []
    for start in range(0, len(ids), tokens_per_delta):
        chunk = ids[start : start + tokens_per_delta]
        deltas.append(("".join(detokenizer.step(backend, token) or "" for token in chunk), chunk))
    return [*deltas, ("", [])]


def environment() -> dict[str, Any]:
    """What the results depend on, without names of machines or paths."""
    packages = ("vllm-dsv32", "vllm", "transformers", "tokenizers", "pydantic")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "host": {"cpu": _cpu_model(), "machine": platform.machine(), "system": platform.system()},
    }


def _compose(reasoning_parser: Any, tool_parser: Any) -> type[DelegatingParser]:
    """What vLLM's `ParserManager` makes of the two command-line options."""
    attributes = {"reasoning_parser_cls": reasoning_parser, "tool_parser_cls": tool_parser}
    return type("Parser", (DelegatingParser,), attributes)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
