// What the threads of a block share, and what they compute together.
#pragma once

#include "ptx.cuh"
#include "topk_select_keys.cuh"
#include "topk_select_sm90.h"

namespace dsv32::topk {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kCrowd = 128;  // keys that are ranked one against the other

template <int kThreads_, int kCapacity_, int kSample_, int kNumBins_>
struct Config {
  static constexpr int kThreads = kThreads_;
  static constexpr int kCapacity = kCapacity_;  // of a list, in logits
  static constexpr int kSample = kSample_;      // logits that a threshold is guessed from
  static constexpr int kNumBins = kNumBins_;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kTileWords = 4;  // of a thread; a word is four logits
  static constexpr int kListWords = kCapacity / 4 / kThreads;  // of a thread
  static constexpr int kSampleWords = kSample / 4 / kThreads;
  static constexpr int kThreadBins = kNumBins / kThreads;
  static_assert(kWarps <= 32 && kListWords * kThreads * 4 == kCapacity && kSampleWords * kThreads * 4 == kSample);
  static_assert(kSample <= kCapacity && kThreadBins * kThreads == kNumBins);
};

// What is launched; tests have smaller blocks, which short rows fill.
using FullSize = Config<1024, 8192, 4096, 2048>;

// The bin in which what is searched for lies.
struct Boundary {
  int bin;
  int above;   // keys in higher bins
  int inside;  // keys
};

template <class C>
struct Shared {
  // In the order of positions; the last word may be filled in part.
  alignas(16) float logits[C::kCapacity];
  alignas(16) int32_t positions[C::kCapacity];
  alignas(16) uint32_t histogram[2][C::kNumBins];
  alignas(16) uint2 crowd[kCrowd];
  int sums[2][32];  // of warps, by turns
  uint32_t lows[2][32];
  uint32_t highs[2][32];
  Boundary boundary;
  uint2 cut;
  int num_crowd;
  int num_listed;
  // Of this block's share, compared with a guess.
  int num_above;
  int num_equal;
};

template <class C>
struct Block {
  Shared<C>& shared;
  int rank;  // in the cluster
  int cluster_size;
  int thread;
  int warp;
  int lane;
  int turn = 0;  // what is written in one has been read before the next but one

  // The sum of x in the threads before this one, and that of all.
  __device__ __forceinline__ int sum_before(int x, int& total) {
    int sum = x;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, distance);
      sum += lane >= distance ? other : 0;
    }
    return sum - x + sum_of_warps_before(__shfl_sync(kAllLanes, sum, 31), total);
  }

  // As above, of x of the warps, which its lanes agree on.
  __device__ __forceinline__ int sum_of_warps_before(int x, int& total) {
    turn ^= 1;
    if (lane == 0) {
      shared.sums[turn][warp] = x;
    }
    __syncthreads();
    const int other = lane < C::kWarps ? shared.sums[turn][lane] : 0;
    total = __reduce_add_sync(kAllLanes, other);
    return __reduce_add_sync(kAllLanes, lane < warp ? other : 0);
  }

  __device__ __forceinline__ void reduce_extent(uint32_t& low, uint32_t& high) {
    turn ^= 1;
    low = __reduce_min_sync(kAllLanes, low);
    high = __reduce_max_sync(kAllLanes, high);
    if (lane == 0) {
      shared.lows[turn][warp] = low;
      shared.highs[turn][warp] = high;
    }
    __syncthreads();
    low = __reduce_min_sync(kAllLanes, lane < C::kWarps ? shared.lows[turn][lane] : ~0u);
    high = __reduce_max_sync(kAllLanes, lane < C::kWarps ? shared.highs[turn][lane] : 0u);
  }

  __device__ __forceinline__ void clear_histogram(int index) {
#pragma unroll
    for (int i = 0; i < C::kThreadBins; ++i) {
      shared.histogram[index][thread * C::kThreadBins + i] = 0;
    }
  }

  // Where the k-th key lies, given the counts of this thread's bins.
  __device__ __forceinline__ Boundary find_boundary(const int (&counts)[C::kThreadBins], int k) {
    int sum = 0, total;
#pragma unroll
    for (int i = 0; i < C::kThreadBins; ++i) {
      sum += counts[i];
    }
    int above = sum_before(sum, total);
#pragma unroll
    for (int i = 0; i < C::kThreadBins; ++i) {
      if (above < k && k <= above + counts[i]) {
        shared.boundary = {thread * C::kThreadBins + i, above, counts[i]};
      }
      above += counts[i];
    }
    __syncthreads();
    return shared.boundary;
  }

  // Of the cluster; what a thread has written before, the others see after.
  __device__ __forceinline__ void synchronise_cluster() {
    if (cluster_size > 1) {
      cluster_barrier();
    } else {
      __syncthreads();
    }
  }
};

// Logits of a thread, in words of four; NaN where there is none.
template <int kWords_>
struct Logits {
  static constexpr int kWords = kWords_;
  static constexpr int kNum = kWords * 4;
  float x[kNum];
  int num_words;  // that exist in any thread; the others are passed over

  // Calls f(i) for each of them.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      if (j < num_words) {
#pragma unroll
        for (int i = j * 4; i < j * 4 + 4; ++i) {
          f(i);
        }
      }
    }
  }
};

// Where the k-th highest logit lies: in the boundary's bin, as are others.
template <class C, int kNum>
struct Search {
  Bins<C::kNumBins> bins;
  Boundary boundary;
  int bin[kNum];  // of each logit of this thread
};

// Ends when no more than `enough` logits are in the bin of the k-th, or all of them are equal.
template <class C, int kWords>
__device__ __forceinline__ Search<C, kWords * 4> search(Block<C>& block, const Logits<kWords>& logits, int k,
                                                        int enough) {
  auto& histogram = block.shared.histogram[0];
  Search<C, kWords * 4> found;
  int above = 0;
  for (bool first = true;; first = false) {
    float lowest = INFINITY, highest = -INFINITY;  // which NaN does not change
    logits.for_each([&](int i) {
      if (first || found.bin[i] == found.boundary.bin) {
        lowest = fminf(lowest, logits.x[i]);
        highest = fmaxf(highest, logits.x[i]);
      }
    });
    uint32_t low = key_of(lowest), high = key_of(highest);
    block.clear_histogram(0);
    block.reduce_extent(low, high);
    found.bins = first ? Bins<C::kNumBins>::of_logits(low, high) : Bins<C::kNumBins>::of_keys(low, high);
    if (found.bins.even) {
      logits.for_each([&](int i) { found.bin[i] = found.bins.even_bin(logits.x[i]); });
    } else {
      logits.for_each([&](int i) {
        const float x = logits.x[i];
        found.bin[i] = x == x ? found.bins.bin(key_of(x)) : C::kNumBins;
      });
    }
    if (low == high) {  // equal logits, of which the additions to one word would wait for each other
      int count = 0, total;
      logits.for_each([&](int i) { count += found.bin[i] == 0; });
      block.sum_before(count, total);
      found.boundary = {0, above, total};
      return found;
    }
    logits.for_each([&](int i) {
      if (static_cast<uint32_t>(found.bin[i]) < C::kNumBins) {
        atomicAdd(&histogram[found.bin[i]], 1u);
      }
    });
    __syncthreads();
    int counts[C::kThreadBins];
#pragma unroll
    for (int i = 0; i < C::kThreadBins; ++i) {
      counts[i] = static_cast<int>(histogram[block.thread * C::kThreadBins + i]);
    }
    found.boundary = block.find_boundary(counts, k - above);
    found.boundary.above += above;
    above = found.boundary.above;
    if (found.boundary.inside <= enough) {
      return found;
    }
  }
}

}  // namespace dsv32::topk
