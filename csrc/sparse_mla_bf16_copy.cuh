// Copies of queries, and of rows of the cache, to shared memory: by the warpgroups that sum, which else wait for most of
// the time, and who know when a stage is free.
//
// Eight lanes copy 128 bytes of a row, chunks of 16, to one row of a panel. Each warp has eight rows of either part of a
// tile; lane r of its first 16 knows where row r is.
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

// What is to be copied next. Of each work with keys, first the queries.
class Source {
 public:
  __device__ __forceinline__ Source(const SparseMlaArguments& p, int num_splits, int warp, int lane)
      : index_(blockIdx.x),
        row_in_tile_(lane / kRowsOfWarp % kParts * kKeysOfPart + warp * kRowsOfWarp + lane % kRowsOfWarp) {
    open_work(p, num_splits);
  }

  __device__ __forceinline__ bool has_tile(const SparseMlaArguments& p, int num_splits) const {
    return index_ < num_works<1>(p, num_splits);
  }

  // Of this lane; null if there is none. What the cache has past the last key may be NaN, so zeros are copied.
  __device__ __forceinline__ const uint8_t* row(const SparseMlaArguments& p, int num_splits) const {
    if (tile_ >= 0) {
      return tile_ * kTileKeys + row_in_tile_ < num_keys_ ? row_of_slot<kLatentBf16Nbytes>(p, slot_) : nullptr;
    }
    const HeadTile<kTileHeads> heads(p, index_ / num_splits);
    const int64_t row = static_cast<int64_t>(heads.token) * p.num_heads + heads.first_head + row_in_tile_;
    return row_in_tile_ < heads.num_heads ? static_cast<const uint8_t*>(p.q) + row * kLatentBf16Nbytes : nullptr;
  }

  // Each half of the block fetches rows of one part.
  __device__ __forceinline__ void next(const SparseMlaArguments& p, int num_splits, int half, int lane) {
    ++tile_;
    if (tile_ * kTileKeys >= num_keys_) {
      index_ += gridDim.x;
      open_work(p, num_splits);
      return;
    }
    slot_ = load_slot(tile_);
    if (kTilesAhead > 0) {
      const bool exists = (tile_ + kTilesAhead) * kTileKeys + row_in_tile_ < num_keys_;
      if (lane / kRowsOfWarp == half && exists) {
        prefetch_bulk(row_of_slot<kLatentBf16Nbytes>(p, slot_ahead_), kLatentBf16Nbytes);
      }
      slot_ahead_ = load_slot(tile_ + kTilesAhead + 1);
    }
  }

 private:
  __device__ __forceinline__ void open_work(const SparseMlaArguments& p, int num_splits) {
    for (; has_tile(p, num_splits); index_ += gridDim.x) {
      const Work work = work_of_index<1>(p, index_, num_splits);
      if (work.num_tiles > 0) {
        num_keys_ = work.num_keys;
        slots_ = work.slots;
        tile_ = -1;
        if (kTilesAhead > 0) {
          slot_ahead_ = load_slot(kTilesAhead);
        }
        return;
      }
    }
  }

  __device__ __forceinline__ int load_slot(int tile) const {
    const int key = tile * kTileKeys + row_in_tile_;
    return load_if(key < num_keys_, slots_ + key);
  }

  int index_;
  int row_in_tile_;
  int tile_ = -1;  // of the queries
  int num_keys_ = 0;
  int slot_ = 0;
  int slot_ahead_ = 0;  // of what is fetched to the second-level cache next
  const int32_t* slots_ = nullptr;
};

}  // namespace dsv32::wide::bf16
