"""The one table of implementations, and the one place that chooses among them.

A row names an operation, an implementation and the problems that it refuses. :func:`select_kernels`
picks, for each operation, the first row that takes the problem, once per layer at construction.
Every implementation has the signature of the operation's reference, which is also its contract.

To add an implementation, add its row above the slower ones. Rows that are chosen by name only stand last:
what vLLM itself ships, for comparison.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from vllm_dsv32.errors import KernelUnavailableError
from vllm_dsv32.kernels import cuda_library
from vllm_dsv32.kernels.vendor.libraries import is_installed
from vllm_dsv32.layout import FP8_DS_MLA, INDEX_HEAD_DIM, KV_LORA_RANK, ROPE_DIM

__all__ = ["KERNELS", "OPERATIONS", "Kernel", "KernelSet", "Problem", "explain", "select_kernels"]

Refusal = str | None
"""Why an implementation does not take a problem; None if it does."""


@dataclass(frozen=True)
class Problem:
    """What is known of the work when a layer is built."""

    device_type: str
    """As in ``torch.device.type``."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None off CUDA."""
    dtype: torch.dtype
    """The model's."""
    cache_format: str
    """"auto" (the model's dtype) or "fp8_ds_mla"."""
    num_heads: int
    """Attention heads on this rank."""
    kv_lora_rank: int
    rope_dim: int
    num_index_heads: int
    index_head_dim: int
    topk: int


@dataclass(frozen=True)
class Kernel:
    """One row of the table."""

    operation: str
    name: str
    target: str
    """``module:function``; imported when chosen, so that a row costs nothing where it is refused."""
    refuse: Callable[[Problem], Refusal]
    graph_capturable: bool
    """Whether a call neither synchronises with the host nor depends on the addresses of a past call."""
    by_name_only: bool = False
    """Chosen on request and never otherwise."""

    def load(self) -> Callable[..., Any]:
        """Import the implementation."""
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(module), function)

    def scratch_nbytes(self) -> int:
        """Import the implementation; what a call of it takes and gives back, beside what grows with the tokens."""
        module, _, _ = self.target.partition(":")
        return getattr(importlib.import_module(module), "SCRATCH_NBYTES", 0)


@dataclass(frozen=True)
class KernelSet:
    """The chosen implementation of each operation; see the module of that name for its contract."""

    token_keys: Callable[..., None]
    keys_and_queries: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    index_logits: Callable[..., torch.Tensor]
    topk_select: Callable[..., None]
    sparse_mla: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    mla_output: Callable[..., None]
    names: Mapping[str, str]
    """Operation to the name of what was chosen."""
    graph_capturable: bool
    """Whether all of them are."""
    scratch_nbytes: Mapping[str, int]
    """Operation to what a call of it takes and gives back, at most, beside what grows with the tokens."""


_OF_ALL = ("names", "graph_capturable", "scratch_nbytes")
OPERATIONS = tuple(field.name for field in fields(KernelSet) if field.name not in _OF_ALL)


def _reference_refuses(problem: Problem) -> Refusal:
    """The references know the two cache layouts of :mod:`vllm_dsv32.layout` and no others."""
    if (problem.kv_lora_rank, problem.rope_dim) != (KV_LORA_RANK, ROPE_DIM):
        return (
            f"takes kv_lora_rank {KV_LORA_RANK} and qk_rope_head_dim {ROPE_DIM}, "
            f"got {problem.kv_lora_rank} and {problem.rope_dim}"
        )
    if problem.index_head_dim != INDEX_HEAD_DIM:
        return f"takes index_head_dim {INDEX_HEAD_DIM}, got {problem.index_head_dim}"
    if problem.cache_format not in ("auto", FP8_DS_MLA):
        return f"takes the cache formats auto and {FP8_DS_MLA}, got {problem.cache_format}"
    return None


_TRITON_CAPABILITY = (8, 0)


def _cuda_refuses(problem: Problem) -> Refusal:
    """What can be captured in a graph but is slower on a CPU than the reference."""
    if problem.device_type != "cuda":
        return f"takes CUDA devices, got {problem.device_type}"
    return _reference_refuses(problem)


def _triton_refuses(problem: Problem) -> Refusal:
    """The Triton kernels need bfloat16 tensor cores and are written for the types that the model is served in."""
    refusal = _cuda_refuses(problem)
    if refusal is not None:
        return refusal
    if problem.capability is None or problem.capability < _TRITON_CAPABILITY:
        wanted, got = (_dotted(capability) for capability in (_TRITON_CAPABILITY, problem.capability))
        return f"takes compute capability {wanted} or above, got {got}"
    if problem.dtype not in (torch.bfloat16, torch.float32):
        return f"takes models in bfloat16 or float32, got {problem.dtype}"
    return None


_TRITON_TOPK = 2048


def _triton_topk_refuses(problem: Problem) -> Refusal:
    """What is selected has to fit the registers."""
    refusal = _triton_refuses(problem)
    if refusal is None and problem.topk > _TRITON_TOPK:
        return f"takes a top-k of at most {_TRITON_TOPK}, got {problem.topk}"
    return refusal


_GLUON_CAPABILITY = (9, 0)
_GLUON_INDEX_HEADS = 64
_TRITON_FP8_HEADS = range(17, 33)
"""Too many for Gluon's narrow kernel, and too few for its wide one to be faster than Triton's."""


def _gluon_refuses(problem: Problem) -> Refusal:
    """Kernels that are written for one generation of tensor cores."""
    refusal = _triton_refuses(problem)
    if refusal is None and problem.capability != _GLUON_CAPABILITY:
        return f"takes compute capability {_dotted(_GLUON_CAPABILITY)}, got {_dotted(problem.capability)}"
    return refusal


def _gluon_index_logits_refuses(problem: Problem) -> Refusal:
    refusal = _gluon_refuses(problem)
    if refusal is None and problem.num_index_heads != _GLUON_INDEX_HEADS:
        return f"takes {_GLUON_INDEX_HEADS} index heads, got {problem.num_index_heads}"
    return refusal


def _gluon_sparse_mla_refuses(problem: Problem) -> Refusal:
    refusal = _gluon_refuses(problem)
    if refusal is not None:
        return refusal
    if problem.dtype != torch.bfloat16:
        return f"takes models in bfloat16, got {problem.dtype}"
    if problem.cache_format == FP8_DS_MLA and problem.num_heads in _TRITON_FP8_HEADS:
        most, least = _TRITON_FP8_HEADS.start - 1, _TRITON_FP8_HEADS.stop
        return f"takes up to {most} heads, or {least} and more, with {FP8_DS_MLA}, got {problem.num_heads}"
    return None


def _library_kernel_refuses(problem: Problem) -> Refusal:
    """Kernels that were compiled ahead of time, for one GPU, if they were."""
    refusal = _cuda_refuses(problem)
    if refusal is not None:
        return refusal
    if problem.capability != cuda_library.CAPABILITY:
        return f"takes compute capability {_dotted(cuda_library.CAPABILITY)}, got {_dotted(problem.capability)}"
    return cuda_library.refusal()


def _cuda_index_logits_refuses(problem: Problem) -> Refusal:
    """What Gluon refuses too, to which few rows a request are left."""
    refusal = _library_kernel_refuses(problem)
    return _gluon_index_logits_refuses(problem) if refusal is None else refusal


_CUDA_TOPK = 2048


def _cuda_topk_refuses(problem: Problem) -> Refusal:
    if problem.topk > _CUDA_TOPK:
        return f"takes a top-k of at most {_CUDA_TOPK}, got {problem.topk}"
    return _library_kernel_refuses(problem)


_CUDA_BFLOAT16_HEADS = 33
"""With a bfloat16 cache there is a kernel for so many heads and more."""


def _cuda_attention_refuses(problem: Problem) -> Refusal:
    if problem.dtype != torch.bfloat16:
        return f"takes models in bfloat16, got {problem.dtype}"
    if problem.cache_format == "auto" and problem.num_heads < _CUDA_BFLOAT16_HEADS:
        return f"takes {_CUDA_BFLOAT16_HEADS} heads and more with the cache format auto, got {problem.num_heads}"
    return _library_kernel_refuses(problem)


_UNION_HEADS = 16
_UNION_TOPK = 2048


def _union_attention_refuses(problem: Problem) -> Refusal:
    """Four tokens at a time: their heads fill a block."""
    if problem.dtype != torch.bfloat16:
        return f"takes models in bfloat16, got {problem.dtype}"
    if problem.num_heads != _UNION_HEADS:
        return f"takes {_UNION_HEADS} heads, got {problem.num_heads}"
    if problem.topk > _UNION_TOPK:
        return f"takes a top-k of at most {_UNION_TOPK}, got {problem.topk}"
    return _library_kernel_refuses(problem)


def _dotted(capability: tuple[int, int] | None) -> str:
    return "unknown" if capability is None else ".".join(map(str, capability))


def _cuda(operation: str, refuse: Callable[[Problem], Refusal]) -> Kernel:
    target = f"vllm_dsv32.kernels.{operation}_cuda:{operation}"
    return Kernel(operation, "cuda", target, refuse, graph_capturable=True)


def _triton(operation: str, refuse: Callable[[Problem], Refusal] = _triton_refuses) -> Kernel:
    target = f"vllm_dsv32.kernels.{operation}_triton:{operation}"
    return Kernel(operation, "triton", target, refuse, graph_capturable=True)


def _gluon(operation: str, refuse: Callable[[Problem], Refusal]) -> Kernel:
    target = f"vllm_dsv32.kernels.{operation}_gluon:{operation}"
    return Kernel(operation, "gluon", target, refuse, graph_capturable=True)


def _reference(operation: str) -> Kernel:
    target = f"vllm_dsv32.kernels.{operation}:reference"
    return Kernel(operation, "reference", target, _reference_refuses, graph_capturable=False)


def _library_refuses(problem: Problem, *modules: str) -> Refusal:
    """Kernels in any of the libraries that vLLM's wheel for CUDA has and others lack."""
    refusal = _cuda_refuses(problem)
    if refusal is None and not any(is_installed(module) for module in modules):
        return f"needs {' or '.join(modules)}, which is not installed; vLLM's wheel for CUDA has it"
    return refusal


def _hopper_refuses(problem: Problem, *modules: str) -> Refusal:
    if problem.device_type == "cuda" and (problem.capability is None or problem.capability[0] != 9):
        return f"takes compute capability 9.0, got {_dotted(problem.capability)}"
    return _library_refuses(problem, *modules)


def _deep_gemm_refuses(problem: Problem) -> Refusal:
    if problem.num_index_heads not in (32, 64):
        return f"takes 32 or 64 index heads, got {problem.num_index_heads}"
    return _hopper_refuses(problem, "vllm.third_party.deep_gemm", "deep_gemm")


def _vllm_topk_refuses(problem: Problem) -> Refusal:
    if problem.topk not in (512, 1024, 2048):
        return f"takes a top-k of 512, 1024 or 2048, got {problem.topk}"
    return _library_refuses(problem, "vllm._C_stable_libtorch")


def _flash_mla_refuses(problem: Problem) -> Refusal:
    if problem.cache_format != FP8_DS_MLA:
        return f"takes the cache format {FP8_DS_MLA}, got {problem.cache_format}"
    if problem.dtype != torch.bfloat16:
        return f"takes models in bfloat16, got {problem.dtype}"
    if problem.num_heads > 128:
        return f"takes at most 128 heads, got {problem.num_heads}"
    if problem.topk % 64:
        return f"takes a top-k that is a multiple of 64, got {problem.topk}"
    return _hopper_refuses(problem, "vllm._flashmla_C")


def _flash_attn3_refuses(problem: Problem) -> Refusal:
    if problem.cache_format != "auto" or problem.dtype != torch.bfloat16:
        return f"takes the cache format auto in bfloat16, got {problem.cache_format} in {problem.dtype}"
    return _hopper_refuses(problem, "vllm.vllm_flash_attn._vllm_fa3_C")


def _vendor(operation: str, name: str, refuse: Callable[[Problem], Refusal]) -> Kernel:
    target = f"vllm_dsv32.kernels.vendor.{name}_{operation}:{operation}"
    return Kernel(operation, name, target, refuse, graph_capturable=True, by_name_only=True)


KERNELS: list[Kernel] = [
    _triton("token_keys"),
    _triton("keys_and_queries"),
    _cuda("index_logits", _cuda_index_logits_refuses),
    _gluon("index_logits", _gluon_index_logits_refuses),
    _triton("index_logits"),
    _cuda("topk_select", _cuda_topk_refuses),
    _triton("topk_select", _triton_topk_refuses),
    Kernel(
        operation="sparse_mla",
        name="union",
        target="vllm_dsv32.kernels.sparse_mla_cuda_union:sparse_mla",
        refuse=_union_attention_refuses,
        graph_capturable=True,
    ),
    _cuda("sparse_mla", _cuda_attention_refuses),
    _gluon("sparse_mla", _gluon_sparse_mla_refuses),
    _triton("sparse_mla"),
    Kernel(
        operation="mla_output",
        name="torch",
        target="vllm_dsv32.kernels.mla_output_torch:mla_output",
        refuse=_cuda_refuses,
        graph_capturable=True,
    ),
    *(_reference(operation) for operation in OPERATIONS),
    _vendor("index_logits", "deep_gemm", _deep_gemm_refuses),
    _vendor("topk_select", "vllm", _vllm_topk_refuses),
    _vendor("sparse_mla", "flash_mla", _flash_mla_refuses),
    _vendor("sparse_mla", "flash_attn3", _flash_attn3_refuses),
]
"""The first row of an operation that takes a problem, and need not be named, is chosen."""


def explain(operation: str, problem: Problem) -> list[tuple[Kernel, Refusal]]:
    """Each implementation of an operation, in the order of preference, with its refusal of the problem or None."""
    return [(kernel, kernel.refuse(problem)) for kernel in KERNELS if kernel.operation == operation]


def select_kernels(problem: Problem, overrides: Mapping[str, str] | None = None) -> KernelSet:
    """Choose an implementation for every operation.

    Args:
        problem: what has to be computed, and where.
        overrides: operation to the name of the implementation that the user insists on.

    Raises:
        KernelUnavailableError: an operation has no implementation that takes the problem, or the one
            insisted on does not exist or refuses; the message gives each one's reason.
    """
    overrides = overrides or {}
    unknown = sorted(set(overrides) - set(OPERATIONS))
    if unknown:
        raise KernelUnavailableError(
            f"no operation is called {', '.join(unknown)}; the operations are {', '.join(OPERATIONS)}"
        )
    chosen = {operation: _choose(operation, problem, overrides.get(operation)) for operation in OPERATIONS}
    return KernelSet(
        **{operation: kernel.load() for operation, kernel in chosen.items()},
        names={operation: kernel.name for operation, kernel in chosen.items()},
        graph_capturable=all(kernel.graph_capturable for kernel in chosen.values()),
        scratch_nbytes={operation: kernel.scratch_nbytes() for operation, kernel in chosen.items()},
    )


def _choose(operation: str, problem: Problem, wanted: str | None) -> Kernel:
    rows = explain(operation, problem)
    for kernel, refusal in rows:
        if refusal is None and (kernel.name == wanted or (wanted is None and not kernel.by_name_only)):
            return kernel
    asked = f" called {wanted}" if wanted else ""
    reasons = "; ".join(f"{kernel.name}: {refusal or 'would take it'}" for kernel, refusal in rows)
    raise KernelUnavailableError(f"no implementation of {operation}{asked} takes {problem}: {reasons}")
