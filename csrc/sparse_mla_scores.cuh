// The warpgroup that computes scores and turns them into weights.
//
// Heads are the rows of the product, keys its columns; each warp takes 16 keys of a tile. Bytes of rows become
// operands in registers: lane 4 g + t is given dimensions 4 t to 4 t + 3 of key g of a block of 16 by 8, and takes
// them as rows 2 t, 2 t + 1 (the even ones) and 2 t + 8, 2 t + 9 (the odd ones) of the operand. Queries are held in
// the same order, and a sum over dimensions does not depend on it.
#pragma once

#include "e4m3_decode.cuh"
#include "sparse_mla_block.cuh"

namespace dsv32 {

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ float bfloat16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bfloat16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// What a lane holds of the queries as the first operand of a step; zeros for heads that do not exist.
__device__ __forceinline__ void load_query(uint32_t (&a)[4], const SparseMlaArguments& p, const Work& work, int step,
                                           int lane) {
  const int g = lane / 4, t = lane % 4;
  const auto q = static_cast<const __nv_bfloat16*>(p.q) +
                 (static_cast<int64_t>(work.token) * p.num_heads + work.first_head) * kLatentDim;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = g + 8 * half;
    const __nv_bfloat16* row = q + head * kLatentDim + step * 16;
    a[half] = a[half + 2] = 0;
    if (head >= work.num_heads) {
      continue;
    }
    if (step < kLatentSteps) {
      const uint2 four = *reinterpret_cast<const uint2*>(row + 4 * t);
      a[half] = pack(bfloat16_low(four.x) * kTwoPow60, bfloat16_low(four.y) * kTwoPow60);
      a[half + 2] = pack(bfloat16_high(four.x) * kTwoPow60, bfloat16_high(four.y) * kTwoPow60);
    } else {
      a[half] = *reinterpret_cast<const uint32_t*>(row + 2 * t);
      a[half + 2] = *reinterpret_cast<const uint32_t*>(row + 2 * t + 8);
    }
  }
}

// As operands: what a lane holds of each step.
using Queries = uint32_t[kSteps][4];

// Scores of 16 keys, in two blocks of eight, before the scale of the softmax.
__device__ __forceinline__ void score_keys(float (&score)[2][4], const float4 (&scale)[2][2],
                                           const Queries& queries, uint32_t rows) {
  uint32_t r[4];
#pragma unroll
  for (int step = 0; step < kRopeSteps; ++step) {
    const auto& a = queries[kLatentSteps + step];
    // Matrices: both blocks of keys at the first eight columns, then at the other eight.
    load_matrices(r, rows + kRopeOffset + step * 32);
    multiply(score[0], a, r[0], r[2]);
    multiply(score[1], a, r[1], r[3]);
  }
  // Two groups at a time: four sums that do not wait for each other.
#pragma unroll
  for (int pair = 0; pair < kNumGroups; pair += 2) {
    float part[2][2][4] = {};
#pragma unroll
    for (int column = 0; column < kLatentGroupSize; column += 32) {
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const int first = (pair + g) * kLatentGroupSize + column;
        load_matrices(r, rows + first);
        const auto& low = queries[first / 16];
        const auto& high = queries[first / 16 + 1];
        multiply(part[g][0], low, decode_even(r[0]), decode_odd(r[0]));
        multiply(part[g][1], low, decode_even(r[1]), decode_odd(r[1]));
        multiply(part[g][0], high, decode_even(r[2]), decode_odd(r[2]));
        multiply(part[g][1], high, decode_even(r[3]), decode_odd(r[3]));
      }
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4& s = scale[block][i % 2];
        score[block][i] += part[0][block][i] * (pair == 0 ? s.x : s.z);
        score[block][i] += part[1][block][i] * (pair == 0 ? s.y : s.w);
      }
    }
  }
}

// Where this warpgroup is in all that it shares with the others.
struct ScoreTurns {
  Turn<kStages> rows;
  Turn<kWeightStages> weights;
  Turn<1> softmax;
  int totals = 0;
};

__device__ __forceinline__ void score_tiles(ScoreTurns& turns, Shared& shared, const SparseMlaArguments& p,
                                            const Work& work, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
  Queries queries;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    load_query(queries[step], p, work, step, lane);
  }
  // As load_matrices takes them: of a block of eight keys, then of the next one, then 16 bytes on in both.
  const int row_offset = (warp * kKeysOfWarp + lane % 8 + lane / 8 % 2 * 8) * kLatentFp8Nbytes + lane / 16 * 16;

  float highest[2] = {-INFINITY, -INFINITY};  // of heads g and g + 8
  float total[2] = {};                        // of the keys of this lane
  for (int tile = 0; tile < work.num_tiles; ++tile, turns.rows.next(), turns.weights.next()) {
    mbarrier_wait(&shared.rows_full[turns.rows.stage], turns.rows.parity);
    const auto& rows = shared.rows[turns.rows.stage];
    const int left = work.num_keys - tile * kTileKeys;

    float4 scale[2][2];
    bool exists[2][2];
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = warp * kKeysOfWarp + block * 8 + 2 * t + i;
        exists[block][i] = key < left;
        const float4 s = *reinterpret_cast<const float4*>(&rows[key][kScalesOffset]);
        // Zero times what lies there could be NaN.
        scale[block][i] = exists[block][i] ? make_float4(s.x * kTwoPow60, s.y * kTwoPow60, s.z * kTwoPow60,
                                                         s.w * kTwoPow60)
                                           : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
    float score[2][4] = {};
    score_keys(score, scale, queries, shared_address(&rows[0][0]) + row_offset);

    float maximum[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[block][i] = exists[block][i % 2] ? score[block][i] * p.scale_log2 : -INFINITY;
        maximum[i / 2] = fmaxf(maximum[i / 2], score[block][i]);
      }
    }
    // Two sets, in turn: a warp that writes one again has met all others since they read it.
    auto& maxima = shared.maxima[tile % 2];
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(0xffffffffu, maximum[half], 1));
      maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(0xffffffffu, maximum[half], 2));
      if (t == 0) {
        maxima[g + 8 * half][warp] = maximum[half];
      }
    }
    named_barrier(kScoreBarrier, kWarpgroup);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 m = *reinterpret_cast<const float4*>(maxima[g + 8 * half]);
      const float previous = highest[half];
      highest[half] = fmaxf(previous, fmaxf(fmaxf(m.x, m.y), fmaxf(m.z, m.w)));
      factor[half] = exp2_approximate(previous - highest[half]);
      total[half] *= factor[half];
    }
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[block][i] = exp2_approximate(score[block][i] - highest[i / 2]);
        total[i / 2] += score[block][i];
      }
    }

    const int stage = turns.weights.stage;
    mbarrier_wait(&shared.weights_free[stage], turns.weights.parity ^ 1);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const int key = warp * kKeysOfWarp + block * 8 + 2 * t;
      const float4 s0 = scale[block][0], s1 = scale[block][1];
      const float low[kNumGroups] = {s0.x, s0.y, s0.z, s0.w}, high[kNumGroups] = {s1.x, s1.y, s1.z, s1.w};
#pragma unroll
      for (int group = 0; group < kNumGroups; ++group) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t pair = pack(score[block][2 * half] * low[group], score[block][2 * half + 1] * high[group]);
          *reinterpret_cast<uint32_t*>(&shared.weights[stage][group][g + 8 * half][key]) = pair;
        }
      }
    }
    if (warp == 0 && t == 0) {
      shared.shrink[stage][g] = factor[0];
      shared.shrink[stage][g + 8] = factor[1];
    }
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive(&shared.weights_full[stage]);
    }
  }

  // Two sets, in turn, for the same reason; this barrier also is what parts the maxima of two works.
  auto& totals = shared.totals[turns.totals];
  turns.totals ^= 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
    total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
    if (t == 0) {
      totals[g + 8 * half][warp] = total[half];
    }
  }
  named_barrier(kScoreBarrier, kWarpgroup);
  if (warp == 0) {
    mbarrier_wait(&shared.softmax_free, turns.softmax.parity ^ 1);
    if (t == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 x = *reinterpret_cast<const float4*>(totals[g + 8 * half]);
        shared.softmax[g + 8 * half] = make_float2(highest[half], (x.x + x.y) + (x.z + x.w));
      }
    }
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive(&shared.softmax_full);
    }
  }
  turns.softmax.next();
}

}  // namespace dsv32
