// What a wrong guess is followed by. Where many logits are equal, it may be the threshold yet: the k-th is one of these.
// Otherwise the threshold comes from all logits of a row, in three rounds at most. In either, the blocks of a cluster
// add up what they have counted.
#pragma once

#include "topk_select_list.cuh"

namespace dsv32::topk {

// Whether the k-th highest logit of a row is equal to a guess; then `exact` is of those that are selected.
template <class C, bool kAligned>
__device__ __forceinline__ bool is_threshold(Block<C>& block, const Row<kAligned>& row, Share share, float guess, int k,
                                             Exact& exact) {
  int num_above = 0, num_equal = 0;
  for (int first = share.begin; first < share.end; first += Tile<C>::kWords) {
    Tile<C> tile;
    tile.load(block, row, share, first);
#pragma unroll
    for (int j = 0; j < C::kTileWords; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        num_above += tile.logits[j][i] > guess;
        num_equal += tile.logits[j][i] == guess;
      }
    }
  }
  block.sum_before(num_above, num_above);
  block.sum_before(num_equal, num_equal);
  if (block.thread == 0) {
    block.shared.num_above = num_above;
    block.shared.num_equal = num_equal;
  }
  block.synchronise_cluster();
  const auto of_lane = [&](const int& count) {
    const uint32_t address = shared_address(&count);
    return block.lane < block.cluster_size
               ? static_cast<int>(load_word_in_cluster(address_in_block(address, block.lane)))
               : 0;
  };
  num_equal = of_lane(block.shared.num_equal);
  const int needed = k - __reduce_add_sync(kAllLanes, of_lane(block.shared.num_above));
  const int equal_before = __reduce_add_sync(kAllLanes, block.lane < block.rank ? num_equal : 0);
  exact = {key_of(guess), needed - equal_before};
  return 0 < needed && needed <= __reduce_add_sync(kAllLanes, num_equal);
}

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
