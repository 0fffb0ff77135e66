// sparse_mla for an fp8_ds_mla cache and 64 heads at a time, on SM 90.
//
// A block attends all keys of one token, or a split of them, 64 at a time, with products of warpgroups. Three
// warpgroups: one decodes rows to float16 in shared memory, one computes scores and weights and sums half of the
// latents, one sums the other half. So many heads repay a decoded copy: each of its values is used 128 times.
// What splits give out is joined by another launch.
//
// Of an even number of tiles of heads, two blocks, a cluster, attend the same keys: each decodes half of them for both.
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.cuh"
#include "sparse_mla_sm90.h"
#include "sparse_mla_wide_queries.cuh"
#include "sparse_mla_wide_rows.cuh"
#include "sparse_mla_wide_scores.cuh"
#include "sparse_mla_wide_values.cuh"

namespace dsv32 {
namespace wide {
namespace {

template <int kBlocks>
__device__ __forceinline__ void score_works(Shared& shared, const SparseMlaArguments& p, int num_splits) {
  const int warp = warp_of_thread() % 4, lane = threadIdx.x % 32;
  ScoreTurns turns;
  for_each_work<kBlocks>(p, num_splits, [&](const Work& work, int64_t first_row) {
    Sums sums = {};
    Softmax softmax;
    mbarrier_wait(&shared.queries_full, turns.queries.parity);
    turns.queries.next();
    const float2 back = load_factors(shared, warp, lane);
    if (work.num_tiles > 0) {
      score_tiles<kBlocks>(sums, softmax, turns, shared, p, work, back, warp * 32 + lane);
    }
    const float2 total = softmax.total_of_heads();
    const float2 factor = make_float2(normaliser(total.x), normaliser(total.y));
    wait_to_hand_over(shared, turns.weights);
    hand_over_factors(shared, turns.weights, factor, warp * 32 + lane);
    const bool is_split = num_splits > 1;
    if (is_split && work.num_tiles == 0) {
      return;
    }
    store_sums<kLeft>(sums, factor, p, work, first_row, is_split, warp, lane);
    store_lse(softmax, total, p, work, first_row, is_split, warp, lane);
  });
}

template <int kBlocks>
__device__ __forceinline__ void sum_works(Shared& shared, const SparseMlaArguments& p, int num_splits) {
  const int warp = warp_of_thread() % 4, lane = threadIdx.x % 32;
  ValueTurns turns;
  for_each_work<kBlocks>(p, num_splits, [&](const Work& work, int64_t first_row) {
    // Nobody reads the last ones any more: their last factors came after all scores.
    load_queries(shared, p, work, warp, lane);
    Sums sums = {};
    sum_right_half<kBlocks>(sums, turns, shared, work.num_tiles, warp, lane);
    mbarrier_wait(&shared.weights_full, turns.weights.parity);
    turns.weights.next();
    const float2 factor = load_factors(shared, warp, lane);
    arrive_for_warp(lane, &shared.weights_free);
    if (num_splits == 1 || work.num_tiles > 0) {
      store_sums<kRight>(sums, factor, p, work, first_row, num_splits > 1, warp, lane);
    }
  });
}

template <int kBlocks>
__device__ __forceinline__ void decode_works(Shared& shared, const SparseMlaArguments& p, int num_splits) {
  const int warp = warp_of_thread() % 4, lane = threadIdx.x % 32;
  Turn<kStages> turn;
  for_each_work<kBlocks>(p, num_splits, [&](const Work& work, int64_t) {
    decode_tiles<kBlocks>(turn, shared, p, work, warp, lane);
  });
}

// Of the block, or of the cluster: what a thread has written before, the others see after.
template <int kBlocks>
__device__ __forceinline__ void meet_all() {
  if (kBlocks == 1) {
    __syncthreads();
  } else {
    cluster_barrier();
  }
}

template <int kBlocks>
__global__ void __launch_bounds__(kNumThreads, 1)
    sparse_mla_fp8_wide_kernel(const __grid_constant__ SparseMlaArguments p, const int num_splits) {
  let_next_kernel_start();
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      for (int half = 0; half < 2; ++half) {
        init_warp_barrier(&shared.rows_full[stage][half], 4);
        init_warp_barrier(&shared.rows_free[stage][half], 4 * kBlocks);
      }
    }
    init_warp_barrier(&shared.queries_full, 4);
    init_warp_barrier(&shared.weights_full, 4);
    init_warp_barrier(&shared.weights_free, 4);
    fence_mbarrier_init();
  }
  meet_all<kBlocks>();
  wait_for_last_kernel();

  const int warpgroup = warp_of_thread() / 4;
  if (warpgroup == 0) {
    take_registers<kScoreRegisters>();
    score_works<kBlocks>(shared, p, num_splits);
  } else if (warpgroup == 1) {
    take_registers<kValueRegisters>();
    sum_works<kBlocks>(shared, p, num_splits);
  } else {
    give_registers<kRowRegisters>();
    decode_works<kBlocks>(shared, p, num_splits);
  }
  if (kBlocks == 2) {
    cluster_barrier();  // the other block may still write to this one
  }
}

template <int kBlocks>
const char* launch(const SparseMlaArguments& arguments, int num_splits, void* stream) {
  const int num_works =
      arguments.num_tokens * num_head_tiles(arguments.num_heads, kTileHeads) / kBlocks * num_splits;
  const int num_clusters = std::min(num_works, std::max(1, num_multiprocessors() / kBlocks));
  const ClusterShape shape = {kBlocks, kNumThreads, static_cast<int>(sizeof(Shared))};
  return launch_clusters(sparse_mla_fp8_wide_kernel<kBlocks>, shape, num_clusters * kBlocks, stream, arguments,
                         num_splits);
}

}  // namespace
}  // namespace wide

const char* launch_sparse_mla_wide(const SparseMlaArguments& arguments, int num_splits, void* stream) {
  const bool by_pairs = num_head_tiles(arguments.num_heads, wide::kTileHeads) % 2 == 0;
  return by_pairs ? wide::launch<2>(arguments, num_splits, stream) : wide::launch<1>(arguments, num_splits, stream);
}

}  // namespace dsv32
