"""The conversions inside Triton kernels, against torch's on every byte and on every number that is hard."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.inputs import on_device
from vllm_dsv32.kernels.fp8 import AMAX_FLOOR, quantise_amax, quantise_ue8m0
from vllm_dsv32.kernels.triton_fp8 import (
    abs_max,
    amax_scale,
    decode_e4m3,
    decode_e4m3_bf16,
    encode_e4m3,
    larger,
    power_of_two_reciprocal,
    ue8m0_scale,
)

DECODED = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
FINITE = DECODED.isfinite()


@triton.jit
def _decode_kernel(byte_ptr, fp32_ptr, bf16_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    byte = tl.load(byte_ptr + at)
    tl.store(fp32_ptr + at, decode_e4m3(byte))
    tl.store(bf16_ptr + at, decode_e4m3_bf16(byte))


@triton.jit
def _encode_kernel(x_ptr, byte_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(byte_ptr + at, encode_e4m3(tl.load(x_ptr + at)))


@triton.jit
def _scales_kernel(amax_ptr, amax_scale_ptr, ue8m0_scale_ptr, reciprocal_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    amax = tl.load(amax_ptr + at)
    tl.store(amax_scale_ptr + at, amax_scale(amax))
    tl.store(ue8m0_scale_ptr + at, ue8m0_scale(amax))
    tl.store(reciprocal_ptr + at, power_of_two_reciprocal(ue8m0_scale(amax)))


@triton.jit
def _reduce_kernel(x_ptr, abs_max_ptr, larger_ptr, SIZE: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * SIZE + tl.arange(0, SIZE))
    tl.store(abs_max_ptr + row, abs_max(x, 0))
    flipped = tl.load(x_ptr + row * SIZE + SIZE - 1 - tl.arange(0, SIZE))
    tl.store(larger_ptr + row * SIZE + tl.arange(0, SIZE), larger(x, flipped))


def launch(kernel, *tensors, size: int) -> None:
    def call(*args):
        kernel[(args[0].numel() // size,)](*args, SIZE=size)

    on_device(call)(*tensors)


def test_every_byte_is_decoded_exactly():
    fp32, bf16 = torch.empty(256), torch.empty(256, dtype=torch.bfloat16)
    launch(_decode_kernel, torch.arange(256, dtype=torch.uint8), fp32, bf16, size=256)
    assert torch.equal(fp32[FINITE], DECODED[FINITE])
    assert torch.equal(bf16[FINITE], DECODED[FINITE].bfloat16())
    assert torch.equal(fp32[FINITE].signbit(), DECODED[FINITE].signbit())
    assert fp32[~FINITE].tolist() == [480.0, -480.0]


def neighbours(x: torch.Tensor) -> torch.Tensor:
    infinity = torch.tensor(torch.inf)
    return torch.cat((x, x.nextafter(infinity), x.nextafter(-infinity)))


def padded(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, -len(x) % size))


def test_rounding_is_to_the_nearest_and_to_even_between_two(generator):
    values = DECODED[FINITE].sort().values
    middles = (values[1:] + values[:-1]) / 2
    rare = torch.tensor([0.0, -0.0, 1e-45, 1e-30, 449.0, 464.0, 1e9, 3e38, torch.inf, -torch.inf])
    spread = torch.randn(4096, generator=generator) * torch.exp(4 * torch.randn(4096, generator=generator))
    x = padded(torch.cat((neighbours(values), neighbours(middles), rare, spread)), 1024)
    byte = torch.empty(x.shape, dtype=torch.uint8)
    launch(_encode_kernel, x, byte, size=1024)
    assert torch.equal(byte, x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


def test_nan_is_encoded_as_nan():
    byte = torch.empty(2, dtype=torch.uint8)
    launch(_encode_kernel, torch.tensor([torch.nan, -torch.nan]), byte, size=2)
    assert bool(byte.view(torch.float8_e4m3fn).float().isnan().all())


def test_scales_are_those_of_torch(generator):
    powers = 2.0 ** torch.arange(-20, 100)
    amax = torch.cat((neighbours(448 * powers), neighbours(powers), neighbours(torch.tensor([AMAX_FLOOR, 1e-30]))))
    spread = torch.exp(8 * torch.randn(1024, generator=generator))
    amax = padded(torch.cat((amax, spread)), 1024)
    plain, power, reciprocal = (torch.empty_like(amax) for _ in range(3))
    launch(_scales_kernel, amax, plain, power, reciprocal, size=1024)
    assert torch.equal(plain, quantise_amax(amax.unsqueeze(-1))[1])
    assert torch.equal(power, quantise_ue8m0(amax.unsqueeze(-1))[1])
    assert torch.equal(reciprocal, 1 / power)


def test_scales_of_nan_are_nan():
    """Whatever its bits: codes of NaN are decoded as numbers where GPUs know no fp8."""
    amax = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x7FE00000], dtype=torch.int32).view(torch.float32)
    scales = [torch.zeros_like(amax) for _ in range(3)]
    launch(_scales_kernel, amax, *scales, size=4)
    assert all(bool(scale.isnan().all()) for scale in scales)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, 3.0])
def test_reductions_pass_nan_on(value):
    x = torch.tensor([[0.5, -2.0, value, 0.0], [0.5, -2.0, 1.0, 0.0]])
    reduced, pairwise = torch.empty(2), torch.empty(2, 4)
    launch(_reduce_kernel, x, reduced, pairwise, size=4)
    assert torch.equal(reduced.nan_to_num(nan=-1), x.abs().amax(-1).nan_to_num(nan=-1))
    assert torch.equal(pairwise.nan_to_num(nan=-1), torch.maximum(x.abs(), x.abs().flip(1)).nan_to_num(nan=-1))
