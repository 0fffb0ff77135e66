// Sums of a warpgroup: half of the latents of all rows, by the weights of the rows; and what becomes of them.
#pragma once

#include "sparse_mla_bf16_block.cuh"
#include "sparse_mla_store.cuh"
#include "wgmma.cuh"

namespace dsv32::wide::bf16 {

constexpr int kColumnsOfHalf = kPanelsOfHalf * kPanelColumns;
using Sums = float[kColumnsOfHalf / 2];  // of a product; wgmma.cuh says what a thread has

// By the factors of the two heads of a thread. Seldom by anything but one.
__device__ __forceinline__ void rescale(Sums& sums, uint32_t factors) {
  constexpr uint32_t kOnes = 0x3f803f80;
  if (__any_sync(0xffffffffu, factors != kOnes)) {
    const float x = bfloat16_low(factors), y = bfloat16_high(factors);
#pragma unroll
    for (int i = 0; i < kColumnsOfHalf / 2; ++i) {
      sums[i] *= i % 4 < 2 ? x : y;
    }
  }
}

// Of a tile, the keys of each part as a group.
__device__ __forceinline__ void start_values(Sums& sums, const Shared& shared, int stage, int half) {
  const uint64_t weights = describe_columns(shared_address(shared.rows[stage][kRopePanel]));
  const uint64_t rows = describe_rows(shared_address(shared.rows[stage][half * kPanelsOfHalf]));
  wgmma_fence();
#pragma unroll
  for (int key = 0; key < kTileKeys; key += 16) {
    multiply_bfloat16(sums, at_column(weights, key), at_row(rows, key));
    if ((key + 16) % kKeysOfPart == 0) {
      wgmma_commit();
    }
  }
}

// A split gives out what it has in float32. Four lanes fill a sector of 32 bytes; of bfloat16, with what two of them
// give each other.
__device__ __forceinline__ void store_sums(const Sums& sums, float2 factor, const SparseMlaArguments& p,
                                           const Work& work, int64_t first_row, bool is_split, int half, int warp,
                                           int lane) {
  const int t = lane % 4;
#pragma unroll
  for (int row_half = 0; row_half < 2; ++row_half) {
    const int head = warp * 16 + lane / 4 + 8 * row_half;
    const bool exists = head < work.num_heads;
    const float f = row_half == 0 ? factor.x : factor.y;
    const int64_t first = (first_row + head) * kKvLoraRank + half * kColumnsOfHalf;
    if (is_split) {
      auto* out = static_cast<float*>(p.out) + first + 2 * t;
#pragma unroll
      for (int block = 0; block < kColumnsOfHalf / 8; ++block) {
        const float* pair = &sums[block * 4 + 2 * row_half];
        if (exists) {
          *reinterpret_cast<float2*>(out + block * 8) = make_float2(pair[0] * f, pair[1] * f);
        }
      }
    } else {
      const bool is_odd = t % 2 == 1;
      auto* out = static_cast<__nv_bfloat16*>(p.out) + first + (is_odd ? 8 : 0) + t / 2 * 4;
#pragma unroll
      for (int block = 0; block < kColumnsOfHalf / 8; block += 2) {
        const float* pair = &sums[block * 4 + 2 * row_half];
        const uint32_t own = pack_bfloat16(pair[0] * f, pair[1] * f);
        const uint32_t next = pack_bfloat16(pair[4] * f, pair[5] * f);
        const uint32_t other = __shfl_xor_sync(0xffffffffu, is_odd ? own : next, 1);
        if (exists) {
          *reinterpret_cast<uint2*>(out + block * 8) = is_odd ? make_uint2(other, next) : make_uint2(own, other);
        }
      }
    }
  }
}

}  // namespace dsv32::wide::bf16
