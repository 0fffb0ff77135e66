// The warpgroup that computes scores and turns them into weights.
//
// Heads are the rows of the product, keys its columns; each warp takes 16 keys of a tile. Bytes of rows become
// operands in registers: lane 4 g + t is given dimensions 4 t to 4 t + 3 of key g of a block of 16 by 8, and takes
// them as rows 2 t, 2 t + 1 (the first two) and 2 t + 8, 2 t + 9 of the operand. Queries are held in the same order,
// and a sum over dimensions does not depend on it.
//
// The weights of a tile are computed between the products of the next one: what they wait for (other warps' maxima,
// exponentials, a free stage) costs no time then.
#pragma once

#include "sparse_mla_block.cuh"
#include "sparse_mla_queries.cuh"
#include "sparse_mla_softmax.cuh"

namespace dsv32 {

// The products of a tile with the latent part come in eight parts: of two groups at a time, the columns from
// first_column(part, 0) and first_column(part, 1) on. So there are four sums that do not wait for each other.
constexpr int kColumnsOfPart = 32;
constexpr int kPartsOfPair = kLatentGroupSize / kColumnsOfPart;
constexpr int kParts = kNumGroups / 2 * kPartsOfPair;

__device__ __forceinline__ constexpr int first_column(int part, int group_of_pair) {
  return (part / kPartsOfPair * 2 + group_of_pair) * kLatentGroupSize + part % kPartsOfPair * kColumnsOfPart;
}

// Scores before the scale of the softmax, and log2 of the greatest scale of each key. row: the first key of this lane;
// latent_address, rope_address: what it gives load_matrices. Calls between(part) after each part.
template <class Between>
__device__ __forceinline__ void score_keys(Scores& scores, float (&lift)[2][2], const Queries& queries,
                                           const float (&back)[2], const uint8_t* row, uint32_t latent_address,
                                           uint32_t rope_address, const Between& between) {
  // A part ahead: what is done in between may wait, and the compiler moves no loads over that.
  uint32_t next[2][4];
  load_matrices(next[0], latent_address + first_column(0, 0));
  load_matrices(next[1], latent_address + first_column(0, 1));
  Scores latent = {};
  Scores sums[2] = {};
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Both blocks of keys at the first 16 columns, then at the next.
      const uint32_t r[4] = {next[i][0], next[i][1], next[i][2], next[i][3]};
      if (part + 1 < kParts) {
        load_matrices(next[i], latent_address + first_column(part + 1, i));
      }
      const auto& low = queries[first_column(part, i) / 16];
      const auto& high = queries[first_column(part, i) / 16 + 1];
      multiply_float16(sums[i][0], low, float16_of_low_bytes(r[0]), float16_of_high_bytes(r[0]));
      multiply_float16(sums[i][1], low, float16_of_low_bytes(r[1]), float16_of_high_bytes(r[1]));
      multiply_float16(sums[i][0], high, float16_of_low_bytes(r[2]), float16_of_high_bytes(r[2]));
      multiply_float16(sums[i][1], high, float16_of_low_bytes(r[3]), float16_of_high_bytes(r[3]));
    }
    between(part);
    if (part % kPartsOfPair < kPartsOfPair - 1) {
      continue;
    }
    const Scales scales(row, part / kPartsOfPair);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2& scale = scales.of[block][i % 2];
        latent[block][i] += sums[0][block][i] * scale.x;
        latent[block][i] += sums[1][block][i] * scale.y;
        sums[0][block][i] = sums[1][block][i] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2& scale = scales.of[block][i];
        lift[block][i] = fmaxf(part < kPartsOfPair ? kLeastScale : lift[block][i], fmaxf(scale.x, scale.y));
      }
    }
  }
  Scores rope = {};
#pragma unroll
  for (int step = 0; step < kRopeSteps; ++step) {
    uint32_t r[4];
    // Eight keys at both halves of 16 columns, then the next eight keys.
    load_matrices(r, rope_address + step * 32);
    multiply_bfloat16(rope[0], queries[kLatentSteps + step], r[0], r[1]);
    multiply_bfloat16(rope[1], queries[kLatentSteps + step], r[2], r[3]);
  }
#pragma unroll
  for (int block = 0; block < 2; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[block][i] = rope[block][i] + latent[block][i] * back[i / 2];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lift[block][i] = log2_approximate(lift[block][i]);
    }
  }
}

// Where this warpgroup is in all that it shares with the others.
struct ScoreTurns {
  Turn<kStages> rows;
  SoftmaxTurns weights;
  Turn<1> softmax;
  int totals = 0;
};

// Hands what all its warps have subtracted and summed to the warps that store it.
__device__ __forceinline__ void finish_softmax(ScoreTurns& turns, Shared& shared, Softmax& softmax, int warp,
                                               int lane) {
  const int g = lane / 4, t = lane % 4;
  // Two sets, in turn, as of maxima; this barrier also is what parts the maxima of two works.
  auto& totals = shared.totals[turns.totals];
  turns.totals ^= 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = softmax.total[half];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    if (t == 0) {
      totals[g + 8 * half][warp] = total;
    }
  }
  named_barrier(kScoreBarrier, kWarpgroup);
  if (warp == 0) {
    mbarrier_wait(&shared.softmax_free, turns.softmax.parity ^ 1);
    if (t == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 x = *reinterpret_cast<const float4*>(totals[g + 8 * half]);
        shared.softmax[g + 8 * half] = make_float2(softmax.subtracted[half], (x.x + x.y) + (x.z + x.w));
      }
    }
    arrive_for_warp(lane, &shared.softmax_full);
  }
  turns.softmax.next();
}

// Of a split, few tiles are a block's: it waits for its code to be fetched, so all tiles take one path. Where a block
// has all tiles of a work, those after the first have a loop without branches.
template <bool kIsSplit>
__device__ __forceinline__ void score_tiles(ScoreTurns& turns, Shared& shared, const SparseMlaArguments& p,
                                            const Work& work, int warp, int lane) {
  Queries queries;
  float back[2];
  load_queries(queries, back, shared, p, work, warp, lane);
  // As load_matrices takes them: of a block of eight keys, then of the next one, then 16 bytes on in both; and of the
  // rotary part, 16 bytes on before the next block.
  const int first_key = warp * kKeysOfWarp;
  const int latent_offset = (first_key + lane % 8 + lane / 8 % 2 * 8) * kLatentFp8Nbytes + lane / 16 * 16;
  const int rope_offset =
      (first_key + lane % 8 + lane / 16 * 8) * kLatentFp8Nbytes + lane / 8 % 2 * 16 + kRopeOffset;
  const int key = first_key + lane % 4 * 2;

  Softmax softmax;
  const auto score_tile = [&](int tile, const auto& between) {
    mbarrier_wait(&shared.rows_full[turns.rows.stage], turns.rows.parity);
    const auto& rows = shared.rows[turns.rows.stage];
    turns.rows.next();
    const uint32_t address = shared_address(&rows[0][0]);
    Scores scores;
    float lift[2][2];
    score_keys(scores, lift, queries, back, rows[key], address + latent_offset, address + rope_offset, between);
    const int left = work.keys_left(tile) - key;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[block][i] = block * 8 + i % 2 < left ? scores[block][i] * p.scale_log2 : -INFINITY;
      }
    }
    softmax.take_scores(shared, scores, lift, rows[key], tile, warp, lane);
  };
  const auto weigh_last_tile = [&](int part) {
    switch (part) {
      case 1: softmax.take_maxima(turns.weights, shared, lane); break;
      case 2: softmax.exponentiate(); break;
      case 3:
        mbarrier_wait(&shared.weights_free[turns.weights.weights.stage], turns.weights.weights.parity ^ 1);
        softmax.store_weights(turns.weights, shared, 0, warp, lane);
        break;
      case 5:
        softmax.store_weights(turns.weights, shared, 1, warp, lane);
        softmax.hand_over_weights(turns.weights, shared, warp, lane);
        break;
    }
  };
  if (work.keys_left(0) > 0) {
    if constexpr (kIsSplit) {
#pragma unroll 1
      for (int tile = 0; work.keys_left(tile) > 0; ++tile) {
        score_tile(tile, [&](int part) {
          if (tile > 0) {
            weigh_last_tile(part);
          }
        });
      }
    } else {
      score_tile(0, [](int) {});
#pragma unroll 1
      for (int tile = 1; work.keys_left(tile) > 0; ++tile) {
        score_tile(tile, weigh_last_tile);
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      weigh_last_tile(part);
    }
  }
  finish_softmax(turns, shared, softmax, warp, lane);
}

}  // namespace dsv32
