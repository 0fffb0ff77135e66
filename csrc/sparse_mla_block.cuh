// What the warps of a block share: its sizes, its shared memory, its work.
#pragma once

#include "ptx.cuh"
#include "sparse_mla_work.cuh"
#include "warp_barriers.cuh"

namespace dsv32 {

constexpr int kTileHeads = 16;  // of a block: the rows of both products

constexpr int kWarpgroup = 128;
constexpr int kNumScoreWarps = 4;  // 16 keys of a tile each
constexpr int kNumValueWarps = 8;  // 64 columns of the output each
constexpr int kNumThreads = 4 * kWarpgroup;
constexpr int kNumCopyWarps = 4;
constexpr int kKeysOfWarp = kTileKeys / kNumScoreWarps;
constexpr int kDimsOfWarp = kKvLoraRank / kNumValueWarps;

// Of a thread of each warpgroup. Scores, whose queries stay in registers, take what the others give.
constexpr int kScoreRegisters = 240;
constexpr int kValueRegisters = 120;
constexpr int kCopyRegisters = 32;
static_assert((kScoreRegisters + 2 * kValueRegisters + kCopyRegisters) * kWarpgroup <= 65536);

constexpr int kLatentSteps = kKvLoraRank / 16;  // of products over 16 columns
constexpr int kRopeSteps = kRopeDim / 16;
constexpr int kSteps = kLatentSteps + kRopeSteps;

constexpr int kStages = 4;  // of rows
constexpr int kWeightStages = 2;
// A row of weights, in values. An odd multiple of 16 bytes: eight rows at the same column do not conflict.
constexpr int kWeightPitch = kTileKeys + 8;
// A row of queries, in values. An odd multiple of 16 bytes, too.
constexpr int kQueryPitch = kLatentDim + 8;
// A row of the output of a split, in values: rows that a quarter of a warp writes together lie in other banks.
constexpr int kOutPitch = kKvLoraRank + 16;

// Barriers of threads; 0 is __syncthreads, which all of them call once.
constexpr int kScoreBarrier = 1;
constexpr int kValueBarrier = 2;

struct Shared {
  alignas(128) uint8_t rows[kStages][kTileKeys][kLatentFp8Nbytes];
  // In float16: weights times the scale of each group.
  alignas(16) uint16_t weights[kWeightStages][kNumGroups][kTileHeads][kWeightPitch];
  // The latent part in float16, times a power of two for each head, whose reciprocals are the factors.
  alignas(16) uint16_t queries[kTileHeads][kQueryPitch];
  alignas(16) float query_factors[kTileHeads];
  alignas(16) float maxima[2][kTileHeads][kNumScoreWarps];
  alignas(16) float totals[2][kTileHeads][kNumScoreWarps];
  alignas(16) float shrink[kWeightStages][kTileHeads];
  // Of all keys of the block: what was subtracted from scores, which are to the base 2; the sum of weights.
  alignas(16) float2 softmax[kTileHeads];
  uint64_t rows_full[kStages];
  uint64_t rows_free[kStages];
  uint64_t weights_full[kWeightStages];
  uint64_t weights_free[kWeightStages];
  uint64_t maxima_full;
  uint64_t softmax_full;
  uint64_t softmax_free;
};

static_assert(sizeof(Shared) <= 227 * 1024);
// The output of a split takes the place of the first rows, once all are used.
static_assert(kTileHeads * kOutPitch * 4 <= kTileKeys * kLatentFp8Nbytes);

// The place of a block in the launch. Clusters of more than one block have one work; blocks that stand alone take one
// work after the other, so that rows of the next one arrive while the last one is finished.
struct Place {
  int rank;  // of the block in its cluster
  int num_splits;
  int first_work;
  int stride;
  int num_works;

  __device__ __forceinline__ Place(const SparseMlaArguments& p, int splits) {
    num_splits = splits;
    rank = blockIdx.x % splits;
    first_work = blockIdx.x / splits;
    stride = gridDim.x / splits;
    num_works = p.num_tokens * num_head_tiles(p.num_heads, kTileHeads);
  }
};

// The part of the problem that a block computes at a time.
struct Work : HeadTile<kTileHeads> {
  // Tiles go round the blocks of a cluster, so that where the first one's slots are is known before the count of keys.
  const int32_t* slots;  // from the first tile of this block on, those of other blocks included
  int num_slots;         // from there on
  int num_keys;          // from there on
  int keys_to_next_tile;

  __device__ __forceinline__ Work(const SparseMlaArguments& p, const Place& place, int index) : HeadTile(p, index) {
    const int begin = place.rank * kTileKeys;
    keys_to_next_tile = place.num_splits * kTileKeys;
    slots = p.topk_slot + static_cast<int64_t>(token) * p.num_slots + begin;
    num_slots = p.num_slots - begin;
    num_keys = min(p.num_valid[token], p.num_slots) - begin;
  }

  // Of a whole token.
  __device__ __forceinline__ bool is_passed_over() const { return num_keys < 0; }

  // From a tile of this block on; none or less: there is no such tile.
  __device__ __forceinline__ int keys_left(int tile) const { return num_keys - tile * keys_to_next_tile; }
};

// Of works that are passed over, the last in a row of them from this one on. By all lanes of a warp.
__device__ __forceinline__ int last_passed_over(const SparseMlaArguments& p, const Place& place, int index, int lane) {
  for (;; index += 32 * place.stride) {
    const int of_lane = index + lane * place.stride;
    const bool ends = of_lane >= place.num_works || !Work(p, place, of_lane).is_passed_over();
    const uint32_t lanes = __ballot_sync(0xffffffffu, ends);
    if (lanes != 0) {
      return index + (__ffs(static_cast<int>(lanes)) - 2) * place.stride;
    }
  }
}

}  // namespace dsv32
