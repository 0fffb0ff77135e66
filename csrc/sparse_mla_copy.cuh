// The warps that have rows of the cache copied to shared memory.
#pragma once

#include "sparse_mla_block.cuh"

namespace dsv32 {

__device__ __forceinline__ const uint8_t* row_of_slot(const SparseMlaArguments& p, int slot) {
  const unsigned block = static_cast<unsigned>(slot) / static_cast<unsigned>(p.block_size);
  const unsigned offset = slot - block * p.block_size;
  return p.cache + block * p.page_nbytes + offset * kLatentFp8Nbytes;
}

constexpr int kRowsOfCopyWarp = kTileKeys / 4;

// Four warps of 16 rows each, a row at a time, as the instruction takes its addresses from uniform registers. Slots
// past the last key are not read, and what lies in their rows of shared memory is multiplied by nothing but zero.
template <class C>
__device__ __forceinline__ void copy_tiles_in_bulk(Turn<C::kStages>& turn, Shared<C>& shared,
                                                   const SparseMlaArguments& p, const Work& work, int warp,
                                                   int lane) {
  const int first = warp * kRowsOfCopyWarp;
  const int key = first + lane % kRowsOfCopyWarp;
  int slot = key < work.num_keys ? work.slots[key] : 0;
  for (int tile = 0; tile < work.num_tiles; ++tile, turn.next()) {
    const int left = work.num_keys - tile * kTileKeys;
    const uint8_t* own_row = row_of_slot(p, slot);
    slot = key + kTileKeys < left ? work.slots[(tile + 1) * kTileKeys + key] : 0;
    uint64_t* full = &shared.rows_full[turn.stage];
    mbarrier_wait(&shared.rows_free[turn.stage], turn.parity ^ 1);
    // Other warps' rows may arrive before this: the phase cannot end without this one's arrival.
    if (warp == 0 && lane == 0) {
      mbarrier_arrive_expect(full, min(left, kTileKeys) * kLatentFp8Nbytes);
    }
    __syncwarp();
    if constexpr (C::kCopies == Copies::kRowOfLane) {
      if (lane < kRowsOfCopyWarp && key < left) {
        copy_bulk(shared.rows[turn.stage][key], own_row, kLatentFp8Nbytes, full);
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRowsOfCopyWarp; ++r) {
        const auto row = reinterpret_cast<const uint8_t*>(
            __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(own_row), r));
        if (first + r < left && elect_lane()) {
          copy_bulk(shared.rows[turn.stage][first + r], row, kLatentFp8Nbytes, full);
        }
        __syncwarp();
      }
    }
    __syncwarp();
  }
}

// Four warps of 16 rows each. A row has 41 chunks of 16 bytes: lanes take the first 32 of one row after the other,
// and then the last nine of all 16 rows together.
template <class C>
__device__ __forceinline__ void copy_tiles_in_chunks(Turn<C::kStages>& turn, Shared<C>& shared,
                                                     const SparseMlaArguments& p, const Work& work, int warp,
                                                     int lane) {
  constexpr int kRows = kRowsOfCopyWarp;
  constexpr int kRest = kLatentFp8Nbytes / 16 - 32;
  const int own_key = warp * kRows + lane % kRows;
  int slot = own_key < work.num_keys ? work.slots[own_key] : 0;
  for (int tile = 0; tile < work.num_tiles; ++tile, turn.next()) {
    const int left = work.num_keys - tile * kTileKeys;
    const uint8_t* own_row = row_of_slot(p, slot);
    slot = own_key + kTileKeys < left ? work.slots[(tile + 1) * kTileKeys + own_key] : 0;
    mbarrier_wait(&shared.rows_free[turn.stage], turn.parity ^ 1);
    const uint32_t rows = shared_address(shared.rows[turn.stage][warp * kRows]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto row = reinterpret_cast<const uint8_t*>(
          __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(own_row), r));
      if (warp * kRows + r < left) {
        copy_16_bytes(rows + r * kLatentFp8Nbytes + lane * 16, row + lane * 16);
      }
    }
#pragma unroll
    for (int i = 0; i < (kRows * kRest + 31) / 32; ++i) {
      const int rest = i * 32 + lane;
      const int r = min(rest / kRest, kRows - 1);
      const int chunk = 32 + rest % kRest;
      const auto row = reinterpret_cast<const uint8_t*>(
          __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(own_row), r));
      if (rest < kRows * kRest && warp * kRows + r < left) {
        copy_16_bytes(rows + r * kLatentFp8Nbytes + chunk * 16, row + chunk * 16);
      }
    }
    mbarrier_arrive_after_copies(&shared.rows_full[turn.stage]);
  }
}

}  // namespace dsv32
