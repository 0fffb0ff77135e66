// The warpgroup that computes scores, turns them into weights, and sums the left half of rows by them.
//
// Rows lack their scales, so the products of a group are summed apart, then multiplied by the scales of their keys.
// Rows of the last tile are summed meanwhile, and during the softmax, so that the tensor cores have work.
#pragma once

#include "sparse_mla_wide_block.cuh"
#include "sparse_mla_wide_scales.cuh"
#include "sparse_mla_wide_values.cuh"
#include "wgmma.cuh"

namespace dsv32::wide {

using Scores = float[kTileKeys / 2];

struct ScoreTurns {
  Turn<kStages> rows;
  Turn<1> weights;
  Turn<1> queries;
};

// Of the two heads of a thread: what was subtracted from scores to make weights, and of its own keys alone the sum of
// their weights.
struct Softmax {
  float2 subtracted = make_float2(-INFINITY, -INFINITY);
  float2 total = make_float2(0.0f, 0.0f);
};

// Starts the products of a group, or of what is rotated: each a group of products of their own.
__device__ __forceinline__ void start_latent_scores(Scores& scores, const Shared& shared, int stage, int group) {
  // Else the descriptors of all products stay in registers from tile to tile.
  const uint64_t queries = describe_columns(forget_origin(shared_address(shared.queries)));
  const uint64_t rows = describe_columns(forget_origin(shared_address(shared.rows[stage])));
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kLatentGroupSize; i += 16) {
    const int column = group * kLatentGroupSize + i;
    multiply_transposed_float16(scores, at_column(queries, column), at_column(rows, column), i > 0);
  }
  wgmma_commit();
}

__device__ __forceinline__ void start_rope_scores(Scores& scores, const Shared& shared, int stage) {
  const uint64_t queries = describe_columns(forget_origin(shared_address(shared.queries)));
  const uint64_t rows = describe_columns(forget_origin(shared_address(shared.rows[stage])));
  wgmma_fence();
#pragma unroll
  for (int column = kKvLoraRank; column < kLatentDim; column += 16) {
    multiply_transposed_bfloat16(scores, at_column(queries, column), at_column(rows, column), column > kKvLoraRank);
  }
  wgmma_commit();
}

// Adds products of a group times the scales of their keys; to nothing, where they are the first.
template <bool kIsFirst>
__device__ __forceinline__ void add_scaled(Scores& latent, const Scores& products, const Shared& shared, int stage,
                                           int group, int thread) {
  const float* scales = &shared.scales[stage][group][thread % 4 * 2];
#pragma unroll
  for (int i = 0; i < kTileKeys / 2; i += 4) {
    const float2 scale = *reinterpret_cast<const float2*>(scales + i * 2);
#pragma unroll
    for (int j = i; j < i + 4; ++j) {
      const float of_key = j % 2 == 0 ? scale.x : scale.y;
      latent[j] = kIsFirst ? products[j] * of_key : latent[j] + products[j] * of_key;
    }
  }
  pin(latent);  // else some of this is put off, and scales stay in registers
}

// Scores of a tile, in two parts. Calls between(i), for i from 0 to 3, to start kOthers groups of other products:
// the tensor cores compute these while the last products are multiplied by scales. Those of i = 3 may not be done.
// The right half comes first: it is the first to be there.
template <int kOthers, class Between>
__device__ __forceinline__ void score_tile(Scores& latent, Scores& rope, Shared& shared, const Turn<kStages>& turn,
                                           int thread, Between between) {
  const int stage = turn.stage;
  Scores& products = rope;
  constexpr int kFirst = kRight * kGroupsOfHalf;
  mbarrier_wait(&shared.rows_full[stage][kRight], turn.parity);
  start_latent_scores(latent, shared, stage, kFirst);
  start_latent_scores(products, shared, stage, kFirst + 1);
  between(0);
  wgmma_wait<kOthers + 1>(latent);
  add_scaled<true>(latent, latent, shared, stage, kFirst, thread);
  wgmma_wait<kOthers>(products);
  add_scaled<false>(latent, products, shared, stage, kFirst + 1, thread);
  mbarrier_wait(&shared.rows_full[stage][kLeft], turn.parity);
#pragma unroll
  for (int group = 0; group < kGroupsOfHalf; ++group) {
    start_latent_scores(products, shared, stage, group);
    between(1 + group);
    wgmma_wait<kOthers>(products);
    add_scaled<false>(latent, products, shared, stage, group, thread);
  }
  start_rope_scores(rope, shared, stage);
  between(3);
  wgmma_wait<kOthers>(rope);
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
  const int warp = thread / 32, lane = thread % 32;
  if (lane % 4 == 0) {
    float* factors = &shared.factors[warp * 16 + lane / 4];
    factors[0] = factor.x, factors[8] = factor.y;
  }
  arrive_for_warp(lane, &shared.weights_full);
  turn.next();
}

// A weight times the power of two of its key is 2^12 for the greatest one, or somewhat more: what is subtracted is
// moved when it would be more than 2^14.9. Maxima move in many tiles, but seldom by so much. The scales relative to
// that power are less than 2, so no product of both overflows; products are exact to 11 bits down to 2^-14, which is
// at most 2^-26 of the greatest.
constexpr float kLog2OfGreatestWeight = 12.0f;
__device__ __forceinline__ float grown(float subtracted, float candidate) {
  constexpr float kSlack = 2.9f;
  return candidate > subtracted + kSlack ? candidate : subtracted;
}

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
    highest.x = fmaxf(highest.x, fmaxf(scores[i], scores[i + 1]));
    highest.y = fmaxf(highest.y, fmaxf(scores[i + 2], scores[i + 3]));
  }
  const float2 last = softmax.subtracted;
  const float2 subtracted = make_float2(grown(last.x, max_of_quad(highest.x) - kLog2OfGreatestWeight),
                                        grown(last.y, max_of_quad(highest.y) - kLog2OfGreatestWeight));
  const float2 factor =
      make_float2(exp2_approximate(last.x - subtracted.x), exp2_approximate(last.y - subtracted.y));
  softmax.subtracted = subtracted;
  softmax.total.x *= factor.x, softmax.total.y *= factor.y;
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

__device__ __forceinline__ void free_left_half(Shared& shared, Turn<kStages>& turn, int lane) {
  arrive_for_warp(lane, &shared.rows_free[turn.stage][kLeft]);
  turn.next();
}

__device__ __forceinline__ void score_tiles(Sums& sums, Softmax& softmax, ScoreTurns& turns, Shared& shared,
                                            const SparseMlaArguments& p, const Work& work, float2 back, int thread) {
  const int lane = thread % 32;
  Scores scores, rope;
  score_tile<0>(scores, rope, shared, turns.rows, thread, [](int) {});
  hand_over_weights(shared, turns.weights, softmax, scores, rope, back, p.scale_log2, turns.rows.stage,
                    work.num_keys, thread);
  // What a thread has handed over, it reads again: registers that products take stay as they are until these are
  // done, so the next weights would need others.
  const auto start_step = [&](int step) { start_values<kLeft>(sums, shared, turns.rows.stage, step, thread); };
  for (int tile = 1; tile < work.num_tiles; ++tile) {
    Turn<kStages> next = turns.rows;
    next.next();
    score_tile<1>(scores, rope, shared, next, thread, start_step);
    const int num_keys = work.num_keys - tile * kTileKeys;
    const float2 factor = hand_over_weights(shared, turns.weights, softmax, scores, rope, back, p.scale_log2,
                                            next.stage, num_keys, thread);
    wgmma_wait<0>(sums[0], sums[1]);
    free_left_half(shared, turns.rows, lane);
    rescale(sums, factor);
  }
#pragma unroll
  for (int step = 0; step < kValueSteps; ++step) {
    start_step(step);
  }
  wgmma_wait<0>(sums[0], sums[1]);
  free_left_half(shared, turns.rows, lane);
}

}  // namespace dsv32::wide
