// What four adjacent tokens have selected between them; no CUDA headers, so that operators need none.
#pragma once

#include <cstdint>

#include "latent_pages_sm90.h"

namespace dsv32 {

constexpr int kUnionTokens = 4;       // attended together
constexpr int kMaxUnionSlots = 2048;  // of a token
constexpr int32_t kNotUnited = -1;    // instead of a number of slots

struct SlotUnionArguments {
  const int32_t* topk_slot;  // [num_groups, 4, num_slots]
  const int32_t* num_valid;  // [num_groups, 4]
  int32_t* union_slot;       // [num_groups, 4 * num_slots]; past the number, nothing is written
  int32_t* num_union;        // [num_groups], or kNotUnited
  // [num_groups, ceil(4 * num_slots / 64), 4]: of each of the four tokens which of 64 slots it has selected, as
  // sparse_mla_bf16_seen.cuh has it. Of no slot in tiles without any, which are not written, and after the last one.
  uint64_t* seen;
  int32_t* num_left;  // [num_groups, 4]: num_valid of tokens that are not united, -1 of those that are
  PagePlaces places;  // no places: slots stay what they are
  float max_share;    // of what the tokens of a group have selected; with more in its union, it is not united
  int num_groups;
  int num_slots;
};

// A slot that a token has more than once is as often in the union: what is more than one of each token is its own.
// Slots are in the order of the tokens and then in theirs. A group whose first two tokens share so little that it is
// all but certain not to be united is not looked at any further. Returns null, or what went wrong.
const char* launch_slot_union(const SlotUnionArguments& arguments, void* stream);

}  // namespace dsv32
