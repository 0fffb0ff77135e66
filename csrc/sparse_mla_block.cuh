// What the warps of a block share: its sizes, its shared memory, its work.
#pragma once

#include <cuda_bf16.h>

#include "layout.h"
#include "ptx.cuh"
#include "sparse_mla_sm90.h"

namespace dsv32 {

constexpr int kTileHeads = 16;  // of a block: the rows of both products
constexpr int kTileKeys = 64;

constexpr int kWarpgroup = 128;
constexpr int kNumScoreWarps = 4;  // 16 keys of a tile each
constexpr int kNumValueWarps = 8;  // 64 columns of the output each
constexpr int kNumThreads = 4 * kWarpgroup;
constexpr int kKeysOfWarp = kTileKeys / kNumScoreWarps;
constexpr int kDimsOfWarp = kKvLoraRank / kNumValueWarps;

// Of a thread of each warpgroup. Scores, whose queries stay in registers, take what the others give.
constexpr int kScoreRegisters = 224;
constexpr int kValueRegisters = 120;
constexpr int kCopyRegisters = 40;
static_assert((kScoreRegisters + 2 * kValueRegisters + kCopyRegisters) * kWarpgroup <= 65536);

constexpr int kLatentSteps = kKvLoraRank / 16;  // of products over 16 columns
constexpr int kRopeSteps = kRopeDim / 16;
constexpr int kSteps = kLatentSteps + kRopeSteps;

constexpr int kStages = 4;  // of rows
constexpr int kWeightStages = 2;
// A row of weights, in values. An odd multiple of 16 bytes: eight rows at the same column do not conflict.
constexpr int kWeightPitch = kTileKeys + 8;
// A row of the output of a split, in values: rows that a quarter of a warp writes together lie in other banks.
constexpr int kOutPitch = kKvLoraRank + 16;

// Barriers of threads; 0 is __syncthreads, which all of them call once.
constexpr int kScoreBarrier = 1;
constexpr int kValueBarrier = 2;

__host__ __device__ __forceinline__ int num_head_tiles(int num_heads) {
  return (num_heads + kTileHeads - 1) / kTileHeads;
}

struct Shared {
  alignas(128) uint8_t rows[kStages][kTileKeys][kLatentFp8Nbytes];
  // Weights times the scale of each group, times 2^60.
  alignas(16) __nv_bfloat16 weights[kWeightStages][kNumGroups][kTileHeads][kWeightPitch];
  alignas(16) float maxima[2][kTileHeads][kNumScoreWarps];
  alignas(16) float totals[2][kTileHeads][kNumScoreWarps];
  alignas(16) float shrink[kWeightStages][kTileHeads];
  alignas(16) float2 softmax[kTileHeads];  // of all keys of the block: the maximum, to the base 2; the denominator
  uint64_t rows_full[kStages];
  uint64_t rows_free[kStages];
  uint64_t weights_full[kWeightStages];
  uint64_t weights_free[kWeightStages];
  uint64_t softmax_full;
  uint64_t softmax_free;
};

static_assert(sizeof(Shared) <= 227 * 1024);
// The output of a split takes the place of the first rows, once all are used.
static_assert(kTileHeads * kOutPitch * 4 <= kTileKeys * kLatentFp8Nbytes);

// Where in a ring of stages a warp is.
template <int kNumStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kNumStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

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
    num_works = p.num_tokens * num_head_tiles(p.num_heads);
  }
};

// The part of the problem that a block computes at a time.
struct Work {
  int token;
  int first_head;
  int num_heads;  // that exist, from the first on; the others are computed as zeros and not stored
  int num_keys;   // of this block
  int num_tiles;
  const int32_t* slots;  // of these keys

  __device__ __forceinline__ Work(const SparseMlaArguments& p, const Place& place, int index) {
    const int num_tiles_of_heads = num_head_tiles(p.num_heads);
    token = index / num_tiles_of_heads;
    first_head = index % num_tiles_of_heads * kTileHeads;
    num_heads = min(kTileHeads, p.num_heads - first_head);
    const int num_valid = max(0, min(p.num_valid[token], p.num_slots));
    // Whole tiles, at least one, so that few keys leave splits empty.
    const int keys_of_split = (num_valid + place.num_splits - 1) / place.num_splits;
    const int tiles_of_split = max(1, (keys_of_split + kTileKeys - 1) / kTileKeys);
    const int begin = place.rank * tiles_of_split * kTileKeys;
    num_keys = max(0, min(tiles_of_split * kTileKeys, num_valid - begin));
    num_tiles = (num_keys + kTileKeys - 1) / kTileKeys;
    slots = p.topk_slot + static_cast<int64_t>(token) * p.num_slots + begin;
  }
};

}  // namespace dsv32
