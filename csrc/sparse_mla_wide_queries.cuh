// Queries of a block: from global to shared memory, in the order in which rows are decoded.
#pragma once

#include "bfloat16_pairs.cuh"
#include "e4m3_decode.cuh"
#include "sparse_mla_wide_block.cuh"
#include "wgmma.cuh"

namespace dsv32::wide {

constexpr int kRowsOfQueryWarp = kTileHeads / 4;
constexpr uint32_t kTwoPow60Pair = 0x5d805d80u;  // in bfloat16

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
      const uint32_t chunk = panels + chunk_offset(head, lane % 8);
      store_chunk(chunk + kRopePanel * kPanelNbytes, rope[i]);
#pragma unroll
      for (int group = 0; group < kNumGroups; ++group) {
        const uint4 low = words[i][group][0], high = words[i][group][1];
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int halves = odd ? 0x7632 : 0x5410;  // of two words, both high ones or both low ones
          const auto scaled = [=](uint32_t a, uint32_t b) {
            return multiply_pairs(__byte_perm(a, b, halves), kTwoPow60Pair);
          };
          store_chunk(chunk + (2 * group + odd) * kPanelNbytes,
                      make_uint4(scaled(low.x, low.y), scaled(low.z, low.w), scaled(high.x, high.y),
                                 scaled(high.z, high.w)));
        }
      }
    }
  }
  fence_async_proxy();
  arrive_for_warp(lane, &shared.queries_full);
}

}  // namespace dsv32::wide
