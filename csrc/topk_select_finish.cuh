// From the keys that one block holds to the slots of the k highest.
#pragma once

#include "topk_select_block.cuh"

namespace dsv32::topk {

// Quotients of non-negative integers by a number that is known at the launch.
struct Divisor {
  uint32_t value;
  uint32_t factor;
  int shift;

  // Granlund and Montgomery (1994), doi:10.1145/178243.178249, for 31 bits.
  explicit Divisor(int divisor) : value(divisor) {
    int log2 = 0;
    while ((int64_t{1} << log2) < divisor) {
      ++log2;
    }
    shift = 31 + log2;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t x) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(x) * factor >> shift);
  }
};

// Where positions of one request lie in the cache.
struct Pages {
  const int32_t* blocks;
  Divisor block_size;

  // -1 for those that are not wanted.
  template <int kNum>
  __device__ __forceinline__ void find_slots(int32_t (&slots)[kNum], const int32_t (&positions)[kNum],
                                             uint32_t wanted) const {
    int32_t quotients[kNum], found[kNum];
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      quotients[i] = static_cast<int32_t>(block_size.quotient(positions[i]));
      found[i] = load_if(wanted >> i & 1, blocks + quotients[i]);
    }
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      const int32_t slot = (found[i] - quotients[i]) * static_cast<int32_t>(block_size.value) + positions[i];
      slots[i] = wanted >> i & 1 ? slot : -1;
    }
  }
};

// Entries of a list in the order of positions: a thread has words of four in a row, as many as the others.
template <class C>
struct Entries {
  static constexpr int kNum = C::kListWords * 4;
  uint32_t keys[kNum];  // kNone in places without an entry
  int words_of_thread;
  bool listed;  // of positions that are in the list; of others, the place is the position

  __device__ __forceinline__ void divide(int num_words, bool in_list) {
    words_of_thread = (num_words + C::kThreads - 1) / C::kThreads;
    listed = in_list;
  }

  __device__ __forceinline__ int word(const Block<C>& block, int j) const {
    return block.thread * words_of_thread + j;
  }
  // The place of entry i of a thread.
  __device__ __forceinline__ uint32_t place(const Block<C>& block, int i) const {
    return word(block, i / 4) * 4 + i % 4;
  }
};

// Of the keys in the bin of the boundary, the last that is selected: its key and its place.
template <class C>
__device__ __forceinline__ uint2 find_cut_in_crowd(Block<C>& block, const Entries<C>& entries, const Search<C>& found,
                                                   int needed) {
  auto& shared = block.shared;
#pragma unroll
  for (int i = 0; i < Entries<C>::kNum; ++i) {
    if (found.bins(entries.keys[i]) == found.boundary.bin) {
      shared.crowd[atomicAdd(&shared.num_crowd, 1)] = make_uint2(entries.keys[i], entries.place(block, i));
    }
  }
  __syncthreads();
  for (int candidate = block.warp; candidate < found.boundary.inside; candidate += C::kWarps) {
    const uint2 own = shared.crowd[candidate];
    int before = 0;
    for (int index = block.lane; index < found.boundary.inside; index += 32) {
      const uint2 other = shared.crowd[index];
      before += other.x > own.x || (other.x == own.x && other.y < own.y);
    }
    if (__reduce_add_sync(kAllLanes, before) == needed - 1 && block.lane == 0) {
      shared.cut = own;
    }
  }
  __syncthreads();
  return shared.cut;
}

// As above, where all of them are equal.
template <class C>
__device__ __forceinline__ uint2 find_cut_in_ties(Block<C>& block, const Entries<C>& entries, const Search<C>& found,
                                                  int needed) {
  const uint32_t key = found.bins.high;
  int count = 0, total;
#pragma unroll
  for (int i = 0; i < Entries<C>::kNum; ++i) {
    count += entries.keys[i] == key;
  }
  int rank = block.sum_before(count, total);
#pragma unroll
  for (int i = 0; i < Entries<C>::kNum; ++i) {
    if (entries.keys[i] == key && ++rank == needed) {
      block.shared.cut = make_uint2(key, entries.place(block, i));
    }
  }
  __syncthreads();
  return block.shared.cut;
}

// The k highest, of k or more; of equal ones, the first.
template <class C>
__device__ __forceinline__ uint32_t select_entries(Block<C>& block, const Entries<C>& entries, int num_entries, int k) {
  uint32_t mask = 0;
  if (num_entries == k) {
#pragma unroll
    for (int i = 0; i < Entries<C>::kNum; ++i) {
      mask |= entries.keys[i] != kNone ? 1u << i : 0u;
    }
    return mask;
  }
  if (block.thread == 0) {
    block.shared.num_crowd = 0;  // which barriers of the search make known
  }
  const Search<C> found = search(block, entries.keys, k, kCrowd);
  const int needed = k - found.boundary.above;
  uint2 cut = make_uint2(kNone, 0);
  if (needed < found.boundary.inside) {
    cut = found.boundary.inside <= kCrowd ? find_cut_in_crowd(block, entries, found, needed)
                                          : find_cut_in_ties(block, entries, found, needed);
  }
#pragma unroll
  for (int i = 0; i < Entries<C>::kNum; ++i) {
    const uint32_t key = entries.keys[i];
    const int bin = found.bins(key);
    const bool reaches = key > cut.x || (key == cut.x && entries.place(block, i) <= cut.y);
    mask |= bin < found.boundary.bin || (bin == found.boundary.bin && reaches) ? 1u << i : 0u;
  }
  return mask;
}

template <class C>
__device__ __forceinline__ void write_slots(Block<C>& block, const Entries<C>& entries, int num_entries, int k,
                                            const Pages& pages, int32_t* topk_slot) {
  const uint32_t mask = select_entries(block, entries, num_entries, k);
  int total;
  int32_t* target = topk_slot + block.sum_before(__popc(mask), total);
  constexpr int kAtOnce = 8;  // on their way
#pragma unroll
  for (int begin = 0; begin < Entries<C>::kNum; begin += kAtOnce) {
    int32_t positions[kAtOnce], slots[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      positions[i] = static_cast<int32_t>(entries.place(block, begin + i));
    }
    if (entries.listed) {
#pragma unroll
      for (int i = 0; i < kAtOnce; i += 4) {
        const int word = min(entries.word(block, (begin + i) / 4), C::kCapacity / 4 - 1);
        const int4 four = reinterpret_cast<const int4*>(block.shared.positions)[word];
        positions[i] = four.x, positions[i + 1] = four.y, positions[i + 2] = four.z, positions[i + 3] = four.w;
      }
    }
    const uint32_t wanted = mask >> begin;
    pages.find_slots(slots, positions, wanted);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (wanted >> i & 1) {
        *target++ = slots[i];
      }
    }
  }
}

// Of a row that sees no more than k.
template <class C>
__device__ __forceinline__ void write_all(const Block<C>& block, int num_keys, int k, const Pages& pages,
                                          int32_t* topk_slot) {
  constexpr int kAtOnce = 2;
  for (int begin = block.thread; begin < k; begin += kAtOnce * C::kThreads) {
    const int32_t positions[kAtOnce] = {begin, begin + C::kThreads};
    int32_t slots[kAtOnce];
    pages.find_slots(slots, positions, (positions[0] < num_keys) | (positions[1] < num_keys) << 1);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (positions[i] < k) {
        topk_slot[positions[i]] = slots[i];
      }
    }
  }
}

}  // namespace dsv32::topk
