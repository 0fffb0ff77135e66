// The launch of the operation index_logits on SM 90; no CUDA headers, so that operators need none.
#pragma once

#include <cstdint>

namespace dsv32 {

constexpr int kIndexHeads = 64;
constexpr int kIndexTileKeys = 64;  // no tile is of two blocks

struct IndexLogitsArguments {
  const uint8_t* q;            // e4m3 [num_rows, 64, 128]
  const float* weights;        // [num_rows, 64]
  const uint8_t* cache;        // index keys, block after block
  const int32_t* block_table;  // a request every block_table_stride
  const int32_t* request_ids;  // [num_rows]; rows of a request are adjacent
  const int32_t* num_keys;     // [num_rows]
  float* logits;               // [num_rows, length], a row every logits_stride
  int64_t page_nbytes;         // from block to block, a multiple of 16, as are q, weights and cache
  int64_t block_table_stride;
  int64_t logits_stride;
  int num_rows;
  int num_blocks;
  int block_size;  // a multiple of 64
  int length;      // at least that of the longest row
};

// Of the current device; returns null, or what went wrong.
const char* launch_index_logits(const IndexLogitsArguments& arguments, void* stream);

}  // namespace dsv32
