// What the kernels of sparse_mla share: tiles of keys and of heads, rows of the cache.
#pragma once

#include <cstdint>

#include "layout.h"
#include "roles.cuh"
#include "sparse_mla_sm90.h"

namespace dsv32 {

constexpr int kTileKeys = 64;

__host__ __device__ __forceinline__ int num_head_tiles(int num_heads, int tile_heads) {
  return (num_heads + tile_heads - 1) / tile_heads;
}

// Heads of a token; the index counts those of all tokens.
template <int kTileHeads>
struct HeadTile {
  int token;
  int first_head;
  int num_heads;  // that exist, from the first on; the others are computed as zeros and not stored

  __device__ __forceinline__ HeadTile(const SparseMlaArguments& p, int index) {
    const int num_tiles = num_head_tiles(p.num_heads, kTileHeads);
    token = index / num_tiles;
    first_head = index % num_tiles * kTileHeads;
    num_heads = min(kTileHeads, p.num_heads - first_head);
  }
};

template <int kRowNbytes = kLatentFp8Nbytes>
__device__ __forceinline__ const uint8_t* row_of_slot(const SparseMlaArguments& p, int slot) {
  const unsigned block = static_cast<unsigned>(slot) / static_cast<unsigned>(p.block_size);
  const unsigned offset = slot - block * p.block_size;
  return p.cache + block * p.page_nbytes + offset * kRowNbytes;
}

}  // namespace dsv32
