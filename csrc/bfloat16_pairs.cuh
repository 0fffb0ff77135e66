// Pairs of bfloat16 in a word, the first one in its low half.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace dsv32 {

__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ float bfloat16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bfloat16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace dsv32
