// The softmax of a warp's scores, one tile after the other: from scores to weights for the sums.
//
// A weight is multiplied by the scale of each group of its row, and the products become float16. What is subtracted
// from scores is therefore the maximum not of scores, but of score + log2(greatest scale of the key) - 14: the
// greatest product is 2^14, and none overflows. Below 2^-14, that is 2^-28 of the greatest, bits are lost, and below
// 2^-39 of it a product is zero. The sum of weights stays in float32, and what was subtracted cancels.
#pragma once

#include "sparse_mla_block.cuh"
#include "sparse_mla_float16.cuh"

namespace dsv32 {

constexpr float kLog2OfGreatestWeight = 14.0f;

// Scales of two groups, of the keys of a lane in its two blocks of eight.
struct Scales {
  float2 of[2][2];

  // row: the first of these keys.
  __device__ __forceinline__ Scales(const uint8_t* row, int pair) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        of[block][i] = *reinterpret_cast<const float2*>(row + (block * 8 + i) * kLatentFp8Nbytes + kScalesOffset +
                                                        pair * 2 * static_cast<int>(sizeof(float)));
      }
    }
  }
};

// Scores of 16 keys, in two blocks of eight: a lane has heads g and g + 8 of keys 2 t and 2 t + 1 of each.
using Scores = float[2][4];

// Where in the rings that weights pass through a warp of scores is.
struct SoftmaxTurns {
  Turn<kWeightStages> weights;
  Turn<1> maxima;
};

// Of a tile, first the scores are taken, and all later: what all warps' maxima are is waited for, so there is
// something else to do meanwhile.
struct Softmax {
  float subtracted[2] = {-INFINITY, -INFINITY};  // of heads g and g + 8
  float total[2] = {};                           // of the keys of this lane
  // Of the tile whose scores were taken last:
  Scores scores;  // then weights
  const uint8_t* row;
  int maxima_set;
  float shrink[2];

  // Scores to the base 2; lift: log2 of the greatest scale of each key.
  __device__ __forceinline__ void take_scores(Shared& shared, const Scores& taken, const float (&lift)[2][2],
                                              const uint8_t* taken_row, int tile, int warp, int lane) {
    float maximum[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[block][i] = taken[block][i];
        maximum[i / 2] = fmaxf(maximum[i / 2], taken[block][i] + (lift[block][i % 2] - kLog2OfGreatestWeight));
      }
    }
    row = taken_row;
    // Two sets, in turn: a warp that writes one again has met all others since they read it.
    maxima_set = tile % 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(0xffffffffu, maximum[half], 1));
      maximum[half] = fmaxf(maximum[half], __shfl_xor_sync(0xffffffffu, maximum[half], 2));
      if (lane % 4 == 0) {
        shared.maxima[maxima_set][lane / 4 + 8 * half][warp] = maximum[half];
      }
    }
    arrive_for_warp(lane, &shared.maxima_full);
  }

  __device__ __forceinline__ void take_maxima(SoftmaxTurns& turns, Shared& shared, int lane) {
    mbarrier_wait(&shared.maxima_full, turns.maxima.parity);
    turns.maxima.next();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 m = *reinterpret_cast<const float4*>(shared.maxima[maxima_set][lane / 4 + 8 * half]);
      const float previous = subtracted[half];
      subtracted[half] = fmaxf(previous, fmaxf(fmaxf(m.x, m.y), fmaxf(m.z, m.w)));
      shrink[half] = exp2_approximate(previous - subtracted[half]);
      total[half] *= shrink[half];
    }
  }

  __device__ __forceinline__ void exponentiate() {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[block][i] = exp2_approximate(scores[block][i] - subtracted[i / 2]);
        total[i / 2] += scores[block][i];
      }
    }
  }

  // For a pair of groups, once the stage is free.
  __device__ __forceinline__ void store_weights(const SoftmaxTurns& turns, Shared& shared, int pair, int warp,
                                                int lane) const {
    const Scales scales(row, pair);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const int key = warp * kKeysOfWarp + block * 8 + lane % 4 * 2;
      const float2 low = scales.of[block][0], high = scales.of[block][1];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 weight = make_float2(scores[block][2 * half], scores[block][2 * half + 1]);
        auto& weights = shared.weights[turns.weights.stage];
        const int head = lane / 4 + 8 * half;
        *reinterpret_cast<uint32_t*>(&weights[pair * 2][head][key]) =
            pack_float16(weight.x * low.x, weight.y * high.x);
        *reinterpret_cast<uint32_t*>(&weights[pair * 2 + 1][head][key]) =
            pack_float16(weight.x * low.y, weight.y * high.y);
      }
    }
  }

  __device__ __forceinline__ void hand_over_weights(SoftmaxTurns& turns, Shared& shared, int warp, int lane) const {
    const int stage = turns.weights.stage;
    if (warp == 0 && lane % 4 == 0) {
      shared.shrink[stage][lane / 4] = shrink[0];
      shared.shrink[stage][lane / 4 + 8] = shrink[1];
    }
    arrive_for_warp(lane, &shared.weights_full[stage]);
    turns.weights.next();
  }
};

}  // namespace dsv32
