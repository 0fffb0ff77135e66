// The warpgroups that multiply tiles of keys with the queries of some rows, and sum over the heads.
//
// Keys are rows of a product and heads are columns, so that a head sum stays in a thread but for a group of four.
#pragma once

#include "index_logits_block.cuh"
#include "wgmma.cuh"

namespace dsv32::index_logits {

constexpr int kColumns = kRowsOfProduct * kHeads;
static_assert(kRowsOfProduct == 2 && kProducts == 2);
using Products = float[kColumns / 2];
using Weights = float[kColumns / 4];  // of the columns that a thread has

// The part of a thread of a work: in the end it has a score of each product, of one row and one key of each tile.
struct Part {
  Weights half_weights[kProducts];
  uint64_t queries[kProducts];  // descriptors
  int key;                      // in a tile
  float* logits[kProducts];     // at the key of the first tile of all
  int end[kProducts];           // of first keys of tiles, from where on the row does not see that key
};

// Starts the product of a tile of keys with two rows' queries, a group of its own.
__device__ __forceinline__ void start_product(Products& products, uint64_t keys, uint64_t queries) {
  wgmma_fence();
#pragma unroll
  for (int byte = 0; byte < kIndexHeadDim; byte += 32) {
    multiply_e4m3(products, at_byte(keys, byte), at_byte(queries, byte), byte > 0);
  }
  wgmma_commit();
}

// By an addition, as there are half as many maxima a clock. NaN passes.
__device__ __forceinline__ float twice_positive_part(float x) { return x + fabsf(x); }

// The sum over heads of weight times positive part, of this thread's row and key. Each exchange among the four threads
// that have a row of the product halves what is left.
__device__ __forceinline__ float head_sum(const Products& products, const Weights& half_weights, int lane) {
  float sums[kRowsOfProduct][2] = {};  // of keys g and g + 8
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) {
    float& sum = sums[i / (kHeads / 2)][i / 2 % 2];
    sum = fmaf(twice_positive_part(products[i]), half_weights[i / 4 * 2 + i % 2], sum);
  }
  const bool second_key = lane & 1, second_row = lane & 2;
  float of_row[kRowsOfProduct];
#pragma unroll
  for (int row = 0; row < kRowsOfProduct; ++row) {
    of_row[row] = second_key ? sums[row][1] : sums[row][0];
    of_row[row] += __shfl_xor_sync(0xffffffffu, second_key ? sums[row][0] : sums[row][1], 1);
  }
  return (second_row ? of_row[1] : of_row[0]) +
         __shfl_xor_sync(0xffffffffu, second_row ? of_row[0] : of_row[1], 2);
}

// The weights of a thread's columns, halved.
__device__ __forceinline__ void load_weights(Weights& half_weights, const float (*weights)[kHeads], int lane) {
#pragma unroll
  for (int i = 0; i < kColumns / 4; i += 2) {
    const int column = i * 4 + lane % 4 * 2;
    const float2 pair = *reinterpret_cast<const float2*>(&weights[column / kHeads][column % kHeads]);
    half_weights[i] = pair.x * 0.5f, half_weights[i + 1] = pair.y * 0.5f;
  }
}

__device__ __forceinline__ void take_part(Part& part, Shared& shared, const IndexLogitsArguments& p, int stage,
                                          int warpgroup, int warp, int lane) {
  const Work& work = shared.works[stage];
  part.key = warp * 16 + lane / 4 + lane % 2 * 8;
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
    const int first = warpgroup * kRowsOfWarpgroup + product * kRowsOfProduct, row = first + lane / 2 % 2;
    load_weights(part.half_weights[product], &shared.weights[stage][first], lane);
    part.queries[product] = describe_columns(shared_address(&shared.queries[stage][first * kRowNbytes]));
    part.logits[product] = p.logits + (work.first_row + row) * p.logits_stride + part.key;
    part.end[product] = work.ends[row] - part.key;
  }
}

// Rows of other works are summed too, in vain: where that is a branch, the compiler has no arithmetic left to put among
// the instructions by which the next product is started.
__device__ __forceinline__ void store_scores(const Part& part, int product, const Products& products, int first_key,
                                             float scale, int lane) {
  const float score = head_sum(products, part.half_weights[product], lane) * scale;
  if (first_key < part.end[product]) {
    part.logits[product][first_key] = score;
  }
}

__device__ __forceinline__ uint64_t describe_keys(Shared& shared, const Turn<kKeyStages>& turn) {
  return describe_columns(shared_address(shared.keys[turn.stage]));
}

__device__ __forceinline__ void wait_for_keys(Shared& shared, const Turn<kKeyStages>& turn) {
  mbarrier_wait(&shared.keys_full[turn.stage], turn.parity);
}

// One product is under way while the other is summed. With both under way at once, and one of them when the loop goes
// round, the compiler would make them wait for each other.
__device__ __forceinline__ void score_tiles(const Part& part, Turn<kKeyStages>& turn, Shared& shared, int first_key,
                                            int num_tiles, int lane) {
  Products first, second;
  wait_for_keys(shared, turn);
  start_product(first, describe_keys(shared, turn), part.queries[0]);
  int key = first_key;
  for (int tile = 1; tile < num_tiles; ++tile, key += kTileKeys) {
    wgmma_wait<0>(first);
    start_product(second, describe_keys(shared, turn), part.queries[1]);
    const float scale = shared.scales[turn.stage][part.key];
    store_scores(part, 0, first, key, scale, lane);
    const int last_stage = turn.stage;
    turn.next();
    wait_for_keys(shared, turn);
    wgmma_wait<0>(second);
    start_product(first, describe_keys(shared, turn), part.queries[0]);
    arrive_for_warp(lane, &shared.keys_free[last_stage]);
    store_scores(part, 1, second, key, scale, lane);
  }
  wgmma_wait<0>(first);
  start_product(second, describe_keys(shared, turn), part.queries[1]);
  const float scale = shared.scales[turn.stage][part.key];
  store_scores(part, 0, first, key, scale, lane);
  wgmma_wait<0>(second);
  arrive_for_warp(lane, &shared.keys_free[turn.stage]);
  turn.next();
  store_scores(part, 1, second, key, scale, lane);
}

__device__ __forceinline__ void score_works(Shared& shared, const IndexLogitsArguments& p, int warpgroup, int warp,
                                            int lane) {
  Turn<kWorkStages> work_turn;
  Turn<kKeyStages> key_turn;
  for (;; work_turn.next()) {
    const int stage = work_turn.stage;
    mbarrier_wait(&shared.work_full[stage], work_turn.parity);
    const int first_key = shared.works[stage].first_key, num_tiles = shared.works[stage].num_tiles;
    if (num_tiles == 0) {
      return;
    }
    Part part;
    take_part(part, shared, p, stage, warpgroup, warp, lane);
    score_tiles(part, key_turn, shared, first_key, num_tiles, lane);
    arrive_for_warp(lane, &shared.work_free[stage]);
  }
}

}  // namespace dsv32::index_logits
