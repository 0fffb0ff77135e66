// What blocks for 64 heads compute at a time, on either format of the cache.
#pragma once

#include "panels.cuh"
#include "sparse_mla_work.cuh"

namespace dsv32::wide {

constexpr int kTileHeads = 64;  // of a block: the rows of both products
static_assert(kTileHeads == kPanelRows && kTileKeys == kPanelRows);

// Two blocks of a cluster have the same token and split, and heads each of its own.
template <int kBlocks>
__device__ __forceinline__ int rank_in_cluster() {
  return blockIdx.x % kBlocks;
}

// The part of the problem that a block computes at a time: a split of the keys of a token, as keys_of_split of
// vllm_dsv32/kernels/sparse_mla_join_triton.py has it.
struct Work : HeadTile<kTileHeads> {
  int num_keys;  // of the split
  int num_tiles;
  const int32_t* slots;  // of these keys

  __device__ __forceinline__ Work(const SparseMlaArguments& p, int index, int split, int num_splits)
      : HeadTile(p, index) {
    const int num_valid = max(0, min(p.num_valid[token], p.num_slots));
    // Whole tiles, at least one, so that few keys leave splits empty.
    const int keys_of_split = (num_valid + num_splits - 1) / num_splits;
    const int tiles_of_split = max(1, (keys_of_split + kTileKeys - 1) / kTileKeys);
    const int begin = split * tiles_of_split * kTileKeys;
    num_keys = max(0, min(tiles_of_split * kTileKeys, num_valid - begin));
    num_tiles = (num_keys + kTileKeys - 1) / kTileKeys;
    slots = p.topk_slot + static_cast<int64_t>(token) * p.num_slots + begin;
  }
};

// Of clusters of so many blocks.
template <int kBlocks>
__host__ __device__ __forceinline__ int num_works(const SparseMlaArguments& p, int num_splits) {
  return p.num_tokens * num_head_tiles(p.num_heads, kTileHeads) / kBlocks * num_splits;
}

template <int kBlocks>
__device__ __forceinline__ Work work_of_index(const SparseMlaArguments& p, int index, int num_splits) {
  return Work(p, index / num_splits * kBlocks + rank_in_cluster<kBlocks>(), index % num_splits, num_splits);
}

// Of what is given out, the first row: of tokens, splits, heads.
__device__ __forceinline__ int64_t first_row(const SparseMlaArguments& p, const Work& work, int split,
                                             int num_splits) {
  return (static_cast<int64_t>(work.token) * num_splits + split) * p.num_heads + work.first_head;
}

// The works of a block, those of its cluster: one after the other, so that rows of the next one are on their way while
// the last one is stored.
template <int kBlocks, class Compute>
__device__ __forceinline__ void for_each_work(const SparseMlaArguments& p, int num_splits, Compute compute) {
  for (int index = blockIdx.x / kBlocks; index < num_works<kBlocks>(p, num_splits); index += gridDim.x / kBlocks) {
    const Work work = work_of_index<kBlocks>(p, index, num_splits);
    compute(work, first_row(p, work, index % num_splits, num_splits));
  }
}

}  // namespace dsv32::wide
