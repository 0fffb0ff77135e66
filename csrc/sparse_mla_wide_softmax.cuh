// The softmax of the two heads of a thread, where a warpgroup computes scores of 64, on either format of the cache.
#pragma once

#include "ptx.cuh"
#include "sparse_mla_store.cuh"
#include "sparse_mla_wide_work.cuh"

namespace dsv32::wide {

// Of a tile, as wgmma.cuh says what a thread has of a product: two heads, and of each eight keys two.
using Scores = float[kTileKeys / 2];

// Scores of keys that do not exist become minus infinity.
__device__ __forceinline__ void hide_past_last(Scores& scores, int num_keys, int lane) {
  if (num_keys < kTileKeys) {
    const int left = forget_origin(num_keys);  // else the compiler would select in every tile, and not branch
#pragma unroll
    for (int i = 0; i < kTileKeys / 2; ++i) {
      const int key = i / 4 * 8 + lane % 4 * 2 + i % 2;
      scores[i] = key < left ? scores[i] : -INFINITY;
    }
  }
}

// Of both heads, among the keys of the thread.
__device__ __forceinline__ float2 highest_of(const Scores& scores) {
  float2 highest = make_float2(-INFINITY, -INFINITY);
#pragma unroll
  for (int i = 0; i < kTileKeys / 2; i += 4) {
    highest.x = fmaxf(highest.x, fmaxf(scores[i], scores[i + 1]));
    highest.y = fmaxf(highest.y, fmaxf(scores[i + 2], scores[i + 3]));
  }
  return highest;
}

__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Of the two heads of a thread: what was subtracted from scores to make weights, and of its own keys alone the sum of
// their weights.
struct Softmax {
  float2 subtracted = make_float2(-INFINITY, -INFINITY);
  float2 total = make_float2(0.0f, 0.0f);

  // From now on; returns by what sums so far are to be multiplied.
  __device__ __forceinline__ float2 subtract(float2 x) {
    const float2 factor = make_float2(exp2_approximate(subtracted.x - x.x), exp2_approximate(subtracted.y - x.y));
    subtracted = x;
    total.x *= factor.x, total.y *= factor.y;
    return factor;
  }

  // Of all keys.
  __device__ __forceinline__ float2 total_of_heads() const {
    return make_float2(sum_of_quad(total.x), sum_of_quad(total.y));
  }
};

// What is to be subtracted once a tile has this candidate: the last one, while it is less by no more than the slack.
// Maxima move in many tiles, but seldom by so much.
__device__ __forceinline__ float grown(float subtracted, float candidate, float slack) {
  return candidate > subtracted + slack ? candidate : subtracted;
}

// Of a split, to the base 2.
__device__ __forceinline__ void store_lse(const Softmax& softmax, float2 total, const SparseMlaArguments& p,
                                          const Work& work, int64_t first_row, bool is_split, int warp, int lane) {
  const int head = warp * 16 + lane / 4;
  const float base = is_split ? 1.0f : kLn2;
  if (lane % 4 == 0 && head < work.num_heads) {
    p.lse[first_row + head] = lse_log2(softmax.subtracted.x, total.x) * base;
  }
  if (lane % 4 == 0 && head + 8 < work.num_heads) {
    p.lse[first_row + head + 8] = lse_log2(softmax.subtracted.y, total.y) * base;
  }
}

}  // namespace dsv32::wide
