// How queries and weights keep within the range of float16, which rows are decoded to: for both kernels of sparse_mla.
#pragma once

#include "bfloat16_pairs.cuh"
#include "ptx.cuh"

namespace dsv32 {

// A key whose scales are all less counts as if one were this. Sums of weights stay in the range of float32.
constexpr float kLeastScale = 8.271806125530277e-25f;  // 2^-80

// Of exponents from -126 to 127.
__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float((exponent + 127) << 23); }
__device__ __forceinline__ int exponent_of(float positive) {
  return static_cast<int>(__float_as_uint(positive) >> 23) - 127;
}

// By what the latent part of a head's queries is multiplied: a power of two that takes the greatest to 2^14 or more.
// So none overflows, and what is not exact any more is less than 2^-31 of the greatest, by at most 2^-39 of it.
__device__ __forceinline__ int exponent_for_queries(float greatest) {
  // At most 2^126: queries that are less than 2^-112 become less than 2^14.
  return min(14 - exponent_of(greatest), 126);
}

// An infinity stays one, and the scores of its head become NaN; so does NaN.
__device__ __forceinline__ uint32_t float16_of_queries(uint32_t pair, float factor) {
  return pack_float16(bfloat16_low(pair) * factor, bfloat16_high(pair) * factor);
}

}  // namespace dsv32
