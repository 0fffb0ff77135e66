"""Inputs that the kernel tests share; each implementation of the dispatch table is tested the same way."""

import math

import pytest
import torch

from vllm_dsv32.kernels.dispatch import KERNELS, Problem

CACHE_FORMATS = ("bfloat16", "float32", "fp8_ds_mla")


def implementations(operation: str):
    """A parameter set: the implementations of an operation that run on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(
        device_type=device,
        capability=torch.cuda.get_device_capability() if device == "cuda" else None,
        dtype=torch.bfloat16,
        cache_format="auto",
        num_heads=4,
        kv_lora_rank=512,
        rope_dim=64,
        num_index_heads=4,
        index_head_dim=128,
        topk=64,
    )
    rows = [kernel for kernel in KERNELS if kernel.operation == operation and kernel.refuse(problem) is None]
    return pytest.mark.parametrize("kernel", [row.load() for row in rows], ids=[row.name for row in rows])


def cos_sin_cache(num_positions: int = 300, dim: int = 64, base: float = 10000.0) -> torch.Tensor:
    """float32 [num_positions, dim]: cosines, then sines."""
    angles = torch.arange(num_positions).double().unsqueeze(1) * base ** (-torch.arange(0, dim, 2).double() / dim)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def latent_cache(num_blocks: int, block_size: int, cache_format: str, fill: int = 0x7F) -> torch.Tensor:
    """A latent cache whose every byte is `fill` (0x7f: NaN in fp8, in bfloat16 and in float32)."""
    if cache_format == "fp8_ds_mla":
        return torch.full((num_blocks, block_size, 656), fill, dtype=torch.uint8)
    dtype = getattr(torch, cache_format)
    nbytes = 576 * torch.finfo(dtype).bits // 8
    return torch.full((num_blocks, block_size, nbytes), fill | 0x80, dtype=torch.uint8).view(dtype)


def index_cache(num_blocks: int, block_size: int, fill: int = 0x7F, gap_nbytes: int = 0) -> torch.Tensor:
    """An index-key cache; `gap_nbytes` lie between its pages, as when pages of layers are interleaved."""
    page = block_size * 132
    memory = torch.full((num_blocks, page + gap_nbytes), fill, dtype=torch.uint8)
    return memory.as_strided((num_blocks, block_size, 132), (page + gap_nbytes, 132, 1))


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> None:
    """Sentinels (NaN, -inf) exactly and first, then the values."""
    actual, expected = actual.double().cpu(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual == -math.inf, expected == -math.inf)
    finite = expected.isfinite()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=rtol, atol=atol)
