// Sums of a warpgroup: half of the latents of all rows, by the weights of the rows; and what becomes of them.
#pragma once

#include "sparse_mla_store.cuh"
#include "sparse_mla_wide_block.cuh"
#include "wgmma.cuh"

namespace dsv32::wide {

// Weights are operands of products over 16 keys. Of both, wgmma.cuh says what a thread has.
using Weights = uint32_t[kValueSteps][4];
using Sums = float[kGroupsOfHalf][kLatentGroupSize / 2];

// Seldom by anything but one.
__device__ __forceinline__ void rescale(Sums& sums, float2 factor) {
  if (__any_sync(0xffffffffu, factor.x != 1.0f || factor.y != 1.0f)) {
#pragma unroll
    for (int group = 0; group < kGroupsOfHalf; ++group) {
#pragma unroll
      for (int i = 0; i < kLatentGroupSize / 2; ++i) {
        sums[group][i] *= i % 4 < 2 ? factor.x : factor.y;
      }
    }
  }
}

__device__ __forceinline__ void load_weights(Weights& weights, const Shared& shared, int thread) {
#pragma unroll
  for (int step = 0; step < kValueSteps; ++step) {
    const uint4 a = shared.weights[step][thread];
    weights[step][0] = a.x, weights[step][1] = a.y, weights[step][2] = a.z, weights[step][3] = a.w;
  }
}

// Starts the products of a tile, a group of their own.
template <int kHalf>
__device__ __forceinline__ void start_values(Sums& sums, const Weights& weights, const Shared& shared, int stage) {
  const uint64_t rows = describe_rows(shared_address(shared.rows[stage][kHalf * kPanelsOfHalf]));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kValueSteps; ++step) {
#pragma unroll
    for (int group = 0; group < kGroupsOfHalf; ++group) {
      multiply(sums[group], weights[step], at_column(at_row(rows, step * 16), group * kLatentGroupSize));
    }
  }
  wgmma_commit();
}

// A split gives out what it has in float32, and its logarithm to the base 2.
template <int kHalf>
__device__ __forceinline__ void store_sums(const Sums& sums, float2 factor, const SparseMlaArguments& p,
                                           const Work& work, int64_t first_row, bool is_split, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = warp * 16 + g + 8 * half;
    if (head >= work.num_heads) {
      continue;
    }
    const int64_t row = first_row + head;
    const float f = half == 0 ? factor.x : factor.y;
#pragma unroll
    for (int group = 0; group < kGroupsOfHalf; ++group) {
#pragma unroll
      for (int unit = 0; unit < 8; ++unit) {
        const float* even = &sums[group][unit * 4 + 2 * half];  // a pair
        const float* odd = even + 8 * 4;
        const int dim = (kHalf * kGroupsOfHalf + group) * kLatentGroupSize + unit * 16 + 4 * t;
        const float4 quad = make_float4(even[0] * f, even[1] * f, odd[0] * f, odd[1] * f);
        if (is_split) {
          *reinterpret_cast<float4*>(static_cast<float*>(p.out) + row * kKvLoraRank + dim) = quad;
        } else {
          store_quad(p, row, dim, quad);
        }
      }
    }
  }
}

// Where the second warpgroup is in what it shares with the others.
struct ValueTurns {
  Turn<kStages> rows;
  Turn<1> weights;
};

// Of the two heads of a thread.
__device__ __forceinline__ float2 load_factors(const Shared& shared, int warp, int lane) {
  const float* factors = &shared.factors[warp * 16 + lane / 4];
  return make_float2(factors[0], factors[8]);
}

template <int kBlocks>
__device__ __forceinline__ void sum_right_half(Sums& sums, ValueTurns& turns, Shared& shared, int num_tiles, int warp,
                                               int lane) {
  const int thread = warp * 32 + lane;
  for (int tile = 0; tile < num_tiles; ++tile, turns.rows.next(), turns.weights.next()) {
    const int stage = turns.rows.stage;
    mbarrier_wait(&shared.weights_full, turns.weights.parity);
    Weights weights;
    load_weights(weights, shared, thread);
    const float2 factor = load_factors(shared, warp, lane);
    arrive_for_warp(lane, &shared.weights_free);
    rescale(sums, factor);
    // Full before the weights were; waiting for it makes what was decoded visible here too.
    wait_for_rows<kRight, kBlocks>(shared, turns.rows);
    start_values<kRight>(sums, weights, shared, stage);
    wgmma_wait<0>(sums[0], sums[1]);
    // The scores of these rows were computed before their weights were: nobody else reads this half any more.
    free_rows<kRight, kBlocks>(shared, stage, lane);
  }
}

}  // namespace dsv32::wide
