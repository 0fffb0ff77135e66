"""The class that answers for DeepSeek-V3.2 in a vLLM that the plugin was not tested with."""

from typing import Any, NoReturn

import torch

from vllm_dsv32 import compat
from vllm_dsv32.errors import UnsupportedVllmError

__all__ = ["RefusedModel"]


class RefusedModel(torch.nn.Module):
    """Looks like a text-generation model to vLLM's inspection, and refuses to be built."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        raise UnsupportedVllmError(compat.unsupported_reason() or "vllm-dsv32: this vLLM is supported")

    def embed_input_ids(self, input_ids: torch.Tensor) -> NoReturn:
        """Part of the interface that vLLM inspects."""
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, **_: Any) -> NoReturn:
        """Part of the interface that vLLM inspects."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: torch.Tensor) -> NoReturn:
        """Part of the interface that vLLM inspects."""
        raise NotImplementedError
