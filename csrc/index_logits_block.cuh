// What the warps of a block of index_logits share: its sizes, its shared memory, its problem.
#pragma once

#include "index_logits_sm90.h"
#include "layout.h"
#include "panels.cuh"
#include "ptx.cuh"
#include "roles.cuh"
#include "tensor_map.cuh"
#include "warp_barriers.cuh"

namespace dsv32::index_logits {

constexpr int kHeads = kIndexHeads;
constexpr int kTileKeys = kIndexTileKeys;
static_assert(kTileKeys == kPanelRows);
static_assert(kIndexHeadDim == kBoxRowNbytes);  // of fp8: as many columns as a panel has

// A block has a tile of rows and walks over tiles of their keys. Each of its warpgroups that score has some of these
// rows, in two products: one is under way while the other is summed over the heads.
constexpr int kRowsOfProduct = 2;
constexpr int kProducts = 2;
constexpr int kScoreWarpgroups = 2;
constexpr int kRowsOfWarpgroup = kProducts * kRowsOfProduct;
constexpr int kTileRows = kScoreWarpgroups * kRowsOfWarpgroup;

constexpr int kScoreWarps = kScoreWarpgroups * 4;
constexpr int kNumWarps = kScoreWarps + 4;  // of the last four, one copies; registers are a warpgroup's
constexpr int kNumThreads = kNumWarps * 32;

// Of a thread that scores, and of the others: together what the launch gives them, 168 each.
constexpr int kScoreRegisters = 232;
constexpr int kCopyRegisters = 40;
static_assert(kScoreWarpgroups * kScoreRegisters + kCopyRegisters <= (kScoreWarpgroups + 1) * 168);

constexpr int kRowsOfBox = 2;  // a box has at most 256 rows, one for each head
constexpr int kKeyStages = 8;
constexpr int kWorkStages = 2;
constexpr int kRowNbytes = kHeads * kIndexHeadDim;  // of a row's queries

// Adjacent rows of one request, and adjacent tiles of its keys. No tiles: there is no more work.
struct Work {
  int first_row;  // of the tile of rows
  int first_key;
  int num_tiles;
  int ends[kTileRows];  // how many keys each row of the tile sees; 0 of rows that are not of this work
};

struct Shared {
  alignas(kPanelAlignment) uint8_t queries[kWorkStages][kTileRows * kRowNbytes];
  alignas(kPanelAlignment) uint8_t keys[kKeyStages][kPanelNbytes];
  alignas(16) float weights[kWorkStages][kTileRows][kHeads];
  alignas(16) float scales[kKeyStages][kTileKeys];
  Work works[kWorkStages];
  uint64_t work_full[kWorkStages];
  uint64_t work_free[kWorkStages];
  uint64_t keys_full[kKeyStages];
  uint64_t keys_free[kKeyStages];
  // From which the block finds its share.
  int tiles_of_warp[kNumWarps];
  int first_row_tile;
  int first_key_tile;
};
static_assert(sizeof(Shared) <= 227 * 1024);

struct Problem {
  TensorMap queries;
  TensorMap keys;
  IndexLogitsArguments arguments;
};

}  // namespace dsv32::index_logits
