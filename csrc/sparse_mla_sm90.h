// The launch of the operation sparse_mla on SM 90; no CUDA headers, so that operators need none.
#pragma once

#include <cstdint>

namespace dsv32 {

struct SparseMlaArguments {
  const void* q;                // bfloat16 [num_tokens, num_heads, 576]
  const uint8_t* cache;         // rows in fp8_ds_mla or in bfloat16, page after page
  const int32_t* topk_slot;     // [num_tokens, num_slots]
  const int32_t* num_valid;     // [num_tokens]
  void* out;                    // bfloat16 [num_tokens, num_heads, 512]
  float* lse;                   // [num_tokens, num_heads], natural
  int64_t page_nbytes;          // from page to page, a multiple of 16
  float scale_log2;             // of the scores, times log2(e)
  int num_tokens;
  int num_heads;
  int num_slots;
  int block_size;
};

// Among how many blocks of a cluster the keys of a token can be split.
constexpr int kSplitCounts[] = {1, 2, 3, 4, 5, 6, 8, 16};

// Clusters that the current device runs at once are counted. Both functions return null, or what went wrong. With one
// split, nothing is given out for tokens of which less than no slots are valid.
const char* launch_sparse_mla(const SparseMlaArguments& arguments, int num_splits, void* stream);
const char* count_sparse_mla_clusters(int num_splits, int* count);

// The same for more heads. Of more than one split, each gives out what it has on its own: out is
// float32 [num_tokens, num_splits, num_heads, 512], lse [num_tokens, num_splits, num_heads] to the base 2, and what
// belongs to splits without keys is not written.
constexpr int kMaxWideSplits = 32;
const char* launch_sparse_mla_wide(const SparseMlaArguments& arguments, int num_splits, void* stream);
// The same of a cache in bfloat16.
const char* launch_sparse_mla_bf16_wide(const SparseMlaArguments& arguments, int num_splits, void* stream);

// Of four tokens of 16 heads each, as of one with 64, whose keys are what slot_union_sm90.h makes of theirs; seen comes
// from there too. Nothing is given out for tokens that are not united.
const char* launch_sparse_mla_bf16_union(const SparseMlaArguments& arguments, const void* seen, void* stream);

}  // namespace dsv32
