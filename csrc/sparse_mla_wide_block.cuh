// What the warps of a block for 64 heads share: its sizes, its shared memory, its work.
#pragma once

#include "panels.cuh"
#include "ptx.cuh"
#include "sparse_mla_wide_work.cuh"
#include "warp_barriers.cuh"

namespace dsv32::wide {

constexpr int kWarpgroup = 128;
constexpr int kNumThreads = 3 * kWarpgroup;

// Of a thread of the warpgroups of scores, values and rows: together what the launch gives them, 168 each.
constexpr int kScoreRegisters = 240;
constexpr int kValueRegisters = 176;
constexpr int kRowRegisters = 88;
static_assert(kScoreRegisters + kValueRegisters + kRowRegisters <= 3 * 168);

// Columns of queries and of decoded rows are in an order in which a thread has four latents in a row to store. Of 128
// latents, which share a scale, one panel holds pairs whose index is even and the next one the others: chunk u of
// either holds the four of latents 16 u to 16 u + 15. The last panel holds what is rotated, in its own order.
constexpr int kNumPanels = kLatentDim / kPanelColumns;
constexpr int kRopePanel = kNumPanels - 1;
static_assert(kLatentGroupSize == 2 * kPanelColumns);

// Each warpgroup that sums takes half of the latents. Rows are handed on by halves; to the right one belongs what is
// rotated.
constexpr int kLeft = 0;
constexpr int kRight = 1;
constexpr int kPanelsOfHalf = kKvLoraRank / 2 / kPanelColumns;
constexpr int kGroupsOfHalf = kNumGroups / 2;

constexpr int kStages = 2;  // of rows
constexpr int kValueSteps = kTileKeys / 16;

struct Shared {
  // Latents of both are float16, relative to a power of two for each head and for each key; what is rotated is
  // bfloat16.
  alignas(kPanelAlignment) uint8_t queries[kNumPanels][kPanelNbytes];
  alignas(kPanelAlignment) uint8_t rows[kStages][kNumPanels][kPanelNbytes];
  uint32_t powers[kStages][kTileKeys];  // of keys, see sparse_mla_wide_scales.cuh
  uint4 weights[kValueSteps][kWarpgroup];  // as each thread of a warpgroup holds them as operands
  float factors[kTileHeads];               // of sums; before the first weights, what undoes the factors of queries
  uint64_t queries_full;
  uint64_t rows_full[kStages][2];  // of halves
  uint64_t rows_free[kStages][2];
  uint64_t weights_full;
  uint64_t weights_free;
};
static_assert(sizeof(Shared) <= 227 * 1024);

template <int kHalf, int kBlocks>
__device__ __forceinline__ void wait_for_rows(Shared& shared, const Turn<kStages>& turn) {
  mbarrier_wait(&shared.rows_full[turn.stage][kHalf], turn.parity);
  if (kBlocks == 2) {
    fence_async_proxy();  // the other block's threads, which wrote half of it, cannot do so here
  }
}

template <int kHalf, int kBlocks>
__device__ __forceinline__ void free_rows(Shared& shared, int stage, int lane) {
  uint64_t* barrier = &shared.rows_free[stage][kHalf];
  if (kBlocks == 1) {
    arrive_for_warp(lane, barrier);
  } else {
    arrive_for_warp_in_cluster<kBlocks>(lane, barrier);
  }
}

}  // namespace dsv32::wide
