// What a wrong guess is followed by: the threshold from all logits of a row, in three rounds at most, in which the
// blocks of a cluster add up what they have counted.
#pragma once

#include "topk_select_list.cuh"

namespace dsv32::topk {

template <class C, bool kAligned>
__device__ __forceinline__ void count_share(Block<C>& block, const Row<kAligned>& row, Share share,
                                            const Bins<C::kNumBins>& bins, uint32_t (&histogram)[C::kNumBins]) {
  for (int word = share.begin + block.thread; word < share.end; word += C::kThreads) {
    float x[4];
    row.load(x, word);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = row.key(x[i], word, i);
      const int bin = bins.bin(key);
      if (bin >= 0 && bin < C::kNumBins) {
        atomicAdd(&histogram[bin], 1u);
      }
    }
  }
}

template <class C, bool kAligned>
__device__ __forceinline__ Exact find_threshold(Block<C>& block, const Row<kAligned>& row, Share share, int k) {
  uint32_t low = kLowest, high = kHighest;
  int above = 0;
  for (int round = 0;; ++round) {
    // Two, by turns: others may still read the last one.
    auto& histogram = block.shared.histogram[round % 2];
    const auto bins = Bins<C::kNumBins>::of_keys(low, high);
    block.clear_histogram(round % 2);
    __syncthreads();
    count_share(block, row, share, bins, histogram);
    block.synchronise_cluster();
    int counts[C::kThreadBins];
#pragma unroll
    for (int i = 0; i < C::kThreadBins; ++i) {
      const uint32_t address = shared_address(&histogram[block.thread * C::kThreadBins + i]);
      counts[i] = 0;
#pragma unroll 1
      for (int rank = 0; rank < block.cluster_size; ++rank) {
        counts[i] += static_cast<int>(load_word_in_cluster(address_in_block(address, rank)));
      }
    }
    const Boundary boundary = block.find_boundary(counts, k - above);
    above += boundary.above;
    low = bins.lowest_of(boundary.bin);
    high = bins.highest_of(boundary.bin);
    if (low == high) {
      // Of equal keys, those of lower ranks come first.
      const uint32_t address = shared_address(&histogram[boundary.bin]);
      const int of_block =
          block.lane < block.rank ? static_cast<int>(load_word_in_cluster(address_in_block(address, block.lane))) : 0;
      return {low, k - above - __reduce_add_sync(kAllLanes, of_block)};
    }
  }
}

}  // namespace dsv32::topk
