// The two warpgroups that sum rows by their weights, and store or join what comes out.
//
// Heads are the rows of the product, dimensions its columns; each warp takes 64 dimensions, which share a scale.
// Reading with transposition gives lane 4 g + t bytes 2 g and 2 g + 1 of keys 2 t and 2 t + 1 of a block of eight
// keys by 16 dimensions. The even ones, decoded, are an operand for dimensions 2 g, the odd ones for 2 g + 1. So a
// lane's results, columns 2 t and 2 t + 1 of either, are dimensions 4 t to 4 t + 3.
#pragma once

#include "sparse_mla_block.cuh"
#include "sparse_mla_store.cuh"

namespace dsv32 {

constexpr int kUnitsOfWarp = kDimsOfWarp / 16;

// For each 16 dimensions: the even ones, and the odd ones.
using Sums = float[kUnitsOfWarp][2][4];

// Where these warpgroups are in all that they share with the others.
struct ValueTurns {
  Turn<kStages> rows;
  Turn<kWeightStages> weights;
  Turn<1> softmax;
};

__device__ __forceinline__ void sum_tiles(Sums& sums, ValueTurns& turns, Shared& shared, const Work& work, int warp,
                                          int lane) {
  const int g = lane / 4;
  const int group = warp * kDimsOfWarp / kLatentGroupSize;
  // As the loads take them: a block of eight keys, the next one, and both 16 bytes on; and heads 0 to 7, 8 to 15, and
  // both eight keys on.
  const int row_offset = (lane % 8 + lane / 8 % 2 * 8) * kLatentFp8Nbytes + lane / 16 * 16 + warp * kDimsOfWarp;
  const int weight_offset = ((lane % 8 + lane / 8 % 2 * 8) * kWeightPitch + lane / 16 * 8) * 2;

  for (int tile = 0; work.keys_left(tile) > 0; ++tile, turns.rows.next(), turns.weights.next()) {
    const int stage = turns.weights.stage;
    // Full before the weights were; waiting for it makes what was copied visible here too.
    mbarrier_wait(&shared.rows_full[turns.rows.stage], turns.rows.parity);
    mbarrier_wait(&shared.weights_full[stage], turns.weights.parity);
    const float factor[2] = {shared.shrink[stage][g], shared.shrink[stage][g + 8]};
    // Maxima move in the first tiles, and seldom later.
    if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int unit = 0; unit < kUnitsOfWarp; ++unit) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sums[unit][i / 4][i % 4] *= factor[i % 4 / 2];
        }
      }
    }
    const uint32_t weights = shared_address(&shared.weights[stage][group][0][0]) + weight_offset;
    const uint32_t rows = shared_address(&shared.rows[turns.rows.stage][0][0]) + row_offset;
#pragma unroll
    for (int key = 0; key < kTileKeys; key += 16) {
      uint32_t a[4], r[4];
      load_matrices(a, weights + key * 2);
#pragma unroll
      for (int unit = 0; unit < kUnitsOfWarp; unit += 2) {
        load_matrices_transposed(r, rows + key * kLatentFp8Nbytes + unit * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          r[i] = swap_inner_bytes(r[i]);  // the even dimensions of both keys, then the odd ones
        }
        multiply_float16(sums[unit][0], a, float16_of_low_bytes(r[0]), float16_of_low_bytes(r[1]));
        multiply_float16(sums[unit][1], a, float16_of_high_bytes(r[0]), float16_of_high_bytes(r[1]));
        multiply_float16(sums[unit + 1][0], a, float16_of_low_bytes(r[2]), float16_of_low_bytes(r[3]));
        multiply_float16(sums[unit + 1][1], a, float16_of_high_bytes(r[2]), float16_of_high_bytes(r[3]));
      }
    }
    // The scores of these rows were computed before their weights were: nobody else reads the rows any more.
    arrive_for_warp(lane, &shared.rows_free[turns.rows.stage], &shared.weights_free[stage]);
  }
}

__device__ __forceinline__ int64_t row_of_head(const SparseMlaArguments& p, const Work& work, int head) {
  return static_cast<int64_t>(work.token) * p.num_heads + work.first_head + head;
}

__device__ __forceinline__ void store_sums(const Sums& sums, ValueTurns& turns, Shared& shared,
                                           const SparseMlaArguments& p, const Work& work, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
  mbarrier_wait(&shared.softmax_full, turns.softmax.parity);
  turns.softmax.next();
  const float2 softmax_of_half[2] = {shared.softmax[g], shared.softmax[g + 8]};
  arrive_for_warp(lane, &shared.softmax_free);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = g + 8 * half;
    if (head >= work.num_heads) {
      continue;
    }
    const float2 softmax = softmax_of_half[half];
    const float factor = normaliser(softmax.y);
    const int64_t row = row_of_head(p, work, head);
#pragma unroll
    for (int unit = 0; unit < kUnitsOfWarp; ++unit) {
      const float* even = &sums[unit][0][2 * half];
      const float* odd = &sums[unit][1][2 * half];
      store_quad(p, row, warp * kDimsOfWarp + unit * 16 + 4 * t,
                 make_float4(even[0] * factor, odd[0] * factor, even[1] * factor, odd[1] * factor));
    }
    if (warp == 0 && t == 0) {
      p.lse[row] = lse_log2(softmax.x, softmax.y) * kLn2;
    }
  }
}

__device__ __forceinline__ float* split_sums(Shared& shared) {
  return reinterpret_cast<float*>(&shared.rows[0][0][0]);
}

__device__ __forceinline__ void keep_sums(const Sums& sums, Shared& shared, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* row = split_sums(shared) + (g + 8 * half) * kOutPitch + warp * kDimsOfWarp + 4 * t;
#pragma unroll
    for (int unit = 0; unit < kUnitsOfWarp; ++unit) {
      const float* even = &sums[unit][0][2 * half];
      const float* odd = &sums[unit][1][2 * half];
      *reinterpret_cast<float4*>(row + unit * 16) = make_float4(even[0], odd[0], even[1], odd[1]);
    }
  }
}

// Each warp joins parts of rows, from the shared memory of all blocks of its cluster. Parts go round the blocks, then
// round their warps, so that any number of blocks shares them evenly. A warp loads all of its parts before it uses the
// first.
template <int kSplits>
__device__ __forceinline__ void join_sums(Shared& shared, const SparseMlaArguments& p, const Work& work, int rank,
                                          int warp, int lane) {
  constexpr int kPartsOfRow = kKvLoraRank / (32 * 4);  // four columns a lane
  constexpr int kPartsOfRound = kNumValueWarps * kSplits;
  constexpr int kRounds = (kTileHeads * kPartsOfRow + kPartsOfRound - 1) / kPartsOfRound;
  const uint32_t softmax_address = shared_address(shared.softmax);
  const uint32_t sums_address = shared_address(split_sums(shared));
  const int first_part = warp * kSplits + rank;
  const int num_parts = work.num_heads * kPartsOfRow;
  float2 softmax[kRounds][kSplits];
  float4 sums[kRounds][kSplits];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int part = min(first_part + round * kPartsOfRound, num_parts - 1);
    const int head = part / kPartsOfRow, dim = (part % kPartsOfRow * 32 + lane) * 4;
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      softmax[round][split] = load_pair_in_cluster(address_in_block(softmax_address + head * 8, split));
      sums[round][split] = load_quad_in_cluster(address_in_block(sums_address + (head * kOutPitch + dim) * 4, split));
    }
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int part = first_part + round * kPartsOfRound;
    const int head = part / kPartsOfRow, dim = (part % kPartsOfRow * 32 + lane) * 4;
    if (part >= num_parts) {
      continue;
    }
    float subtracted = -INFINITY;
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      subtracted = fmaxf(subtracted, softmax[round][split].x);
    }
    float total = 0.0f;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int split = 0; split < kSplits; ++split) {
      const float2& of_split = softmax[round][split];
      const float4& x = sums[round][split];
      // Of a split without keys, minus infinity minus itself may be asked for.
      const float weight = of_split.y == 0.0f ? 0.0f : exp2_approximate(of_split.x - subtracted);
      total += of_split.y * weight;
      sum.x += x.x * weight, sum.y += x.y * weight, sum.z += x.z * weight, sum.w += x.w * weight;
    }
    const float factor = normaliser(total);
    const int64_t row = row_of_head(p, work, head);
    store_quad(p, row, dim, make_float4(sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor));
    if (dim == 0) {
      p.lse[row] = lse_log2(subtracted, total) * kLn2;
    }
  }
}

}  // namespace dsv32
