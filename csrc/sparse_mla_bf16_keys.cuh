// Which keys of a tile have weights, for the rows of a warp.
#pragma once

#include "ptx.cuh"
#include "sparse_mla_bf16_block.cuh"
#include "sparse_mla_bf16_seen.cuh"
#include "sparse_mla_wide_softmax.cuh"

namespace dsv32::wide::bf16 {

// All that the tile has.
struct AllKeys {
  struct Source {};
  // What is subtracted from scores before there is any.
  static constexpr float kLowest = -INFINITY;

  __device__ __forceinline__ AllKeys(Source, const SparseMlaArguments&, int, int, int) {}

  // Whether nothing is given out of a work.
  __device__ __forceinline__ static bool leave(const SparseMlaArguments&, int) { return false; }

  // Scores of others become minus infinity. num_keys: of this tile and those that follow.
  __device__ __forceinline__ void hide_others(Scores& scores, int num_keys, int lane) {
    hide_past_last(scores, num_keys, lane);
  }
};

// Those that the token of the warp has selected: its 16 rows are the heads of one of four tokens.
struct SelectedKeys {
  using Source = const uint16_t*;  // [num_works, num_tiles, 4 tokens, 4 threads], bits of sparse_mla_bf16_seen.cuh
  // Until a token meets a key of its own, all its scores are minus infinity, of which nothing but a number can be
  // subtracted. Weights are then zero, and so are sums.
  static constexpr float kLowest = -3.4028234663852886e38f;

  Source words;
  int next;       // an index to them
  uint32_t word;  // of the tile that is scored; it is loaded a tile ahead

  __device__ __forceinline__ SelectedKeys(Source source, const SparseMlaArguments& p, int index, int warp, int lane)
      : words(source), next((index * ((p.num_slots + kTileKeys - 1) / kTileKeys) * kUnionTokens + warp) * 4 + lane % 4) {
    word = load_half_if(true, words + next);
  }

  // Tokens that are not united.
  __device__ __forceinline__ static bool leave(const SparseMlaArguments& p, int index) {
    return p.num_valid[index] == kNotUnited;
  }

  // Of a tile, all bits past its last key are zero.
  __device__ __forceinline__ void hide_others(Scores& scores, int num_keys, int) {
    const uint32_t bits = word;
    next += kUnionTokens * 4;
    word = load_half_if(num_keys > kTileKeys, words + next);
#pragma unroll
    for (int i = 0; i < kTileKeys / 2; ++i) {
      scores[i] = (bits >> (i / 4 * 2 + i % 2) & 1) != 0 ? scores[i] : -INFINITY;
    }
  }
};

}  // namespace dsv32::wide::bf16
