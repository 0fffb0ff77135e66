// Queries of a block: from global to shared memory, in the order in which rows are decoded.
#pragma once

#include "sparse_mla_float16.cuh"
#include "sparse_mla_wide_block.cuh"
#include "wgmma.cuh"

namespace dsv32::wide {

constexpr int kRowsOfQueryWarp = kTileHeads / 4;

// The greatest magnitude of a head's latents, of which this lane and seven more have a part each.
__device__ __forceinline__ float greatest_of_head(const uint4 (&words)[kNumGroups][2]) {
  uint32_t magnitudes = 0;
#pragma unroll
  for (int group = 0; group < kNumGroups; ++group) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4& x = words[group][i];
      magnitudes = max_with_magnitude(max_with_magnitude(magnitudes, x.x), x.y);
      magnitudes = max_with_magnitude(max_with_magnitude(magnitudes, x.z), x.w);
    }
  }
  float greatest = fmaxf(bfloat16_low(magnitudes), bfloat16_high(magnitudes));
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) {
    greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, distance));
  }
  return greatest;
}

// Of the same warpgroup. Eight lanes take 128 latents of a head, each of them 16; four heads a warp at a time.
__device__ __forceinline__ void load_queries(Shared& shared, const SparseMlaArguments& p, const Work& work, int warp,
                                             int lane) {
  constexpr int kHeadsAtOnce = 2;  // of a lane, for so many loads there are registers
  const auto q = static_cast<const uint8_t*>(p.q) +
                 (static_cast<int64_t>(work.token) * p.num_heads + work.first_head) * kLatentDim * 2;
  const uint32_t panels = shared_address(shared.queries);
#pragma unroll 1
  for (int first = 0; first < kRowsOfQueryWarp; first += 4 * kHeadsAtOnce) {
    uint4 words[kHeadsAtOnce][kNumGroups][2], rope[kHeadsAtOnce];
#pragma unroll
    for (int i = 0; i < kHeadsAtOnce; ++i) {
      const int head = warp * kRowsOfQueryWarp + first + 4 * i + lane / 8;
      const bool exists = head < work.num_heads;
      const uint8_t* row = q + head * kLatentDim * 2;
#pragma unroll
      for (int group = 0; group < kNumGroups; ++group) {
        const uint8_t* latents = row + (group * kLatentGroupSize + lane % 8 * 16) * 2;
        words[i][group][0] = load_quad_if(exists, latents);
        words[i][group][1] = load_quad_if(exists, latents + 16);
      }
      rope[i] = load_quad_if(exists, row + (kKvLoraRank + lane % 8 * 8) * 2);
    }
#pragma unroll
    for (int i = 0; i < kHeadsAtOnce; ++i) {
      const int head = warp * kRowsOfQueryWarp + first + 4 * i + lane / 8;
      const int exponent = exponent_for_queries(greatest_of_head(words[i]));
      const auto scaled = [=, forth = power_of_two(exponent)](uint32_t pair) {
        return float16_of_queries(pair, forth);
      };
      shared.factors[head] = power_of_two(-exponent);  // eight lanes write the same
      const uint32_t chunk = panels + chunk_offset(head, lane % 8);
      store_chunk(chunk + kRopePanel * kPanelNbytes, rope[i]);
#pragma unroll
      for (int group = 0; group < kNumGroups; ++group) {
        const uint4 low = words[i][group][0], high = words[i][group][1];
        const uint32_t even = chunk + 2 * group * kPanelNbytes;
        store_chunk(even, make_uint4(scaled(low.x), scaled(low.z), scaled(high.x), scaled(high.z)));
        store_chunk(even + kPanelNbytes, make_uint4(scaled(low.y), scaled(low.w), scaled(high.y), scaled(high.w)));
      }
    }
  }
  fence_async_proxy();
  arrive_for_warp(lane, &shared.queries_full);
}

}  // namespace dsv32::wide
