// What four adjacent tokens have selected between them; no CUDA headers, so that the bindings need none.
#pragma once

#include <cstdint>

namespace dsv32 {

constexpr int kMaxUnionSlots = 2048;  // of a token

struct SlotUnionArguments {
  const int32_t* topk_slot;  // [num_groups, 4, num_slots]
  const int32_t* num_valid;  // [num_groups, 4]
  int32_t* union_slot;       // [num_groups, 4 * num_slots]; past the number, nothing is written
  int32_t* num_union;        // [num_groups]
  // [num_groups, ceil(4 * num_slots / 64), 4]: of each of the four tokens which of 64 slots it has selected, as
  // sparse_mla_bf16_seen.cuh has it. Of no slot in tiles without any, which are not written, and after the last one.
  uint64_t* seen;
  int num_groups;
  int num_slots;
};

// A slot that a token has more than once is as often in the union: what is more than one of each token is its own.
// Slots are in the order of the tokens and then in theirs. Returns null, or what went wrong.
const char* launch_slot_union(const SlotUnionArguments& arguments, void* stream);

}  // namespace dsv32
