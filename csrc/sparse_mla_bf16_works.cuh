// All that a block does for 64 heads and a bfloat16 cache: a kernel is this, for keys of one kind.
#pragma once

#include "sparse_mla_bf16_ring.cuh"
#include "sparse_mla_bf16_scores.cuh"
#include "sparse_mla_bf16_values.cuh"

namespace dsv32::wide::bf16 {

template <class Keys>
__device__ __forceinline__ void score_works(Shared& shared, const SparseMlaArguments& p, int num_splits,
                                            typename Keys::Source source) {
  const int warp = warp_of_thread() % 4, lane = threadIdx.x % 32;
  Turn<kStages> turn;
  Turn<1> normalisers;
  for (int index = blockIdx.x; index < num_works<1>(p, num_splits); index += gridDim.x) {
    RoundedSoftmax softmax;
    softmax.subtracted = make_float2(Keys::kLowest, Keys::kLowest);
    float2 total = make_float2(0.0f, 0.0f);
    const int num_keys = work_of_index<1>(p, index, num_splits).num_keys;
    if (num_keys > 0) {
      Keys keys(source, p, index, warp, lane);
      Queries queries;
      mbarrier_wait(&shared.rows_full[turn.stage], turn.parity);
      take_queries(queries, shared, turn.stage, warp, lane);
      hand_over_weights(shared, turn.stage, lane);
      turn.next();
      score_tiles(softmax, queries, keys, turn, shared, p.scale_log2, num_keys, warp, lane);
      total = softmax.total_of_heads();
      const float2 rounded =
          make_float2(sum_of_quad(softmax.rounded_total.x), sum_of_quad(softmax.rounded_total.y));
      mbarrier_wait(&shared.normalisers_free, normalisers.parity ^ 1);
      if (lane % 4 == 0) {
        shared.normalisers[pair_of_heads(warp, lane)] = make_float2(normaliser(rounded.x), normaliser(rounded.y));
      }
      arrive_for_warp(lane, &shared.normalisers_full);
      normalisers.next();
    }
    const bool is_split = num_splits > 1;
    if (num_keys > 0 || (!is_split && !Keys::leave(p, index))) {
      // Computed anew: during products there are no registers for it.
      const int same = forget_origin(index);
      const Work work = work_of_index<1>(p, same, num_splits);
      store_lse(softmax, total, p, work, first_row(p, work, same % num_splits, num_splits), is_split, warp, lane);
    }
  }
}

template <class Keys>
__device__ __forceinline__ void sum_works(Shared& shared, const SparseMlaArguments& p, int num_splits, int half) {
  const int warp = warp_of_thread() % 4, lane = threadIdx.x % 32;
  Ring ring(shared, p, num_splits, half, warp, lane);
  Turn<1> normalisers;
  for_each_work<1>(p, num_splits, [&](const Work& work, int64_t first_row) {
    Sums sums = {};
    float2 factor = make_float2(0.0f, 0.0f);
    if (work.num_tiles > 0) {
      ring.wait();
      ring.replace_first();
      ring.replace_rest();
      for (int tile = 0; tile < work.num_tiles; ++tile) {
        ring.wait();
        const int stage = ring.turn.stage;
        rescale(sums, shared.factors[stage][pair_of_heads(warp, lane)]);
        start_values(sums, shared, stage, half);
        if (kCopyByParts) {
          wgmma_wait<1>();
          ring.replace_first();
        }
        wgmma_wait<0>(sums);
        if (!kCopyByParts) {
          ring.replace_first();
        }
        ring.replace_rest();
      }
      mbarrier_wait(&shared.normalisers_full, normalisers.parity);
      normalisers.next();
      factor = shared.normalisers[pair_of_heads(warp, lane)];
      arrive_for_warp(lane, &shared.normalisers_free);
    }
    if (work.num_tiles > 0 || (num_splits == 1 && !Keys::leave(p, work.token))) {
      store_sums(sums, factor, p, work, first_row, num_splits > 1, half, warp, lane);
    }
  });
}

template <class Keys>
__device__ __forceinline__ void attend_works(const SparseMlaArguments& p, int num_splits,
                                             typename Keys::Source source) {
  let_next_kernel_start();
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      if (kArrival == Arrival::kCopies) {
        mbarrier_init(&shared.rows_full[stage], kNumValueWarps * 32);
      } else {
        init_warp_barrier(&shared.rows_full[stage], kNumValueWarps);
      }
      init_warp_barrier(&shared.weights_full[stage], 4);
      init_warp_barrier(&shared.weights_free[stage], 4);
    }
    init_warp_barrier(&shared.normalisers_full, 4);
    init_warp_barrier(&shared.normalisers_free, kNumValueWarps);
    fence_mbarrier_init();
  }
  __syncthreads();
  wait_for_last_kernel();

  const int warpgroup = warp_of_thread() / 4;
  if (warpgroup == 0) {
    take_registers<kScoreRegisters>();
    score_works<Keys>(shared, p, num_splits, source);
  } else {
    give_registers<kValueRegisters>();
    sum_works<Keys>(shared, p, num_splits, warpgroup - 1);
  }
}

}  // namespace dsv32::wide::bf16
