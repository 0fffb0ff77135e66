// Copies of queries, and of rows of the cache, to shared memory: by the warpgroups that sum, which else wait for most
// of the time, and who know when a stage is free.
//
// Eight lanes copy 128 bytes of a row, chunks of 16, to one row of a panel. Each warp has eight rows of either part of
// a tile; lane r of its first 16 knows where row r is.
#pragma once

#include "sparse_mla_bf16_block.cuh"

namespace dsv32::wide::bf16 {

constexpr int kRowsOfWarp = kKeysOfPart / 4;  // of a part

// Panels of a part of a tile, from a byte of its rows on; of rows that are null, zeros.
template <int kCount>
__device__ __forceinline__ void copy_panels(uint32_t panels, int first_byte, const uint8_t* row,
                                            const SparseMlaArguments& p, int part, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < kRowsOfWarp; i += 4) {
    const int of_warp = i + lane / 8;
    const auto* source = reinterpret_cast<const uint8_t*>(__shfl_sync(
        0xffffffffu, reinterpret_cast<unsigned long long>(row), part * kRowsOfWarp + of_warp));
    const bool exists = source != nullptr;
    source = (exists ? source : static_cast<const uint8_t*>(p.q)) + first_byte + lane % 8 * 16;
    const uint32_t chunk = panels + chunk_offset(part * kKeysOfPart + warp * kRowsOfWarp + of_warp, lane % 8);
#pragma unroll
    for (int panel = 0; panel < kCount; ++panel) {
      copy_chunk_if(exists, chunk + panel * kPanelNbytes, source + panel * kPanelColumns * 2);
    }
  }
}

// The tile that is to be copied next, as a lane has it. Of each work with keys, queries are the first.
struct Source {
  const SparseMlaArguments& p;
  int num_splits;
  int index;  // of the work
  int row_in_tile;
  int tile = -1;  // of the queries
  int num_keys = 0;
  const int32_t* slots = nullptr;
  int slot = 0;
  int slot_ahead = 0;  // of what is fetched to the second-level cache next

  __device__ __forceinline__ Source(const SparseMlaArguments& arguments, int splits, int warp, int lane)
      : p(arguments),
        num_splits(splits),
        index(blockIdx.x),
        row_in_tile(lane / kRowsOfWarp % kParts * kKeysOfPart + warp * kRowsOfWarp + lane % kRowsOfWarp) {
    open_work();
  }

  __device__ __forceinline__ bool has_tile() const { return index < num_works<1>(p, num_splits); }

  // Null if there is none. What the cache has past the last key may be NaN, so zeros are copied.
  __device__ __forceinline__ const uint8_t* row() const {
    if (tile >= 0) {
      return tile * kTileKeys + row_in_tile < num_keys ? row_of_slot<kLatentBf16Nbytes>(p, slot) : nullptr;
    }
    const HeadTile<kTileHeads> heads(p, index / num_splits);
    const int64_t row = static_cast<int64_t>(heads.token) * p.num_heads + heads.first_head + row_in_tile;
    return row_in_tile < heads.num_heads ? static_cast<const uint8_t*>(p.q) + row * kLatentBf16Nbytes : nullptr;
  }

  // Each half of the block fetches rows of one part.
  __device__ __forceinline__ void next(int half, int lane) {
    ++tile;
    if (tile * kTileKeys >= num_keys) {
      index += gridDim.x;
      open_work();
      return;
    }
    slot = load_slot(tile);
    if (kTilesAhead > 0) {
      const bool exists = (tile + kTilesAhead) * kTileKeys + row_in_tile < num_keys;
      if (lane / kRowsOfWarp == half && exists) {
        prefetch_bulk(row_of_slot<kLatentBf16Nbytes>(p, slot_ahead), kLatentBf16Nbytes);
      }
      slot_ahead = load_slot(tile + kTilesAhead + 1);
    }
  }

  // The first from this index on that has keys.
  __device__ __forceinline__ void open_work() {
    for (; has_tile(); index += gridDim.x) {
      const Work work = work_of_index<1>(p, index, num_splits);
      if (work.num_tiles > 0) {
        num_keys = work.num_keys;
        slots = work.slots;
        tile = -1;
        if (kTilesAhead > 0) {
          slot_ahead = load_slot(kTilesAhead);
        }
        return;
      }
    }
  }

  __device__ __forceinline__ int load_slot(int of_tile) const {
    const int key = of_tile * kTileKeys + row_in_tile;
    return load_if(key < num_keys, slots + key);
  }
};

}  // namespace dsv32::wide::bf16
