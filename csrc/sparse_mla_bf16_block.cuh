// What the warps of a block for 64 heads and a bfloat16 cache share: its sizes, its shared memory, and what is tuned.
#pragma once

#include "ptx.cuh"
#include "sparse_mla_wide_work.cuh"
#include "warp_barriers.cuh"

namespace dsv32::wide::bf16 {

// ---- what is tuned ----------------------------------------------------------------------------------------------

// Whether weights of a tile are handed over once most of the scores of the next one are computed. The tensor cores then
// have the sums of one tile to compute during the softmax of the next, and little delays the scores that it waits for.
constexpr bool kScoresFirst = true;

// So many products of scores are left then, of 16 columns each: they take as long as sums take to start.
constexpr int kLastSteps = 8;

// How it is told that rows have been copied. By the copies themselves, as arrivals that the barrier expects (kCopies)
// or in addition to those of warps (kCopiesAndWarps): who waits then fences for products to see rows. Or by threads
// that have waited for a tile's copies, and fenced, once those of the next tile are on their way (kThreads).
enum class Arrival { kCopies, kCopiesAndWarps, kThreads };
constexpr Arrival kArrival = Arrival::kCopies;

// Whether the first half of a tile's keys is copied while the second half of those in their place is summed.
constexpr bool kCopyByParts = true;

// How many tiles before they are copied rows are fetched to the second-level cache; 0: they are not.
constexpr int kTilesAhead = 0;

// What is subtracted from scores is moved when weights would be more than two to the power of this.
constexpr float kSlack = 8.0f;

// -----------------------------------------------------------------------------------------------------------------

constexpr int kWarpgroup = 128;
constexpr int kNumThreads = 3 * kWarpgroup;

// Of a thread of the warpgroups of scores and of values: together what the launch gives them, 168 each.
constexpr int kScoreRegisters = 184;
constexpr int kValueRegisters = 160;
static_assert(kScoreRegisters + 2 * kValueRegisters <= 3 * 168);

constexpr int kNumPanels = kLatentDim / kPanelColumns;
constexpr int kLatentPanels = kKvLoraRank / kPanelColumns;
constexpr int kRopePanel = kNumPanels - 1;
static_assert(kRopeDim == kPanelColumns);

// Each warpgroup that sums takes half of the latents, and copies them. The right one copies what is rotated too.
constexpr int kLeft = 0;
constexpr int kRight = 1;
constexpr int kPanelsOfHalf = kLatentPanels / 2;
constexpr int kNumValueWarps = 8;

constexpr int kStages = 3;  // of rows
constexpr int kParts = 2;   // of a tile's keys, which are copied one after the other
constexpr int kKeysOfPart = kTileKeys / kParts;

// Of the latent columns of queries, for the last ones there are no registers.
constexpr int kLastColumns = 16;
constexpr int kHeldColumns = kKvLoraRank - kLastColumns;

// Barriers of threads; 0 is __syncthreads, which all of them call once.
constexpr int kScoreBarrier = 1;
constexpr int kValueBarrier = 2;  // of the left warpgroup; the right one has the next

struct Shared {
  // Of the queries of a work, heads as rows, then of its keys. Once the scores of a tile are computed, its weights, of
  // heads as rows and keys as columns, take the place of what is rotated.
  alignas(kPanelAlignment) uint8_t rows[kStages][kNumPanels][kPanelNbytes];
  alignas(kPanelAlignment) uint8_t rope_queries[kPanelNbytes];
  alignas(128) uint8_t last_queries[kTileHeads * kLastColumns * 2];
  // Of sums, by two heads: before the weights of the stage a power of two in bfloat16, and in the end.
  uint32_t factors[kStages][kTileHeads / 2];
  float2 normalisers[kTileHeads / 2];
  uint64_t rows_full[kStages];
  uint64_t weights_full[kStages];  // or: queries were taken
  uint64_t weights_free[kStages];  // of the left warpgroup: the right one may copy to their place
  uint64_t normalisers_full;
  uint64_t normalisers_free;
};
static_assert(sizeof(Shared) <= 227 * 1024);
static_assert(kTileHeads * kTileKeys * 2 == kPanelNbytes);

// Where the two heads of a thread, rows g and g + 8 of its warp's 16, have what is held by two heads.
__device__ __forceinline__ int pair_of_heads(int warp, int lane) { return warp * 8 + lane / 4; }

}  // namespace dsv32::wide::bf16
