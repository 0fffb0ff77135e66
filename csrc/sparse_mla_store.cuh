// What the kernels of sparse_mla give out, of a row: a token and a head.
#pragma once

#include "bfloat16_pairs.cuh"
#include "sparse_mla_work.cuh"

namespace dsv32 {

constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ void store_quad(const SparseMlaArguments& p, int64_t row, int dim, const float4& x) {
  *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(p.out) + row * kKvLoraRank + dim) =
      make_uint2(pack_bfloat16(x.x, x.y), pack_bfloat16(x.z, x.w));
}

// To the base 2; without keys: minus infinity.
__device__ __forceinline__ float lse_log2(float subtracted, float total) {
  return total == 0.0f ? -INFINITY : subtracted + log2f(total);
}

// Without keys, sums are zero.
__device__ __forceinline__ float normaliser(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

}  // namespace dsv32
