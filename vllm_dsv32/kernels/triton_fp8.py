"""Quantisation to fp8 e4m3 inside Triton kernels, in integer arithmetic that every GPU from SM80 on can do.

Caches hold bytes: Triton knows the type ``float8e4nv`` from SM89 on only. The functions agree with
:mod:`vllm_dsv32.kernels.fp8` to the bit on the same inputs.

NaN: an encoded NaN is the code 0x7f, but decoding knows no NaN (0x7f gives 480), because rows that were
quantised from NaN are NaN by their scale: :func:`abs_max` passes NaN on.
"""

import triton
import triton.language as tl

from vllm_dsv32.kernels.fp8 import AMAX_FLOOR
from vllm_dsv32.layout import FP8_MAX

__all__ = [
    "abs_max",
    "amax_scale",
    "decode_e4m3",
    "decode_e4m3_bf16",
    "encode_e4m3",
    "larger",
    "power_of_two_reciprocal",
    "ue8m0_scale",
]

_FP8_MAX = tl.constexpr(FP8_MAX)
_AMAX_FLOOR = tl.constexpr(AMAX_FLOOR)
_SIGN_AND_MAGNITUDE = tl.constexpr(0x87F00000 - 2**32)
_TWO_POW_120 = tl.constexpr(2.0**120)
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
# Adding it leaves a float32 no bits below 2^-9, the step of e4m3's subnormals.
_SUBNORMAL_ROUNDER = tl.constexpr(2.0**14)


@triton.jit
def decode_e4m3(byte: tl.tensor) -> tl.tensor:
    """uint8 to float32, exactly.

    The seven bits of a magnitude, seen as a float32's exponent and mantissa, are the value times 2^-120;
    so they are for subnormals, as float32 multiplication does not flush them.
    """
    # Extending the sign first puts both parts in place with a single shift.
    bits = (byte.to(tl.int8, bitcast=True).to(tl.int32) << 20) & _SIGN_AND_MAGNITUDE
    return bits.to(tl.float32, bitcast=True) * _TWO_POW_120


@triton.jit
def decode_e4m3_bf16(byte: tl.tensor) -> tl.tensor:
    """uint8 to bfloat16, exactly: bfloat16 holds every e4m3 value."""
    return decode_e4m3(byte).to(tl.bfloat16)


@triton.jit
def encode_e4m3(x: tl.tensor) -> tl.tensor:
    """float32 to uint8: nearest, ties to even; saturates at 448; NaN gives 0x7f or 0xff."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(x), _FP8_MAX)
    normal = magnitude.to(tl.int32, bitcast=True)
    normal = ((normal + 0x7FFFF + ((normal >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (magnitude + _SUBNORMAL_ROUNDER).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < _SMALLEST_NORMAL, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def abs_max(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The largest magnitude of float32 values, NaN if one of them is: as integers, NaN is above infinity."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def larger(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """The larger magnitude of each two float32 values, NaN if one of them is."""
    return tl.maximum(tl.abs(x), tl.abs(y), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def amax_scale(amax: tl.tensor) -> tl.tensor:
    """``amax / 448``, rounded as in IEEE 754; rows of tiny values are quantised as if amax were the floor."""
    return tl.div_rn(_floored(amax), _FP8_MAX)


@triton.jit
def ue8m0_scale(amax: tl.tensor) -> tl.tensor:
    """``amax / 448`` rounded up to a power of two, exactly; NaN for NaN.

    448 is 1.75 * 2^8: what is added to amax carries into its exponent just where the mantissa exceeds 1.75.
    """
    bits = _floored(amax).to(tl.int32, bitcast=True)
    scale = (((bits + 0x1FFFFF) & 0x7F800000) - (8 << 23)).to(tl.float32, bitcast=True)
    return tl.where(amax != amax, amax, scale)


@triton.jit
def power_of_two_reciprocal(scale: tl.tensor) -> tl.tensor:
    """``1 / scale`` for a power of two whose reciprocal is normal, exactly; multiplying by it divides exactly."""
    reciprocal = ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(scale != scale, scale, reciprocal)


@triton.jit
def _floored(amax: tl.tensor) -> tl.tensor:
    return tl.where(amax < _AMAX_FLOOR, _AMAX_FLOOR, amax)
