"""Attention depends on the batch, so pieces of CUDA graphs have to end before it."""

from collections.abc import Callable
from typing import Any

from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
from vllm.config import CUDAGraphMode

from vllm_dsv32.errors import ConfigError

__all__ = ["require_graph_break"]


def require_graph_break(forward: Callable[..., Any], cudagraph_mode: CUDAGraphMode | None) -> None:
    """Refuse what was to be decorated with ``eager_break_during_capture`` and was not.

    Before 0.33 it decorates only if vLLM's variable is set when it is applied, and vLLM sets it with the
    configuration of a model. What was imported earlier would be captured, with the batch of the capture, and read
    memory that is long gone.

    Args:
        forward: of a layer.
        cudagraph_mode: of the engine.

    Raises:
        ConfigError: it is not decorated, and graphs would be captured in pieces.
    """
    in_pieces = cudagraph_mode is not None and cudagraph_mode.has_piecewise_cudagraphs()
    if in_pieces and is_breakable_cudagraph_enabled() and not hasattr(forward, "__wrapped__"):
        raise ConfigError(
            f"{forward.__module__} was imported before vLLM's configuration was made, and CUDA graphs would be "
            "captured without a break at attention; set VLLM_USE_BREAKABLE_CUDAGRAPH=1 before the import, or "
            "import it later"
        )
