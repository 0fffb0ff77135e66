"""Problems for the CUDA kernels of sparse_mla, and those kernels under the emulator."""

import ctypes

import pytest
import torch

from kernels.emulated import emulated
from kernels.inputs import latent_cache
from vllm_dsv32.kernels import cuda_library
from vllm_dsv32.layout import latent_fp8_views

SCALE = 0.04
LOG2_E = 1.4426950408889634

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of SM 90"
)
needs_library = pytest.mark.skipif(cuda_library.refusal() is not None, reason=str(cuda_library.refusal()))


def problem(num_heads, num_valid, num_slots, num_rows, block_size=64, device="cpu", cache_format="fp8_ds_mla"):
    """Rows that no token selects are NaN, and slots past the count point out of the cache."""
    torch.manual_seed(1)
    valid = torch.tensor(num_valid, dtype=torch.int32)
    slots = torch.stack([torch.randperm(num_rows)[:num_slots] for _ in num_valid]).int()
    for token, count in enumerate(num_valid):
        slots[token, count:] = 2**31 - 1
    used = slots[slots < num_rows].unique().long()
    cache = latent_cache(-(-num_rows // block_size), block_size, cache_format, gap_nbytes=64)
    at = (used // block_size, used % block_size)
    if cache_format == "fp8_ds_mla":
        views = latent_fp8_views(cache)
        codes = torch.randn(len(used), 512).to(torch.float8_e4m3fn)
        views.nope_fp8.view(torch.uint8)[at] = codes.view(torch.uint8)
        views.nope_scale[at] = torch.tensor([0.1, 1.0, 0.03, 0.5]) * (0.5 + torch.rand(len(used), 4))
        views.rope[at] = torch.randn(len(used), 64).bfloat16()
    else:
        cache[at] = torch.randn(len(used), 576).to(cache.dtype)
    q = torch.randn(len(num_valid), num_heads, 576).bfloat16()
    q[-1] *= 20  # a softmax of few keys, whose maximum moves
    return *(x.to(device) for x in (q, cache, slots, valid)), SCALE


def rounded_to_float16(cache):
    """Rows, float32 ``[num_blocks, block_size, 576]``, as the kernel for many heads decodes them.

    Scales, relative to a power of two that takes the greatest of a row to between 16 and 32, become float16, and so
    do their products with the codes.
    """
    views = latent_fp8_views(cache)
    greatest = views.nope_scale.nan_to_num(0.0).amax(-1, keepdim=True).clamp(min=2.0**-80)
    power = torch.exp2(torch.frexp(greatest).exponent.double() - 5)
    scale = (views.nope_scale.double() / power).half().double().unsqueeze(-1)
    codes = views.nope_fp8.view(torch.uint8).view(torch.float8_e4m3fn).double().unflatten(-1, (4, 128))
    latent = (codes * scale).half().double().flatten(-2) * power
    return torch.cat((latent, views.rope.double()), -1).float()


def assert_near(got, wanted):
    (out, lse), (wanted_out, wanted_lse) = got, wanted
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=2e-5)
    for group, wanted_group in zip(out.float().split(128, -1), wanted_out.split(128, -1), strict=True):
        atol = 2**-7 * float(wanted_group.abs().max())
        torch.testing.assert_close(group, wanted_group, rtol=2**-7, atol=atol)


class Arguments(ctypes.Structure):
    """SparseMlaArguments of csrc/sparse_mla_sm90.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "cache", "topk_slot", "num_valid", "out", "lse")),
        ("page_nbytes", ctypes.c_int64),
        ("scale_log2", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("num_tokens", "num_heads", "num_slots", "block_size")),
    )


def kernel_on_cpu(name, directory, *options):
    """The kernel of ``cuda_on_cpu/NAME.cpp``, on tensors for the results or on its own."""
    function = getattr(emulated(name, directory, *options), f"{name}_on_cpu")
    function.restype = ctypes.c_char_p

    def call(q, cache, slots, valid, scale, num_splits, seed=0, *, results=None):
        out, lse = results or (q.new_empty(*q.shape[:2], 512), torch.empty(q.shape[:2]))
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        tensors = (q, cache, slots, valid, out, lse)
        arguments = Arguments(
            *(x.data_ptr() for x in tensors),
            cache.stride(0) * cache.element_size(),
            scale * LOG2_E,
            *(q.shape[0], q.shape[1], slots.shape[1], cache.shape[1]),
        )
        assert function(ctypes.byref(arguments), num_splits, seed) is None
        return out, lse

    return call
