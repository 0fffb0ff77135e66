// The launch of the operation topk_select on SM 90; no CUDA headers, so that operators need none.
#pragma once

#include <cstdint>

namespace dsv32 {

struct TopkSelectArguments {
  const float* logits;         // [num_rows, length], a row every logits_stride
  const int32_t* num_keys;     // [num_rows]
  const int32_t* request_ids;  // [num_rows]
  const int32_t* block_table;  // a request every block_table_stride
  int32_t* topk_slot;          // [num_rows, k], a row every topk_slot_stride
  int64_t logits_stride;
  int64_t block_table_stride;
  int64_t topk_slot_stride;
  int num_rows;
  int length;
  int k;
  int block_size;
};

constexpr int kMaxTopk = 2048;
constexpr int kMaxTopkCluster = 8;

// A row is divided among the blocks of a cluster: 1, 2, 4 or 8. The clusters that the current device runs at once are
// counted. Both functions return null, or what went wrong.
const char* launch_topk_select(const TopkSelectArguments& arguments, int cluster_size, void* stream);
const char* count_topk_select_clusters(int cluster_size, int* count);

}  // namespace dsv32
