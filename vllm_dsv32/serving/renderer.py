"""The renderer of the tokenizer mode `deepseek_v32`: chat requests to prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import ConversationMessage
from vllm.renderers.inputs import DictPrompt
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.params import ChatParams
from vllm.utils.async_utils import make_async

from vllm_dsv32.errors import MessageError
from vllm_dsv32.serving.messages import read_text
from vllm_dsv32.serving.tokenizer import Dsv32Tokenizer

# Claude Code's first system line. It changes with every request and would spoil the prefix cache, so vLLM's
# own renderers drop it too.
_BILLING_LINE: Final = "x-anthropic-billing-header"


class Dsv32Renderer(BaseRenderer[Dsv32Tokenizer]):
    """Renders chat messages with `Dsv32Tokenizer.apply_chat_template`.

    vLLM's own reading of messages is left aside: it replaces malformed tool arguments by `{}` and writes into
    the request.
    """

    def __init__(self, config: VllmConfig, tokenizer: Dsv32Tokenizer | None) -> None:
        super().__init__(config, tokenizer)
        self._render_async = make_async(self._render, executor=self._executor)

    def render_messages(
        self, messages: Sequence[Mapping[str, Any]], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        """Render one history.

        Raises:
            VLLMValidationError: the history has no prompt. The client gets HTTP 400 with the reason.
        """
        return self._render(messages, params)

    async def render_messages_async(
        self, messages: Sequence[Mapping[str, Any]], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        """Like `render_messages`, off the event loop."""
        return await self._render_async(messages, params)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        kwargs = params.get_apply_chat_template_kwargs()
        if params.response_format is not None:
            kwargs.setdefault("response_format", _plain(params.response_format))
        try:
            history = [_without_billing_line(message) for message in messages]
            prompt = self.get_tokenizer().apply_chat_template(history, **kwargs)
        except MessageError as cause:
            raise VLLMValidationError(str(cause), parameter="messages") from cause
        conversation = [
            ConversationMessage(role=message["role"], content=read_text(message)) for message in history
        ]
        return conversation, parse_dec_only_prompt(prompt)


def _without_billing_line(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") != "system":
        return message
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _rest_of(content)}
    if isinstance(content, list):
        parts = [
            {**part, "text": _rest_of(part["text"])}
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            else part
            for part in content
        ]
        # A part that held nothing else is dropped.
        kept = [new for old, new in zip(content, parts, strict=True) if new == old or new["text"]]
        return {**message, "content": kept}
    return message


def _rest_of(text: str) -> str:
    return text.partition("\n")[2] if text.startswith(_BILLING_LINE) else text


def _plain(response_format: Any) -> Any:
    """OpenAI's `response_format` as plain JSON, from vLLM's pydantic model of it."""
    if isinstance(response_format, Mapping):
        return response_format
    return response_format.model_dump(by_alias=True, exclude_none=True)
