"""Inputs that the kernel tests share; each implementation of the dispatch table is tested the same way."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.interpreter import teach_bfloat16
from vllm_dsv32.kernels.dispatch import KERNELS, Kernel, Problem

if not torch.cuda.is_available():
    teach_bfloat16()

CACHE_FORMATS = ("bfloat16", "float32", "fp8_ds_mla")

PROBLEM = Problem(
    device_type="cuda",
    capability=(9, 0),
    dtype=torch.bfloat16,
    cache_format="auto",
    num_heads=4,
    kv_lora_rank=512,
    rope_dim=64,
    num_index_heads=4,
    index_head_dim=128,
    topk=64,
)


INTERPRETED = ("triton", "torch")
"""Names of CUDA implementations that run without a GPU, slowly: as Python under Triton's interpreter."""


def implementations(operation: str, adapt: Callable[[Callable], Callable] = lambda kernel: kernel, **known: Any):
    """A parameter set: the implementations of an operation that run on this machine, on tensors of the CPU.

    Those that take PROBLEM with what is known of the test's inputs, such as their dtype; adapted, if a test calls
    them with other arguments.
    """
    problem = replace(PROBLEM, **known)
    rows = [kernel for kernel in KERNELS if kernel.operation == operation and runs_here(kernel, problem)]
    return pytest.mark.parametrize(
        "kernel", [adapt(on_device(row.load())) for row in rows], ids=[row.name for row in rows]
    )


def runs_here(kernel: Kernel, problem: Problem) -> bool:
    if kernel.by_name_only:
        return False  # tested in test_vendor_rows
    if torch.cuda.is_available():
        return kernel.refuse(replace(problem, capability=torch.cuda.get_device_capability())) is None
    if kernel.name in INTERPRETED:
        return kernel.refuse(problem) is None
    return kernel.refuse(replace(problem, device_type="cpu", capability=None)) is None


def on_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` on copies of its tensors in the GPU's memory, gaps and all, copied back; itself without a GPU.

    Each tensor is copied by itself: none that is written may share memory with another.
    """
    if not torch.cuda.is_available():
        return kernel

    def call(*args: Any) -> Any:
        moved = moved_to_gpu(args)
        result = kernel(*moved)
        copy_back(moved, args)
        if isinstance(result, tuple):
            return tuple(part.cpu() for part in result)
        return result if result is None else result.cpu()

    return call


def moved_to_gpu(arg: Any) -> Any:
    """A tensor's copy, or a tuple's, whose parts may be tuples; anything else itself."""
    if isinstance(arg, tuple):
        parts = map(moved_to_gpu, arg)
        return type(arg)(*parts) if hasattr(arg, "_fields") else tuple(parts)
    return cuda_copy(arg) if isinstance(arg, torch.Tensor) else arg


def copy_back(moved: Any, arg: Any) -> None:
    if isinstance(arg, tuple):
        for part, original in zip(moved, arg, strict=True):
            copy_back(part, original)
    elif isinstance(arg, torch.Tensor):
        arg.untyped_storage().copy_(moved.untyped_storage())


def cuda_copy(x: torch.Tensor) -> torch.Tensor:
    memory = torch.empty(0, dtype=x.dtype, device="cuda").set_(x.untyped_storage().cuda())
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


@contextmanager
def loading(dtype: torch.dtype) -> Iterator[None]:
    """As while vLLM loads a model of this dtype: it is torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cos_sin_cache(num_positions: int = 300, dim: int = 64, base: float = 10000.0) -> torch.Tensor:
    """float32 [num_positions, dim]: cosines, then sines."""
    angles = torch.arange(num_positions).double().unsqueeze(1) * base ** (-torch.arange(0, dim, 2).double() / dim)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def latent_cache(
    num_blocks: int, block_size: int, cache_format: str, fill: int = 0x7F, gap_nbytes: int = 0
) -> torch.Tensor:
    """A latent cache whose every byte is `fill` (0x7f: NaN in fp8, in bfloat16 and in float32)."""
    if cache_format == "fp8_ds_mla":
        return _pages(num_blocks, block_size, 656, fill, gap_nbytes)
    dtype = getattr(torch, cache_format)
    return _pages(num_blocks, block_size, 576 * dtype.itemsize, fill | 0x80, gap_nbytes).view(dtype)


def index_cache(num_blocks: int, block_size: int, fill: int = 0x7F, gap_nbytes: int = 0) -> torch.Tensor:
    """An index-key cache."""
    return _pages(num_blocks, block_size, 132, fill, gap_nbytes)


def _pages(num_blocks: int, block_size: int, row_nbytes: int, fill: int, gap_nbytes: int) -> torch.Tensor:
    """`gap_nbytes` lie between the pages, as when pages of layers are interleaved."""
    page = block_size * row_nbytes
    memory = torch.full((num_blocks, page + gap_nbytes), fill, dtype=torch.uint8)
    return memory.as_strided((num_blocks, block_size, row_nbytes), (page + gap_nbytes, row_nbytes, 1))


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> None:
    """Sentinels (NaN, -inf) exactly and first, then the values."""
    actual, expected = actual.double().cpu(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual == -math.inf, expected == -math.inf)
    finite = expected.isfinite()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=rtol, atol=atol)
