// Queries as operands of the products of scores, in registers.
//
// Their latent part becomes float16, since that is what e4m3 is decoded to, times a power of two for each head. The
// rotary part stays bfloat16, as rows have it.
#pragma once

#include "sparse_mla_block.cuh"
#include "sparse_mla_float16.cuh"

namespace dsv32 {

// What a lane holds of the first operand of each step.
using Queries = uint32_t[kSteps][4];

// In bfloat16; zeros for heads that do not exist.
__device__ __forceinline__ void load_query(uint32_t (&a)[4], const SparseMlaArguments& p, const Work& work, int step,
                                           int lane) {
  const int g = lane / 4, t = lane % 4;
  const auto q = static_cast<const uint16_t*>(p.q) +
                 (static_cast<int64_t>(work.token) * p.num_heads + work.first_head) * kLatentDim;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = g + 8 * half;
    const uint16_t* row = q + head * kLatentDim + step * 16;
    a[half] = a[half + 2] = 0;
    if (head >= work.num_heads) {
      continue;
    }
    if (step < kLatentSteps) {
      const uint2 four = *reinterpret_cast<const uint2*>(row + 4 * t);
      a[half] = four.x;
      a[half + 2] = four.y;
    } else {
      a[half] = *reinterpret_cast<const uint32_t*>(row + 2 * t);
      a[half + 2] = *reinterpret_cast<const uint32_t*>(row + 2 * t + 8);
    }
  }
}

// The latent part of heads g and g + 8 to float16; back[i] undoes the factor.
__device__ __forceinline__ void latent_to_float16(Queries& queries, float (&back)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t magnitudes = 0;  // of even and of odd dimensions
#pragma unroll
    for (int step = 0; step < kLatentSteps; ++step) {
#pragma unroll
      for (int i = half; i < 4; i += 2) {
        magnitudes = max_with_magnitude(magnitudes, queries[step][i]);
      }
    }
    float greatest = fmaxf(bfloat16_low(magnitudes), bfloat16_high(magnitudes));
    greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, 1));
    greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, 2));
    const int exponent = exponent_for_queries(greatest);
    const float forth = power_of_two(exponent);
    back[half] = power_of_two(-exponent);
#pragma unroll
    for (int step = 0; step < kLatentSteps; ++step) {
#pragma unroll
      for (int i = half; i < 4; i += 2) {
        queries[step][i] = float16_of_queries(queries[step][i], forth);
      }
    }
  }
}

__device__ __forceinline__ void load_queries(Queries& queries, float (&back)[2], const SparseMlaArguments& p,
                                             const Work& work, int lane) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    load_query(queries[step], p, work, step, lane);
  }
  latent_to_float16(queries, back);
}

}  // namespace dsv32
