// The warpgroup that has rows of the cache copied to shared memory.
#pragma once

#include "sparse_mla_block.cuh"

namespace dsv32 {

constexpr int kRowsOfCopyWarp = kTileKeys / kNumCopyWarps;

// By all lanes of a warp.
__device__ __forceinline__ void clear_row(uint8_t* row, int lane) {
  for (int i = lane * 16; i < kLatentFp8Nbytes; i += 32 * 16) {
    *reinterpret_cast<uint4*>(row + i) = make_uint4(0, 0, 0, 0);
  }
}

// To the second-level cache, since warps of scores wait for them with nothing else to do.
__device__ __forceinline__ void prefetch_queries(const SparseMlaArguments& p, const Work& work, int warp, int lane) {
  constexpr int kLine = 128;
  const auto* q = static_cast<const uint8_t*>(p.q) +
                  (static_cast<int64_t>(work.token) * p.num_heads + work.first_head) * kLatentDim * 2;
  for (int i = (warp * 32 + lane) * kLine; i < work.num_heads * kLatentDim * 2; i += kNumCopyWarps * 32 * kLine) {
    prefetch(q + i);
  }
}

// Four warps of 16 rows each, a row by a lane. Rows past the last key become zeros: their weights are zero, but zero
// times what was there could be NaN. Their slots are loaded, since the count of keys is on its way at the same time,
// and used for nothing.
__device__ __forceinline__ void copy_tiles(Turn<kStages>& turn, Shared& shared, const SparseMlaArguments& p,
                                           const Work& work, int warp, int lane) {
  const int first = warp * kRowsOfCopyWarp;  // of a tile
  int next = first + lane % kRowsOfCopyWarp;
  const auto load_next_slot = [&] {
    const int slot = load_if(next < work.num_slots, work.slots + next);
    next += work.keys_to_next_tile;
    return slot;
  };
  const uint8_t* row = row_of_slot(p, load_next_slot());
  for (int tile = 0; work.keys_left(tile) > 0; ++tile, turn.next()) {
    const int next_slot = load_next_slot();
    const int num_rows = max(0, min(work.keys_left(tile) - first, kRowsOfCopyWarp));
    auto& rows = shared.rows[turn.stage];
    uint64_t* full = &shared.rows_full[turn.stage];
    mbarrier_wait(&shared.rows_free[turn.stage], turn.parity ^ 1);
    if (num_rows < kRowsOfCopyWarp) {
      for (int i = num_rows; i < kRowsOfCopyWarp; ++i) {
        clear_row(rows[first + i], lane);
      }
      fence_async_proxy();
    }
    arrive_for_warp_expect(lane, full, num_rows * kLatentFp8Nbytes);
    __syncwarp();
    if (lane < num_rows) {
      copy_bulk(rows[first + lane], row, kLatentFp8Nbytes, full);
    }
    __syncwarp();
    row = row_of_slot(p, next_slot);
  }
}

}  // namespace dsv32
