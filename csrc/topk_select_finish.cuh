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

  // A slot in two steps, so that the loads of several are on their way at once.
  struct Lookup {
    int32_t position;
    int32_t index;  // of its block in the request
    int32_t block;
  };
  __device__ __forceinline__ Lookup look_up(int32_t position, bool wanted) const {
    const auto index = static_cast<int32_t>(block_size.quotient(position));
    return {position, index, load_if(wanted, blocks + index)};
  }
  __device__ __forceinline__ int32_t slot(const Lookup& found) const {
    return (found.block - found.index) * static_cast<int32_t>(block_size.value) + found.position;
  }
};

// Entries of a list in the order of positions: a thread has words in a row, as many as the others.
template <class C>
struct Entries : Logits<C::kListWords> {
  bool listed;  // with positions that are in the list; of others, the place is the position

  __device__ __forceinline__ void divide(int num_words_of_all, bool in_list) {
    this->num_words = (num_words_of_all + C::kThreads - 1) / C::kThreads;
    listed = in_list;
  }
  __device__ __forceinline__ int word(const Block<C>& block, int j) const { return block.thread * this->num_words + j; }
  // The place of entry i of a thread.
  __device__ __forceinline__ uint32_t place(const Block<C>& block, int i) const {
    return word(block, i / 4) * 4 + i % 4;
  }
};

template <class C>
using ListSearch = Search<C, C::kListWords * 4>;

// Of the entries in the bin of the boundary, the last that is selected: its key and its place.
template <class C>
__device__ __forceinline__ uint2 find_cut_in_crowd(Block<C>& block, const Entries<C>& entries,
                                                   const ListSearch<C>& found, int needed) {
  auto& shared = block.shared;
  entries.for_each([&](int i) {
    if (found.bin[i] == found.boundary.bin) {
      shared.crowd[atomicAdd(&shared.num_crowd, 1)] = make_uint2(key_of(entries.x[i]), entries.place(block, i));
    }
  });
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
__device__ __forceinline__ uint2 find_cut_in_ties(Block<C>& block, const Entries<C>& entries,
                                                  const ListSearch<C>& found, int needed) {
  int count = 0, total;
  entries.for_each([&](int i) { count += found.bin[i] == found.boundary.bin; });
  int rank = block.sum_before(count, total);
  entries.for_each([&](int i) {
    if (found.bin[i] == found.boundary.bin && ++rank == needed) {
      block.shared.cut = make_uint2(found.bins.high, entries.place(block, i));
    }
  });
  __syncthreads();
  return block.shared.cut;
}

// Which are the k highest, of k or more; of equal ones, the first.
template <class C>
__device__ __forceinline__ uint32_t select_entries(Block<C>& block, const Entries<C>& entries, int num_entries, int k) {
  uint32_t mask = 0;
  if (num_entries == k) {
    entries.for_each([&](int i) { mask |= entries.x[i] == entries.x[i] ? 1u << i : 0u; });
    return mask;
  }
  if (block.thread == 0) {
    block.shared.num_crowd = 0;  // which barriers of the search make known
  }
  const ListSearch<C> found = search(block, entries, k, kCrowd);
  const int needed = k - found.boundary.above;
  const bool all = needed == found.boundary.inside;
  entries.for_each([&](int i) { mask |= found.bin[i] < found.boundary.bin + all ? 1u << i : 0u; });
  if (!all) {
    const uint2 cut = found.boundary.inside <= kCrowd ? find_cut_in_crowd(block, entries, found, needed)
                                                      : find_cut_in_ties(block, entries, found, needed);
    entries.for_each([&](int i) {
      if (found.bin[i] == found.boundary.bin) {
        const uint32_t key = key_of(entries.x[i]);
        mask |= key > cut.x || (key == cut.x && entries.place(block, i) <= cut.y) ? 1u << i : 0u;
      }
    });
  }
  return mask;
}

template <class C>
__device__ __forceinline__ void write_slots(Block<C>& block, const Entries<C>& entries, int num_entries, int k,
                                            const Pages& pages, int32_t* topk_slot) {
  constexpr int kWords = 2;  // at once
  const uint32_t mask = select_entries(block, entries, num_entries, k);
  int total;
  int32_t* target = topk_slot + block.sum_before(__popc(mask), total);
#pragma unroll
  for (int begin = 0; begin < Entries<C>::kWords; begin += kWords) {
    Pages::Lookup found[kWords][4];
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if (begin + j < entries.num_words) {
        const int word = entries.word(block, begin + j);
        int4 four = {word * 4, word * 4 + 1, word * 4 + 2, word * 4 + 3};
        if (entries.listed) {
          four = reinterpret_cast<const int4*>(block.shared.positions)[min(word, C::kCapacity / 4 - 1)];
        }
        const int32_t positions[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          found[j][i] = pages.look_up(positions[i], mask >> ((begin + j) * 4 + i) & 1);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if (begin + j < entries.num_words) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (mask >> ((begin + j) * 4 + i) & 1) {
            *target++ = pages.slot(found[j][i]);
          }
        }
      }
    }
  }
}

// Of a row that sees no more than k.
template <class C>
__device__ __forceinline__ void write_all(const Block<C>& block, int num_keys, int k, const Pages& pages,
                                          int32_t* topk_slot) {
#pragma unroll 2
  for (int position = block.thread; position < k; position += C::kThreads) {
    const bool exists = position < num_keys;
    const auto found = pages.look_up(position, exists);
    topk_slot[position] = exists ? pages.slot(found) : -1;
  }
}

}  // namespace dsv32::topk
