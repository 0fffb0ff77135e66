// The warpgroup that computes scores and turns them into weights.
//
// The latent part of its queries stays in registers: products then read only rows from shared memory, whose bandwidth
// sums and copies need too.
#pragma once

#include "bfloat16_pairs.cuh"
#include "sparse_mla_bf16_block.cuh"
#include "sparse_mla_bf16_keys.cuh"
#include "sparse_mla_wide_softmax.cuh"
#include "wgmma.cuh"

namespace dsv32::wide::bf16 {

constexpr int kHeldSteps = kHeldColumns / 16;  // of products over 16 columns

// But for the last columns, as each thread of a warpgroup holds them as operands.
using Queries = uint32_t[kHeldSteps][4];
static_assert(kLastSteps >= 1 && kLastSteps <= kHeldSteps);

// Of four matrices of eight rows and eight columns, which together are 16 rows of a warp by 16 columns, the row that a
// lane names: as load_matrices gives operands of products, and store_matrices takes their sums.
__device__ __forceinline__ uint32_t row_of_matrices(uint32_t panel, int warp, int lane) {
  return panel + chunk_offset(warp * 16 + lane % 16, lane / 16);
}
// The same of other columns of the panel, a multiple of 16.
__device__ __forceinline__ uint32_t at_matrices(uint32_t row, int column) { return row ^ column * 2; }

// From a stage of rows.
__device__ __forceinline__ void take_queries(Queries& queries, Shared& shared, int stage, int warp, int lane) {
  const uint32_t panels = shared_address(shared.rows[stage]);
  const uint32_t row = row_of_matrices(panels, warp, lane);
#pragma unroll
  for (int step = 0; step < kHeldSteps; ++step) {
    const int column = step * 16;
    load_matrices(queries[step],
                  at_matrices(row, column % kPanelColumns) + column / kPanelColumns * kPanelNbytes);
  }
  // The others, to places of their own, once nobody multiplies what is there.
  named_barrier(kScoreBarrier, kWarpgroup);
  const uint32_t target = shared_address(shared.rope_queries);
#pragma unroll
  for (int i = 0; i < kPanelNbytes; i += kWarpgroup * 16) {
    const int offset = i + (warp * 32 + lane) * 16;
    store_chunk(target + offset, load_chunk(panels + kRopePanel * kPanelNbytes + offset));
  }
  const int thread = warp * 32 + lane, head = thread / 2, chunk = thread % 2;
  static_assert(kLastColumns == 2 * 8 && kHeldColumns / kPanelColumns == kRopePanel - 1);
  const uint32_t last = panels + (kRopePanel - 1) * kPanelNbytes +
                        chunk_offset(head, kHeldColumns % kPanelColumns / 8 + chunk);
  store_chunk(shared_address(shared.last_queries) + step_chunk_offset(head, chunk), load_chunk(last));
  fence_async_proxy();
  named_barrier(kScoreBarrier, kWarpgroup);
}

// Products of all warpgroups then see the rows, and what this thread has written before.
__device__ __forceinline__ void wait_for_rows(Shared& shared, const Turn<kStages>& turn) {
  mbarrier_wait(&shared.rows_full[turn.stage], turn.parity);
  if (kScoresFirst || kArrival != Arrival::kThreads) {
    fence_async_proxy();
  }
}

// Starts the products of a tile, the last ones as a group of their own.
__device__ __forceinline__ void start_scores(Scores& scores, const Queries& queries, Shared& shared, int stage) {
  // Else the descriptors of all products stay in registers from tile to tile.
  const uint64_t rows = describe_columns(forget_origin(shared_address(shared.rows[stage])));
  const uint64_t rope_queries = describe_columns(forget_origin(shared_address(shared.rope_queries)));
  const uint64_t last_queries = describe_step(forget_origin(shared_address(shared.last_queries)));
  wgmma_fence();
#pragma unroll
  for (int column = 0; column < kRopeDim; column += 16) {
    multiply_transposed_bfloat16(scores, at_column(rope_queries, column), at_column(rows, kKvLoraRank + column),
                                 column > 0);
  }
  multiply_transposed_bfloat16(scores, last_queries, at_column(rows, kHeldColumns), true);
#pragma unroll
  for (int step = 0; step < kHeldSteps; ++step) {
    if (step == kHeldSteps - kLastSteps) {
      wgmma_commit();
    }
    multiply_transposed_bfloat16(scores, queries[step], at_column(rows, step * 16), true);
  }
  wgmma_commit();
}

// As a thread has it. Sums are divided by the sum of weights as they are after rounding to bfloat16, so that they stay
// averages of rows: that of one row is the row.
struct RoundedSoftmax : Softmax {
  float2 rounded_total = make_float2(0.0f, 0.0f);

  __device__ __forceinline__ float2 subtract(float2 x) {
    const float2 factor = Softmax::subtract(x);
    rounded_total.x *= factor.x, rounded_total.y *= factor.y;
    return factor;
  }

  // Two weights of either head, and the same rounded.
  __device__ __forceinline__ void add(float2 x, float2 y, uint32_t rounded_x, uint32_t rounded_y) {
    total.x += x.x + x.y;
    total.y += y.x + y.y;
    rounded_total.x += bfloat16_low(rounded_x) + bfloat16_high(rounded_x);
    rounded_total.y += bfloat16_low(rounded_y) + bfloat16_high(rounded_y);
  }
};

// Turns scores of a tile into weights, in its stage. Before they are handed over, they are fenced.
template <class Keys>
__device__ __forceinline__ void store_weights(Shared& shared, RoundedSoftmax& softmax, Scores& scores, Keys& keys,
                                              float scale_log2, int stage, int num_keys, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < kTileKeys / 2; ++i) {
    scores[i] *= scale_log2;
  }
  keys.hide_others(scores, num_keys, lane);
  const float2 highest = highest_of(scores);
  // Whole numbers, so factors of sums are powers of two.
  const float2 subtracted = make_float2(grown(softmax.subtracted.x, ceilf(max_of_quad(highest.x)), kSlack),
                                        grown(softmax.subtracted.y, ceilf(max_of_quad(highest.y)), kSlack));
  const float2 factor = softmax.subtract(subtracted);
  uint32_t pairs[kTileKeys / 16][4];
#pragma unroll
  for (int i = 0; i < kTileKeys / 2; i += 4) {
    const float2 x = make_float2(exp2_approximate(scores[i] - subtracted.x),
                                 exp2_approximate(scores[i + 1] - subtracted.x));
    const float2 y = make_float2(exp2_approximate(scores[i + 2] - subtracted.y),
                                 exp2_approximate(scores[i + 3] - subtracted.y));
    uint32_t* pair = &pairs[i / 8][i % 8 / 2];
    pair[0] = pack_bfloat16(x.x, x.y);
    pair[1] = pack_bfloat16(y.x, y.y);
    softmax.add(x, y, pair[0], pair[1]);
  }
  named_barrier(kScoreBarrier, kWarpgroup);  // no warp computes scores from what is rotated any more
  const uint32_t row = row_of_matrices(shared_address(shared.rows[stage][kRopePanel]), warp, lane);
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step) {
    store_matrices(at_matrices(row, step * 16), pairs[step]);
  }
  if (lane % 4 == 0) {
    shared.factors[stage][pair_of_heads(warp, lane)] = pack_bfloat16(factor.x, factor.y);
  }
}

__device__ __forceinline__ void hand_over_weights(Shared& shared, int stage, int lane) {
  arrive_for_warp(lane, &shared.weights_full[stage]);
}

// At least one tile.
template <class Keys>
__device__ __forceinline__ void score_tiles(RoundedSoftmax& softmax, const Queries& queries, Keys& keys,
                                            Turn<kStages>& turn, Shared& shared, float scale_log2, int num_keys,
                                            int warp, int lane) {
  Scores scores;
  int last_stage = -1;
  for (; num_keys > 0; num_keys -= kTileKeys, turn.next()) {
    wait_for_rows(shared, turn);
    start_scores(scores, queries, shared, turn.stage);
    if (kScoresFirst && last_stage >= 0) {
      wgmma_wait<1>();
      hand_over_weights(shared, last_stage, lane);
    }
    wgmma_wait<0>(scores);
    store_weights(shared, softmax, scores, keys, scale_log2, turn.stage, num_keys, warp, lane);
    if (!kScoresFirst) {
      fence_async_proxy();
      hand_over_weights(shared, turn.stage, lane);
    }
    last_stage = turn.stage;
  }
  if (kScoresFirst) {
    fence_async_proxy();
    hand_over_weights(shared, last_stage, lane);
  }
}

}  // namespace dsv32::wide::bf16
