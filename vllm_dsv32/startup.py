"""Defaults of vLLM under which a start compiles for minutes, and what V3.2 engines get instead.

Compiling at run time also needs nvcc, which many images do not have. Each default is changed only where the
user left it alone, is logged, and comes back as its row says. Variables stay set for the process, so another
model that the same process loads later has them too.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import KernelConfig, VllmConfig

__all__ = ["Change", "changes", "shorten_startup"]

logger = init_logger("vllm.plugins.dsv32")

_FP8_BLOCK = "fp8_block_w8a8"
"""vLLM's name of the scheme of DeepSeek's weights."""

_JIT_LINEAR_CAPABILITIES = (9, 10)
"""Major capabilities on which vLLM takes GEMMs for it that are compiled on first use."""


@dataclass(frozen=True)
class Change:
    """One default that is changed."""

    setting: str
    value: str
    reason: str
    undo: str


_WARMUP = Change(
    setting="VLLM_DEEP_GEMM_WARMUP",
    value="skip",
    reason="it compiles every DeepGEMM kernel that this model could use, thousands",
    undo="VLLM_DEEP_GEMM_WARMUP=relax",
)
_SAMPLER = Change(
    setting="VLLM_USE_FLASHINFER_SAMPLER",
    value="0",
    reason="flashinfer-jit-cache is not installed, and compiling FlashInfer's sampler takes minutes",
    undo="VLLM_USE_FLASHINFER_SAMPLER=1",
)
_LINEAR = Change(
    setting="--linear-backend",
    value="cutlass",
    reason="the GEMMs that vLLM would take for fp8 block weights are compiled on first use, for minutes",
    undo="--linear-backend flashinfer_cutlass",
)


def changes(kernel_config: "KernelConfig", capability: tuple[int, int] | None) -> list[Change]:
    """What to change for an engine.

    Args:
        kernel_config: what the user chose.
        capability: CUDA compute capability; None off CUDA, where nothing is compiled.
    """
    if capability is None:
        return []
    wanted = []
    if _WARMUP.setting not in os.environ:
        wanted.append(_WARMUP)
    if _SAMPLER.setting not in os.environ and importlib.util.find_spec("flashinfer_jit_cache") is None:
        wanted.append(_SAMPLER)
    chosen = kernel_config.linear_backend != "auto" or _FP8_BLOCK in (kernel_config.linear_backend_per_quant or {})
    if capability[0] in _JIT_LINEAR_CAPABILITIES and not chosen:
        wanted.append(_LINEAR)
    return wanted


def shorten_startup(vllm_config: "VllmConfig") -> None:
    """Apply :func:`changes`; vLLM's own processes inherit the environment."""
    from vllm.platforms import current_platform

    found = current_platform.get_device_capability() if current_platform.is_cuda() else None
    capability = None if found is None else (found.major, found.minor)
    kernels = vllm_config.kernel_config
    for change in changes(kernels, capability):
        if change is _LINEAR:
            kernels.linear_backend_per_quant = {**(kernels.linear_backend_per_quant or {}), _FP8_BLOCK: "cutlass"}
        else:
            os.environ[change.setting] = change.value
        logger.info_once(
            "vllm-dsv32 sets %s to %s: %s. To undo it: %s",
            change.setting,
            change.value,
            change.reason,
            change.undo,
        )
