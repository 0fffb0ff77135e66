// topk_select on SM 90: from the logits of a row to the slots of the k highest, in one launch.
//
// The blocks of a cluster divide a row. Each guesses the same threshold from a sample of the whole row, reads its
// share once, and lists what reaches the threshold; no block waits for another until then. The first block loads the
// lists from the shared memory of all, and cuts them down to k. If the guess misleads, and fewer than k reach it or
// more than the first block holds, the cluster finds the exact threshold in all logits, and lists again: in rows of
// equal logits too, where that is the guess. Rows that one block holds need no list, and rows of at most k keys are
// not read.
#include <cuda_runtime.h>

#include "launch.cuh"
#include "topk_select_exact.cuh"
#include "topk_select_finish.cuh"
#include "topk_select_sm90.h"

namespace dsv32 {
namespace topk {

// Lists of a cluster, one after the other, each from a new word on. Every warp knows them: lane r those of rank r.
struct Lists {
  int count;
  int first_word;
  int num_words;  // of all
  int total;

  template <class C>
  __device__ __forceinline__ explicit Lists(const Block<C>& block) {
    const uint32_t address = shared_address(&block.shared.num_listed);
    count = block.lane < block.cluster_size
                ? static_cast<int>(load_word_in_cluster(address_in_block(address, block.lane)))
                : 0;
    const int words = (count + 3) / 4;
    first_word = words;
#pragma unroll
    for (int distance = 1; distance < kMaxTopkCluster; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, first_word, distance);
      first_word += block.lane >= distance ? other : 0;
    }
    first_word -= words;
    num_words = __reduce_add_sync(kAllLanes, words);
    total = __reduce_add_sync(kAllLanes, count);
  }

  template <class C>
  __device__ __forceinline__ bool suffice(int k) const {
    return total >= k && num_words * 4 <= C::kCapacity;
  }

  // Logits to registers; positions to where they follow those of this block.
  template <class C>
  __device__ __forceinline__ void load(Entries<C>& entries, Block<C>& block) const {
    entries.divide(num_words, true);
    const uint32_t logits = shared_address(block.shared.logits), positions = shared_address(block.shared.positions);
    uint4 logits_of[C::kListWords], positions_of[C::kListWords];
    int remaining[C::kListWords];
    bool moves[C::kListWords];
#pragma unroll
    for (int j = 0; j < C::kListWords; ++j) {
      const int word = entries.word(block, j);
      int rank = 0;
      for (int step = block.cluster_size / 2; step > 0; step /= 2) {
        rank += word >= __shfl_sync(kAllLanes, first_word, rank + step) ? step : 0;
      }
      const int local = word - __shfl_sync(kAllLanes, first_word, rank);
      remaining[j] = j < entries.num_words ? __shfl_sync(kAllLanes, count, rank) - local * 4 : 0;
      moves[j] = remaining[j] > 0 && rank > 0;
      if (remaining[j] > 0) {
        logits_of[j] = load_words_in_cluster(address_in_block(logits + local * 16, rank));
      }
      if (moves[j]) {
        positions_of[j] = load_words_in_cluster(address_in_block(positions + local * 16, rank));
      }
    }
#pragma unroll
    for (int j = 0; j < C::kListWords; ++j) {
      if (moves[j]) {
        reinterpret_cast<uint4*>(block.shared.positions)[entries.word(block, j)] = positions_of[j];
      }
      const uint32_t bits[4] = {logits_of[j].x, logits_of[j].y, logits_of[j].z, logits_of[j].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        entries.x[j * 4 + i] = i < remaining[j] ? fmaxf(__uint_as_float(bits[i]), -INFINITY) : NAN;
      }
    }
  }
};

template <class C, bool kAligned>
__device__ __forceinline__ void load_row(Entries<C>& entries, const Block<C>& block, const Row<kAligned>& row) {
  entries.divide(row.num_words(), false);
  float x[C::kListWords][4];
#pragma unroll
  for (int j = 0; j < C::kListWords; ++j) {
    if (j < entries.num_words) {
      row.load(x[j], entries.word(block, j));
    }
  }
#pragma unroll
  for (int j = 0; j < C::kListWords; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = j < entries.num_words && entries.place(block, j * 4 + i) < row.num_keys;
      entries.x[j * 4 + i] = exists ? fmaxf(x[j][i], -INFINITY) : NAN;
    }
  }
}

// Lists of the blocks of a cluster that have the k highest of a row between them, and fit one block.
template <class C, bool kAligned>
__device__ __forceinline__ Lists list_row(Block<C>& block, const Row<kAligned>& row, int k) {
  const int words = (row.num_words() + block.cluster_size - 1) / block.cluster_size;
  const Share share = {min(block.rank * words, row.num_words()), min((block.rank + 1) * words, row.num_words())};
  const Sample<C> sample(block, row);
  Tile<C> first;
  first.load(block, row, share, share.begin);  // on its way while the threshold is guessed
  const GuessedThreshold threshold = sample.guess_threshold(block, row.num_keys, k);
  int count;
  if (!threshold.is_crowded) {
    count = list_share(block, row, share, first, Guess{threshold.logit});
    if (block.thread == 0) {
      block.shared.num_listed = count;
    }
    block.synchronise_cluster();
    const Lists guessed(block);
    if (guessed.template suffice<C>(k)) {
      return guessed;
    }
  }
  Exact exact;
  if (!is_threshold(block, row, share, threshold.logit, k, exact)) {
    exact = find_threshold(block, row, share, k);
  }
  count = list_share(block, row, share, first, exact);
  if (block.thread == 0) {
    block.shared.num_listed = count;
  }
  block.synchronise_cluster();
  return Lists(block);
}

struct Parameters {
  TopkSelectArguments arguments;
  Divisor block_size;
  int log2_cluster_size;
};

template <class C, bool kAligned>
__global__ void __launch_bounds__(C::kThreads, 1)
    topk_select_kernel(const __grid_constant__ Parameters parameters) {
  let_next_kernel_start();
  wait_for_last_kernel();
  const TopkSelectArguments& p = parameters.arguments;
  const int log2_size = parameters.log2_cluster_size;
  const int row_index = blockIdx.x >> log2_size;
  Block<C> block = {
      .shared = *reinterpret_cast<Shared<C>*>(shared_memory()),
      .rank = static_cast<int>(blockIdx.x) & ((1 << log2_size) - 1),
      .cluster_size = 1 << log2_size,
      .thread = static_cast<int>(threadIdx.x),
      .warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0),
      .lane = static_cast<int>(threadIdx.x) % 32,
  };
  const int num_keys = min(p.num_keys[row_index], p.length);
  const Pages pages = {p.block_table + p.request_ids[row_index] * p.block_table_stride, parameters.block_size};
  const Row<kAligned> row = {p.logits + row_index * p.logits_stride, num_keys};
  int32_t* topk_slot = p.topk_slot + row_index * p.topk_slot_stride;

  if (num_keys <= p.k) {
    if (block.rank == 0) {
      write_all(block, num_keys, p.k, pages, topk_slot);
    }
    return;
  }
  const bool listed = num_keys > C::kCapacity;  // the same in all blocks of the cluster: none waits in vain
  Entries<C> entries;
  int num_entries = num_keys;
  if (!listed) {
    if (block.rank > 0) {
      return;
    }
    load_row(entries, block, row);
  } else {
    const Lists lists = list_row(block, row, p.k);
    num_entries = lists.total;
    if (block.rank == 0) {
      lists.load(entries, block);
    }
  }
  if (block.rank == 0) {
    write_slots(block, entries, num_entries, p.k, pages, topk_slot);
  }
  if (listed && block.cluster_size > 1) {
    cluster_barrier_relaxed();  // a block stays until the first has read its list; what that has read, it has used
  }
}

template <class C>
ClusterShape cluster_of(int cluster_size) {
  static_assert(sizeof(Shared<C>) <= 227 * 1024);
  return {cluster_size, C::kThreads, static_cast<int>(sizeof(Shared<C>))};
}

template <class C>
const char* launch(const TopkSelectArguments& arguments, int cluster_size, void* stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(arguments.logits) % 16 == 0 && arguments.logits_stride % 4 == 0;
  int log2_cluster_size = 0;
  while (1 << log2_cluster_size < cluster_size) {
    ++log2_cluster_size;
  }
  return launch_clusters(aligned ? topk_select_kernel<C, true> : topk_select_kernel<C, false>,
                         cluster_of<C>(cluster_size), arguments.num_rows * cluster_size, stream,
                         Parameters{arguments, Divisor(arguments.block_size), log2_cluster_size});
}

}  // namespace topk

const char* launch_topk_select(const TopkSelectArguments& arguments, int cluster_size, void* stream) {
  return topk::launch<topk::FullSize>(arguments, cluster_size, stream);
}

const char* count_topk_select_clusters(int cluster_size, int* count) {
  return count_concurrent_clusters(topk::topk_select_kernel<topk::FullSize, true>,
                                   topk::cluster_of<topk::FullSize>(cluster_size), count);
}

}  // namespace dsv32
