// The warpgroup that computes scores, turns them into weights, and sums the left half of rows by them.
//
// Scores of a tile are computed while rows of the last one are still being summed, so that the tensor cores have work
// during the softmax.
#pragma once

#include "sparse_mla_wide_block.cuh"
#include "sparse_mla_wide_scales.cuh"
#include "sparse_mla_wide_softmax.cuh"
#include "sparse_mla_wide_values.cuh"
#include "wgmma.cuh"

namespace dsv32::wide {

struct ScoreTurns {
  Turn<kStages> rows;
  Turn<1> weights;
  Turn<1> queries;
};

// Starts the products of a tile, a group of their own. The right half comes first: it is the first to be there.
template <int kBlocks>
__device__ __forceinline__ void start_scores(Scores& latent, Scores& rope, Shared& shared,
                                             const Turn<kStages>& turn) {
  // Else the descriptors of all products stay in registers from tile to tile.
  const uint64_t queries = describe_columns(forget_origin(shared_address(shared.queries)));
  const uint64_t rows = describe_columns(forget_origin(shared_address(shared.rows[turn.stage])));
  wait_for_rows<kRight, kBlocks>(shared, turn);
  wgmma_fence();
#pragma unroll
  for (int column = kKvLoraRank; column < kLatentDim; column += 16) {
    multiply_transposed_bfloat16(rope, at_column(queries, column), at_column(rows, column), column > kKvLoraRank);
  }
#pragma unroll
  for (int column = kKvLoraRank / 2; column < kKvLoraRank; column += 16) {
    multiply_transposed_float16(latent, at_column(queries, column), at_column(rows, column), column > kKvLoraRank / 2);
  }
  wait_for_rows<kLeft, kBlocks>(shared, turn);
  wgmma_fence();
#pragma unroll
  for (int column = 0; column < kKvLoraRank / 2; column += 16) {
    multiply_transposed_float16(latent, at_column(queries, column), at_column(rows, column), true);
  }
  wgmma_commit();
}

__device__ __forceinline__ void wait_to_hand_over(Shared& shared, const Turn<1>& turn) {
  mbarrier_wait(&shared.weights_free, turn.parity ^ 1);
}

__device__ __forceinline__ void hand_over_factors(Shared& shared, Turn<1>& turn, float2 factor, int thread) {
  const int warp = thread / 32, lane = thread % 32;
  __syncwarp();  // all lanes of a quad have read what one of them overwrites
  if (lane % 4 == 0) {
    float* factors = &shared.factors[warp * 16 + lane / 4];
    factors[0] = factor.x, factors[8] = factor.y;
  }
  arrive_for_warp(lane, &shared.weights_full);
  turn.next();
}

// A weight times the power of two of its key is 2^12 for the greatest one, or somewhat more: what is subtracted is
// moved when it would be more than 2^15.9. Maxima move in many tiles, but seldom by so much. In float16, weights have
// 11 bits down to 2^-14, which is at most 2^-26 of the greatest.
constexpr float kLog2OfGreatestWeight = 12.0f;
constexpr float kSlack = 3.9f;

// Turns scores of a tile, of two parts, into weights and hands them over; returns by what the sums so far are to be
// multiplied. back: what undoes the factors of queries.
__device__ __forceinline__ float2 hand_over_weights(Shared& shared, Turn<1>& turn, Softmax& softmax, Scores& scores,
                                                    const Scores& rope, float2 back, float scale_log2, int stage,
                                                    int num_keys, int thread) {
  const uint32_t* powers = &shared.powers[stage][thread % 4 * 2];  // of two keys of eight
  // From here on, scores are those of keys times their powers.
#pragma unroll
  for (int i = 0; i < kTileKeys / 2; ++i) {
    const uint32_t power = powers[i / 4 * 8 + i % 2];
    const float factor = (i % 4 < 2 ? back.x : back.y) * value_of_power(power);
    scores[i] = (rope[i] + scores[i] * factor) * scale_log2 + log2_of_power(power);
  }
  hide_past_last(scores, num_keys, thread);
  const float2 highest = highest_of(scores);
  const float2 last = softmax.subtracted;
  const float2 subtracted = make_float2(grown(last.x, max_of_quad(highest.x) - kLog2OfGreatestWeight, kSlack),
                                        grown(last.y, max_of_quad(highest.y) - kLog2OfGreatestWeight, kSlack));
  const float2 factor = softmax.subtract(subtracted);
  wait_to_hand_over(shared, turn);
#pragma unroll
  for (int step = 0; step < kValueSteps; ++step) {
    uint32_t pairs[4];
#pragma unroll
    for (int block = 0; block < 2; ++block) {  // of eight keys
      const float* score = &scores[(step * 2 + block) * 4];
      const uint32_t* power = powers + (step * 2 + block) * 8;
      const float low = reciprocal_of_power(power[0]), high = reciprocal_of_power(power[1]);
      const float low_x = exp2_approximate(score[0] - subtracted.x);
      const float high_x = exp2_approximate(score[1] - subtracted.x);
      const float low_y = exp2_approximate(score[2] - subtracted.y);
      const float high_y = exp2_approximate(score[3] - subtracted.y);
      softmax.total.x += low_x * low, softmax.total.y += low_y * low;
      softmax.total.x += high_x * high, softmax.total.y += high_y * high;
      pairs[block * 2] = pack_float16(low_x, high_x);
      pairs[block * 2 + 1] = pack_float16(low_y, high_y);
    }
    shared.weights[step][thread] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
  hand_over_factors(shared, turn, factor, thread);
  return factor;
}

template <int kBlocks>
__device__ __forceinline__ void score_tiles(Sums& sums, Softmax& softmax, ScoreTurns& turns, Shared& shared,
                                            const SparseMlaArguments& p, const Work& work, float2 back, int thread) {
  const int lane = thread % 32;
  Scores scores, rope;
  Weights weights;
  start_scores<kBlocks>(scores, rope, shared, turns.rows);
  wgmma_wait<0>(scores, rope);
  hand_over_weights(shared, turns.weights, softmax, scores, rope, back, p.scale_log2, turns.rows.stage,
                    work.num_keys, thread);
  for (int tile = 1; tile < work.num_tiles; ++tile) {
    // What a thread has handed over, it reads again: registers that products take stay as they are until these are
    // done, so the next weights would need others.
    load_weights(weights, shared, thread);
    Turn<kStages> next = turns.rows;
    next.next();
    start_scores<kBlocks>(scores, rope, shared, next);
    start_values<kLeft>(sums, weights, shared, turns.rows.stage);
    wgmma_wait<1>(scores, rope);
    const int num_keys = work.num_keys - tile * kTileKeys;
    const float2 factor = hand_over_weights(shared, turns.weights, softmax, scores, rope, back, p.scale_log2,
                                            next.stage, num_keys, thread);
    wgmma_wait<0>(sums[0], sums[1]);
    free_rows<kLeft, kBlocks>(shared, turns.rows.stage, lane);
    turns.rows = next;
    rescale(sums, factor);
  }
  load_weights(weights, shared, thread);
  start_values<kLeft>(sums, weights, shared, turns.rows.stage);
  wgmma_wait<0>(sums[0], sums[1]);
  free_rows<kLeft, kBlocks>(shared, turns.rows.stage, lane);
  turns.rows.next();
}

}  // namespace dsv32::wide
