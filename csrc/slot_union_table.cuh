// A table of slots in shared memory, and which tokens have selected each.
#pragma once

#include "ptx.cuh"
#include "slot_union_sm90.h"
#include "sparse_mla_bf16_seen.cuh"

namespace dsv32::slot_union {

// ---- what is tuned ----------------------------------------------------------------------------------------------

constexpr int kThreads = 1024;
constexpr int kBlocksAtOnce = 2;  // of a multiprocessor
constexpr int kCapacity = 12288;  // of the table, in slots

// -----------------------------------------------------------------------------------------------------------------

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kWarps = kThreads / 32;
constexpr int kRounds = kMaxUnionSlots / kThreads;  // of the threads, for the slots of a token
constexpr int kMaxUnion = kUnionTokens * kMaxUnionSlots;
constexpr int kWordsOfToken = kMaxUnionSlots / 32;
constexpr int kWords = kUnionTokens * kWordsOfToken;
static_assert(kRounds * kThreads == kMaxUnionSlots && kWords % 32 == 0);
static_assert(kCapacity > kMaxUnion && kCapacity % 4 == 0);

constexpr uint32_t kNone = 0xffffffffu;  // no slot, and more than any index

struct Shared {
  alignas(16) uint32_t slots[kCapacity];
  // The least index at which the token that is looked at has the slot: see code_of_index. In the end, of each place
  // in the union which tokens see it.
  alignas(16) uint32_t least[kCapacity];
  alignas(16) uint8_t tokens[kCapacity];  // that have the slot, a bit each
  // Of all slots, 32 a word: which have a place in the union, and the place of the first.
  uint32_t has_place[kWords];
  int first_place[kWords];
  int num_union;
  int num_distinct;  // of slots of the tokens that are looked at first
};
static_assert(sizeof(Shared) <= (227 / kBlocksAtOnce - 1) * 1024);

// Less for each token than for those before it, so that nobody has to forget these.
__device__ __forceinline__ uint32_t code_of_index(int token, int index) {
  return (kUnionTokens - 1 - token) * kMaxUnionSlots + index;
}

__device__ __forceinline__ void clear_table(Shared& shared, int thread) {
  const uint4 none = make_uint4(kNone, kNone, kNone, kNone), zeros = make_uint4(0, 0, 0, 0);
  if (thread == 0) {
    shared.num_distinct = 0;
  }
  for (int i = thread; i < kCapacity / 4; i += kThreads) {
    reinterpret_cast<uint4*>(shared.slots)[i] = none;
    reinterpret_cast<uint4*>(shared.least)[i] = none;
  }
  for (int i = thread; i < kCapacity / 16; i += kThreads) {
    reinterpret_cast<uint4*>(shared.tokens)[i] = zeros;
  }
}

// Where a slot is, or from now on is; then it is new. Which one that is depends on who comes first, and nothing that is
// given out does.
__device__ __forceinline__ int entry_of_slot(Shared& shared, uint32_t slot, bool& is_new) {
  const uint32_t hash = slot * 2654435769u;
  int entry = static_cast<int>(static_cast<uint64_t>(hash) * kCapacity >> 32);
  for (;;) {
    const uint32_t found = atomicCAS(&shared.slots[entry], kNone, slot);
    if (found == kNone || found == slot) {
      is_new = found == kNone;
      return entry;
    }
    entry = entry + 1 == kCapacity ? 0 : entry + 1;
  }
}

}  // namespace dsv32::slot_union
