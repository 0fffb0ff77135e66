// The warpgroup that has rows of the cache copied to shared memory.
#pragma once

#include "sparse_mla_block.cuh"

namespace dsv32 {

constexpr int kRowsOfCopyWarp = kTileKeys / 4;

__device__ __forceinline__ const uint8_t* row_of_slot(const SparseMlaArguments& p, int slot) {
  const unsigned block = static_cast<unsigned>(slot) / static_cast<unsigned>(p.block_size);
  const unsigned offset = slot - block * p.block_size;
  return p.cache + block * p.page_nbytes + offset * kLatentFp8Nbytes;
}

// Four warps of 16 rows each, a row by a lane. Slots past the last key are not read, and what lies in their rows of
// shared memory is multiplied by nothing but zero.
__device__ __forceinline__ void copy_tiles(Turn<kStages>& turn, Shared& shared, const SparseMlaArguments& p,
                                           const Work& work, int warp, int lane) {
  const int key = warp * kRowsOfCopyWarp + lane % kRowsOfCopyWarp;  // of a tile
  int slot = key < work.num_keys ? work.slots[key] : 0;
  for (int tile = 0; tile < work.num_tiles; ++tile, turn.next()) {
    const int left = work.num_keys - tile * kTileKeys;
    const uint8_t* row = row_of_slot(p, slot);
    slot = key + kTileKeys < left ? work.slots[(tile + 1) * kTileKeys + key] : 0;
    uint64_t* full = &shared.rows_full[turn.stage];
    mbarrier_wait(&shared.rows_free[turn.stage], turn.parity ^ 1);
    // Other warps' rows may arrive before this: the phase cannot end without this one's arrival.
    if (warp == 0 && lane == 0) {
      mbarrier_arrive_expect(full, min(left, kTileKeys) * kLatentFp8Nbytes);
    }
    __syncwarp();
    if (lane < kRowsOfCopyWarp && key < left) {
      copy_bulk(shared.rows[turn.stage][key], row, kLatentFp8Nbytes, full);
    }
    __syncwarp();
  }
}

}  // namespace dsv32
