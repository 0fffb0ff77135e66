// The warpgroup that computes scores, turns them into weights, and sums the left half of rows by them.
//
// Scores of a tile are computed while rows of the last one are still being summed, so that the tensor cores have work
// during the softmax.
#pragma once

#include "bfloat16_pairs.cuh"
#include "sparse_mla_wide_block.cuh"
#include "sparse_mla_wide_values.cuh"
#include "wgmma.cuh"

namespace dsv32::wide {

using Scores = float[kTileKeys / 2];

struct ScoreTurns {
  Turn<kStages> rows;
  Turn<1> weights;
  Turn<1> queries;
};

// Of the two heads of a thread: the highest score that weights were made relative to, and of its own keys alone the
// sum of their weights.
struct Softmax {
  float2 highest = make_float2(-INFINITY, -INFINITY);
  float2 total = make_float2(0.0f, 0.0f);
};

// Starts the products of a tile, a group of their own. The right half comes first: it is the first to be there.
__device__ __forceinline__ void start_scores(Scores& scores, Shared& shared, const Turn<kStages>& turn) {
  // Else the descriptors of all products stay in registers from tile to tile.
  const uint64_t queries = describe_columns(forget_origin(shared_address(shared.queries)));
  const uint64_t rows = describe_columns(forget_origin(shared_address(shared.rows[turn.stage])));
  mbarrier_wait(&shared.rows_full[turn.stage][kRight], turn.parity);
  wgmma_fence();
#pragma unroll
  for (int column = kKvLoraRank / 2; column < kLatentDim; column += 16) {
    multiply_transposed(scores, at_column(queries, column), at_column(rows, column), column > kKvLoraRank / 2);
  }
  mbarrier_wait(&shared.rows_full[turn.stage][kLeft], turn.parity);
#pragma unroll
  for (int column = 0; column < kKvLoraRank / 2; column += 16) {
    multiply_transposed(scores, at_column(queries, column), at_column(rows, column), true);
  }
  wgmma_commit();
}

__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ void wait_to_hand_over(Shared& shared, const Turn<1>& turn) {
  mbarrier_wait(&shared.weights_free, turn.parity ^ 1);
}

__device__ __forceinline__ void hand_over_factors(Shared& shared, Turn<1>& turn, float2 factor, int thread) {
  shared.factors[thread] = factor;
  arrive_for_warp(thread % 32, &shared.weights_full);
  turn.next();
}

// Weights are relative to a score that need not be the highest so far, only near it: up to 2^8 of them are one, and
// sums are multiplied anew when they would be more. Maxima move in many tiles, but not by so much.
__device__ __forceinline__ float grown(float highest, float candidate) {
  constexpr float kSlack = 8.0f;
  return candidate > highest + kSlack ? candidate : highest;
}

// Turns scores of a tile into weights and hands them over; returns by what the sums so far are to be multiplied.
__device__ __forceinline__ float2 hand_over_weights(Shared& shared, Turn<1>& turn, Softmax& softmax, Scores& scores,
                                                    float scale_log2, int num_keys, int thread) {
  if (num_keys < kTileKeys) {
    const int left = forget_origin(num_keys);  // else the compiler would select in every tile, and not branch
#pragma unroll
    for (int i = 0; i < kTileKeys / 2; ++i) {
      const int key = i / 4 * 8 + thread % 4 * 2 + i % 2;
      scores[i] = key < left ? scores[i] : -INFINITY;
    }
  }
  float2 highest = make_float2(-INFINITY, -INFINITY);
#pragma unroll
  for (int i = 0; i < kTileKeys / 2; i += 4) {
    scores[i] *= scale_log2, scores[i + 1] *= scale_log2, scores[i + 2] *= scale_log2, scores[i + 3] *= scale_log2;
    highest.x = fmaxf(highest.x, fmaxf(scores[i], scores[i + 1]));
    highest.y = fmaxf(highest.y, fmaxf(scores[i + 2], scores[i + 3]));
  }
  highest = make_float2(grown(softmax.highest.x, max_of_quad(highest.x)),
                        grown(softmax.highest.y, max_of_quad(highest.y)));
  const float2 factor = make_float2(exp2_approximate(softmax.highest.x - highest.x),
                                    exp2_approximate(softmax.highest.y - highest.y));
  softmax.highest = highest;
  softmax.total.x *= factor.x, softmax.total.y *= factor.y;
  wait_to_hand_over(shared, turn);
#pragma unroll
  for (int step = 0; step < kValueSteps; ++step) {
    uint32_t pairs[4];
#pragma unroll
    for (int block = 0; block < 2; ++block) {  // of eight keys
      const float* score = &scores[(step * 2 + block) * 4];
      const float low_x = exp2_approximate(score[0] - highest.x), high_x = exp2_approximate(score[1] - highest.x);
      const float low_y = exp2_approximate(score[2] - highest.y), high_y = exp2_approximate(score[3] - highest.y);
      softmax.total.x += low_x + high_x, softmax.total.y += low_y + high_y;
      pairs[block * 2] = pack_bfloat16(low_x, high_x);
      pairs[block * 2 + 1] = pack_bfloat16(low_y, high_y);
    }
    shared.weights[step][thread] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
  hand_over_factors(shared, turn, factor, thread);
  return factor;
}

__device__ __forceinline__ void free_left_half(Shared& shared, Turn<kStages>& turn, int lane) {
  arrive_for_warp(lane, &shared.rows_free[turn.stage][kLeft]);
  turn.next();
}

__device__ __forceinline__ void score_tiles(Sums& sums, Softmax& softmax, ScoreTurns& turns, Shared& shared,
                                            const SparseMlaArguments& p, const Work& work, int thread) {
  const int lane = thread % 32;
  Scores scores;
  Weights weights;
  start_scores(scores, shared, turns.rows);
  wgmma_wait<0>(scores);
  hand_over_weights(shared, turns.weights, softmax, scores, p.scale_log2, work.num_keys, thread);
  for (int tile = 1; tile < work.num_tiles; ++tile) {
    // What a thread has handed over, it reads again: registers that products take stay as they are until these are
    // done, so the next weights would need others.
    load_weights(weights, shared, thread);
    Turn<kStages> next = turns.rows;
    next.next();
    start_scores(scores, shared, next);
    start_values<kLeft>(sums, weights, shared, turns.rows.stage);
    wgmma_wait<1>(scores);
    const int num_keys = work.num_keys - tile * kTileKeys;
    const float2 factor = hand_over_weights(shared, turns.weights, softmax, scores, p.scale_log2, num_keys, thread);
    wgmma_wait<0>(sums[0], sums[1]);
    free_left_half(shared, turns.rows, lane);
    rescale(sums, factor);
  }
  load_weights(weights, shared, thread);
  start_values<kLeft>(sums, weights, shared, turns.rows.stage);
  wgmma_wait<0>(sums[0], sums[1]);
  free_left_half(shared, turns.rows, lane);
}

}  // namespace dsv32::wide
