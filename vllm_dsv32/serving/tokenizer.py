"""The tokenizer mode `deepseek_v32`: the checkpoint's tokenizer with DeepSeek's prompt format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from transformers import TokenizersBackend
from vllm.tokenizers.hf import get_cached_tokenizer

from vllm_dsv32.serving.encoding import encode_messages
from vllm_dsv32.serving.thinking import wants_thinking, warn_unknown_keys


class Dsv32Tokenizer(TokenizersBackend):
    """The checkpoint's fast tokenizer; its chat template is `encoding.encode_messages`."""

    @classmethod
    def from_pretrained(
        cls, path_or_repo_id: str | Path, *args: Any, download_dir: str | None = None, **kwargs: Any
    ) -> Self:
        """Load the tokenizer, with its vocabulary and special tokens cached as vLLM expects."""
        if download_dir is not None:
            kwargs["cache_dir"] = download_dir
        return get_cached_tokenizer(super().from_pretrained(path_or_repo_id, *args, **kwargs))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        conversation: Sequence[Mapping[str, Any]] | None = None,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> str | list[int]:
        """The prompt for a chat history, as text or as token ids.

        Args:
            messages: the history of OpenAI chat messages; `conversation` is another name for it.
            tools: OpenAI tools.
            conversation: see `messages`.
            tokenize: whether to return token ids.
            kwargs: `thinking`, `enable_thinking`, `reasoning_effort` (see `thinking.wants_thinking`);
                `response_format`, `add_generation_prompt`, `continue_final_message` (see
                `encoding.encode_messages`); `truncation`, `max_length`. Others get a warning.

        Raises:
            MessageError: the history has no prompt.
        """
        warn_unknown_keys(key for key, value in kwargs.items() if value is not None)
        history = conversation if messages is None else messages
        prompt = encode_messages(
            history or (),
            tools=tools,
            response_format=kwargs.get("response_format"),
            thinking=wants_thinking(kwargs),
            add_generation_prompt=kwargs.get("add_generation_prompt"),
            continue_final_message=bool(kwargs.get("continue_final_message")),
        )
        if not tokenize:
            return prompt
        limits = {key: kwargs[key] for key in ("truncation", "max_length") if key in kwargs}
        return self.encode(prompt, add_special_tokens=False, **limits)
