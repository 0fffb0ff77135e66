"""Whether a request thinks: one decision for all who need it.

The prompt (`tokenizer`), the reasoning parser and, through it, structured output all ask
`wants_thinking`; nothing else reads the keys it reads.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from vllm.logger import init_logger

# vLLM formats the loggers below its own only.
logger = init_logger("vllm.plugins.dsv32.serving")

_FLAGS = ("thinking", "enable_thinking")
_EFFORT = "reasoning_effort"
_NO_EFFORT = "none"

# What `apply_chat_template` reads besides, or what vLLM's server passes along to every tokenizer.
_PLUMBING = frozenset(
    {
        "add_generation_prompt",
        "add_special_tokens",
        "cohere_format",
        "continue_final_message",
        "max_length",
        "padding",
        "response_format",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tools",
        "truncation",
    }
)
_KNOWN = _PLUMBING.union(_FLAGS, (_EFFORT,))


def wants_thinking(chat_template_kwargs: Mapping[str, Any] | None) -> bool:
    """Whether the model is asked to think, from the request's effective `chat_template_kwargs`.

    `thinking`, `enable_thinking` and `reasoning_effort` each say on, off or (absent, or None) nothing;
    `reasoning_effort` says off by "none" and on by anything else. One that says off wins, so a client can
    switch off what the server's defaults switched on, whichever key either of them uses. With nothing
    said, the model does not think: DeepSeek's own default.
    """
    kwargs = chat_template_kwargs or {}
    votes = [_flag(kwargs[key]) for key in _FLAGS if kwargs.get(key) is not None]
    if (effort := kwargs.get(_EFFORT)) is not None:
        votes.append(str(effort).lower() != _NO_EFFORT)
    return bool(votes) and all(votes)


def warn_unknown_keys(chat_template_kwargs: Iterable[str]) -> None:
    """Log one warning for each key that no part of the prompt reads, once per process."""
    for key in chat_template_kwargs:
        if key not in _KNOWN:
            logger.warning_once(
                "chat_template_kwargs: DeepSeek-V3.2 does not read %s, so it has no effect. It reads %s.",
                repr(key)[:100],
                ", ".join((*_FLAGS, _EFFORT)),
            )


def _flag(value: object) -> bool:
    """A truth value as clients write it: a bool, "true"/"false", or DeepSeek's {"type": "enabled"}."""
    if isinstance(value, Mapping):
        return value.get("type") != "disabled"
    if isinstance(value, str):
        return value.strip().lower() not in ("", "0", "false", "no", "off", "disabled", _NO_EFFORT)
    return bool(value)
