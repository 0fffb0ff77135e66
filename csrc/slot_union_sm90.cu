// What four adjacent tokens have selected between them, on SM 90.
//
// A block takes four tokens. All their slots go to a table; then, a token after the other, the least index of each slot
// says for it that it has it. A slot's place in the union belongs to the first token that has it. What a token has once
// more gets a place that only it sees: attention counts it once more too.
//
// Threads come to the table in any order. What is given out does not depend on it.
#include <cuda_runtime.h>

#include "launch.cuh"
#include "page_places.cuh"
#include "roles.cuh"
#include "slot_union_table.cuh"

namespace dsv32 {
namespace slot_union {
namespace {

constexpr int kNoEntry = -1;
constexpr int kAgain = 1 << 16;  // of an entry: the token has its slot before

// Of a thread: a slot's entry, by token and round.
using Entries = int[kUnionTokens][kRounds];
static_assert(kCapacity < kAgain);

__device__ __forceinline__ int word_of(int token, int round, int warp) {
  return token * kWordsOfToken + round * kWarps + warp;
}

// Of each token, how many slots are valid.
using Counts = int[kUnionTokens];

__device__ __forceinline__ void load_counts(Counts& counts, const SlotUnionArguments& p, int group) {
#pragma unroll
  for (int token = 0; token < kUnionTokens; ++token) {
    counts[token] = max(0, min(p.num_valid[group * kUnionTokens + token], p.num_slots));
  }
}

// Of tokens from the first on, before the last. Returns how many of the slots are new. Loads are on their way all at
// once.
template <int kFirst, int kLast>
__device__ __forceinline__ int enter_slots(Shared& shared, Entries& entries, const Counts& counts, const int32_t* slots,
                                           int num_slots, int thread) {
  int of_tokens[kLast - kFirst][kRounds];
#pragma unroll
  for (int token = kFirst; token < kLast; ++token) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int index = round * kThreads + thread;
      entries[token][round] = index < counts[token] ? 0 : kNoEntry;
      of_tokens[token - kFirst][round] = load_if(index < counts[token], slots + token * num_slots + index);
    }
  }
  if (kFirst == 0) {
    __syncthreads();  // the table is clear
  }
  int num_new = 0;
#pragma unroll
  for (int token = kFirst; token < kLast; ++token) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (entries[token][round] != kNoEntry) {
        bool is_new;
        entries[token][round] = entry_of_slot(shared, of_tokens[token - kFirst][round], is_new);
        num_new += is_new;
      }
    }
  }
  return num_new;
}

// Whether two tokens have more distinct slots than they have in a group that is just united, and half as many more.
__device__ __forceinline__ bool share_too_little(Shared& shared, const Counts& counts, float max_share, int num_new,
                                                 int thread) {
  const int of_warp = __reduce_add_sync(kAllLanes, num_new);
  if (thread % 32 == 0) {
    atomicAdd(&shared.num_distinct, of_warp);
  }
  __syncthreads();
  return shared.num_distinct > (max_share + 0.25f) * (counts[0] + counts[1]);
}

// Whose place each slot is. The token that has a slot first keeps it, and all that have it leave their bit.
__device__ __forceinline__ void share_out(Shared& shared, Entries& entries, int thread) {
#pragma unroll
  for (int token = 0; token < kUnionTokens; ++token) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      if (entries[token][round] != kNoEntry) {
        atomicMin(&shared.least[entries[token][round]], code_of_index(token, round * kThreads + thread));
      }
    }
    __syncthreads();
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      int& entry = entries[token][round];
      bool has_place = false;
      if (entry != kNoEntry) {
        if (shared.least[entry] == code_of_index(token, round * kThreads + thread)) {  // one thread of all
          const uint32_t before = shared.tokens[entry];
          shared.tokens[entry] = static_cast<uint8_t>(before | 1u << token);
          has_place = before == 0;
        } else {
          entry |= kAgain;
          has_place = true;
        }
      }
      const uint32_t of_warp = __ballot_sync(kAllLanes, has_place);
      if (thread % 32 == 0) {
        shared.has_place[word_of(token, round, thread / 32)] = of_warp;
      }
    }
    __syncthreads();
  }
}

// What the group is told. Its tokens are attended together, or each alone.
__device__ __forceinline__ void store_counts(const SlotUnionArguments& p, const Counts& counts, int group,
                                             int32_t num_union, int thread) {
  if (thread == 0) {
    p.num_union[group] = num_union;
#pragma unroll
    for (int token = 0; token < kUnionTokens; ++token) {
      p.num_left[group * kUnionTokens + token] = num_union == kNotUnited ? counts[token] : -1;
    }
  }
}

// By one warp.
__device__ __forceinline__ void count_places(Shared& shared, int lane) {
  constexpr int kWordsOfLane = kWords / 32;
  int count = 0;
  for (int i = 0; i < kWordsOfLane; ++i) {
    count += __popc(shared.has_place[lane * kWordsOfLane + i]);
  }
  int last = count;  // of this lane and those before it
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, last, distance);
    last += lane >= distance ? before : 0;
  }
  int place = last - count;
  for (int i = 0; i < kWordsOfLane; ++i) {
    shared.first_place[lane * kWordsOfLane + i] = place;
    place += __popc(shared.has_place[lane * kWordsOfLane + i]);
  }
  if (lane == 31) {
    shared.num_union = last;
  }
}

__device__ __forceinline__ uint8_t* seen_of_places(Shared& shared) {
  static_assert(sizeof(shared.least) >= kMaxUnion);
  return reinterpret_cast<uint8_t*>(shared.least);
}

__device__ __forceinline__ void store_slots(Shared& shared, const Entries& entries, int32_t* out, int thread) {
  uint8_t* const seen = seen_of_places(shared);
#pragma unroll
  for (int token = 0; token < kUnionTokens; ++token) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int word = word_of(token, round, thread / 32), lane = thread % 32;
      const uint32_t of_warp = shared.has_place[word];
      if ((of_warp >> lane & 1) != 0) {
        const int entry = entries[token][round] & (kAgain - 1);
        const int place = shared.first_place[word] + __popc(of_warp & ((1u << lane) - 1));
        out[place] = static_cast<int32_t>(shared.slots[entry]);
        seen[place] = (entries[token][round] & kAgain) != 0 ? static_cast<uint8_t>(1u << token) : shared.tokens[entry];
      }
    }
  }
}

// Of slots that the block has stored.
__device__ __forceinline__ void place_slots(const PagePlaces& places, int32_t* slots, int num_slots, int thread) {
  for (int i = thread; i < num_slots; i += kThreads) {
    slots[i] = placed_slot(places, slots[i]);
  }
}

// A warp takes half of the bits of a tile, those of two threads of a quad.
__device__ __forceinline__ void store_seen(Shared& shared, uint64_t* out, int thread) {
  const uint8_t* const seen = seen_of_places(shared);
  const int lane = thread % 32;
  const int num_halves = (shared.num_union + kTileKeys - 1) / kTileKeys * 2;
  for (int half = thread / 32; half < num_halves; half += kWarps) {
    const int place = half / 2 * kTileKeys + key_of_bit(half % 2 * 2 + lane / kSeenBits, lane % kSeenBits);
    const uint32_t tokens = place < shared.num_union ? seen[place] : 0;
#pragma unroll
    for (int token = 0; token < kUnionTokens; ++token) {
      const uint32_t bits = __ballot_sync(kAllLanes, (tokens >> token & 1) != 0);
      if (lane == token) {
        reinterpret_cast<uint32_t*>(out)[(half / 2 * kUnionTokens + token) * 2 + half % 2] = bits;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) slot_union_kernel(const SlotUnionArguments p) {
  let_next_kernel_start();
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int group = blockIdx.x, thread = threadIdx.x;
  const int64_t first_slot = static_cast<int64_t>(group) * kUnionTokens * p.num_slots;
  clear_table(shared, thread);
  wait_for_last_kernel();
  Counts counts;
  load_counts(counts, p, group);
  Entries entries;
  const int num_new = enter_slots<0, 2>(shared, entries, counts, p.topk_slot + first_slot, p.num_slots, thread);
  if (share_too_little(shared, counts, p.max_share, num_new, thread)) {
    store_counts(p, counts, group, kNotUnited, thread);
    return;
  }
  enter_slots<2, 4>(shared, entries, counts, p.topk_slot + first_slot, p.num_slots, thread);
  share_out(shared, entries, thread);
  if (thread < 32) {
    count_places(shared, thread);
  }
  __syncthreads();
  const int num_selected = counts[0] + counts[1] + counts[2] + counts[3];
  if (shared.num_union > p.max_share * num_selected) {
    store_counts(p, counts, group, kNotUnited, thread);
    return;
  }
  store_counts(p, counts, group, shared.num_union, thread);
  store_slots(shared, entries, p.union_slot + first_slot, thread);
  __syncthreads();
  if (p.places.count != nullptr) {
    place_slots(p.places, p.union_slot + first_slot, shared.num_union, thread);
  }
  const int num_tiles = (kUnionTokens * p.num_slots + kTileKeys - 1) / kTileKeys;
  store_seen(shared, p.seen + static_cast<int64_t>(group) * num_tiles * kUnionTokens, thread);
}

}  // namespace
}  // namespace slot_union

const char* launch_slot_union(const SlotUnionArguments& arguments, void* stream) {
  using namespace slot_union;
  const ClusterShape shape = {1, kThreads, static_cast<int>(sizeof(Shared))};
  return launch_clusters(slot_union_kernel, shape, arguments.num_groups, stream, arguments);
}

}  // namespace dsv32
