// sparse_mla for an fp8_ds_mla cache and 16 heads at a time, on SM 90.
//
// A block attends a share of the keys of one token, 64 at a time; the shares of a token are the blocks of a cluster,
// which join their results through each other's shared memory. Four warpgroups: one has rows copied to a ring of
// tiles, one computes scores and weights, two sum rows by weights, and barriers in shared memory are all that they
// wait for.
//
// Rows stay bytes in shared memory; both products decode them into operands in registers, in float16: there is an
// instruction for that, and sparse_mla_queries.cuh and sparse_mla_softmax.cuh say why its range is enough. A decoded
// copy in shared memory would be written once and read twice, 192 KB a tile where this takes 64: at 128 bytes a clock,
// more time than the GPU's memory takes to deliver the tile.
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.cuh"
#include "sparse_mla_copy.cuh"
#include "sparse_mla_scores.cuh"
#include "sparse_mla_sm90.h"
#include "sparse_mla_values.cuh"

namespace dsv32 {
namespace {

// For the warps that have nothing to join: all threads of a cluster meet before and after.
__device__ __forceinline__ void let_others_join() {
  cluster_barrier();
  cluster_barrier_relaxed();
}

__device__ __forceinline__ void join_cluster(const Sums& sums, Shared& shared, const SparseMlaArguments& p,
                                             const Place& place, const Work& work, int warp, int lane) {
  // Rows are where sums will be: all are used.
  named_barrier(kValueBarrier, kNumValueWarps * 32);
  keep_sums(sums, shared, warp, lane);
  cluster_barrier();
  switch (place.num_splits) {
    case 2: join_sums<2>(shared, p, work, place.rank, warp, lane); break;
    case 3: join_sums<3>(shared, p, work, place.rank, warp, lane); break;
    case 4: join_sums<4>(shared, p, work, place.rank, warp, lane); break;
    case 5: join_sums<5>(shared, p, work, place.rank, warp, lane); break;
    case 6: join_sums<6>(shared, p, work, place.rank, warp, lane); break;
    case 8: join_sums<8>(shared, p, work, place.rank, warp, lane); break;
    case 16: join_sums<16>(shared, p, work, place.rank, warp, lane); break;
  }
  // A block stays until all have read its shared memory; what they read, they have used.
  cluster_barrier_relaxed();
}

// Blocks of a cluster have a split of one work each; others take one work after the other.
template <bool kIsSplit>
__device__ __forceinline__ void sum_works(Shared& shared, const SparseMlaArguments& p, const Place& place, int warp,
                                          int lane) {
  ValueTurns turns;
  for (int index = place.first_work; index < place.num_works; index += place.stride) {
    const Work work(p, place, index);
    if (!kIsSplit && work.is_passed_over()) {
      index = last_passed_over(p, place, index, lane);
      continue;
    }
    Sums sums = {};
    sum_tiles(sums, turns, shared, work, warp, lane);
    if constexpr (kIsSplit) {
      join_cluster(sums, shared, p, place, work, warp, lane);
      return;
    } else {
      store_sums(sums, turns, shared, p, work, warp, lane);
    }
  }
}

template <bool kIsSplit>
__device__ __forceinline__ void score_works(Shared& shared, const SparseMlaArguments& p, const Place& place, int warp,
                                            int lane) {
  ScoreTurns turns;
  for (int index = place.first_work; index < place.num_works; index += place.stride) {
    const Work work(p, place, index);
    if (!kIsSplit && work.is_passed_over()) {
      index = last_passed_over(p, place, index, lane);
      continue;
    }
    score_tiles<kIsSplit>(turns, shared, p, work, warp, lane);
  }
  if constexpr (kIsSplit) {
    let_others_join();
  }
}

template <bool kIsSplit>
__device__ __forceinline__ void copy_works(Shared& shared, const SparseMlaArguments& p, const Place& place, int warp,
                                           int lane) {
  Turn<kStages> turn;
  for (int index = place.first_work; index < place.num_works; index += place.stride) {
    if (index + place.stride < place.num_works) {
      prefetch_queries(p, Work(p, place, index + place.stride), warp, lane);
    }
    const Work work(p, place, index);
    if (!kIsSplit && work.is_passed_over()) {
      index = last_passed_over(p, place, index, lane);
      continue;
    }
    copy_tiles(turn, shared, p, work, warp, lane);
  }
  if constexpr (kIsSplit) {
    let_others_join();
  }
}

template <bool kIsSplit>
__global__ void __launch_bounds__(kNumThreads, 1)
    sparse_mla_fp8_kernel(const __grid_constant__ SparseMlaArguments p, const int num_splits) {
  let_next_kernel_start();
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  // The same in all lanes, which the compiler cannot know of threadIdx.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_warp_barrier(&shared.rows_full[stage], kNumCopyWarps);
      init_warp_barrier(&shared.rows_free[stage], kNumValueWarps);
    }
    for (int stage = 0; stage < kWeightStages; ++stage) {
      init_warp_barrier(&shared.weights_full[stage], kNumScoreWarps);
      init_warp_barrier(&shared.weights_free[stage], kNumValueWarps);
    }
    init_warp_barrier(&shared.maxima_full, kNumScoreWarps);
    init_warp_barrier(&shared.softmax_full, 1);
    init_warp_barrier(&shared.softmax_free, kNumValueWarps);
    fence_mbarrier_init();
  }
  const Place place(p, num_splits);
  __syncthreads();
  wait_for_last_kernel();

  if (warp < kNumScoreWarps) {
    take_registers<kScoreRegisters>();
    score_works<kIsSplit>(shared, p, place, warp, lane);
  } else if (warp < kNumScoreWarps + kNumValueWarps) {
    give_registers<kValueRegisters>();
    sum_works<kIsSplit>(shared, p, place, warp - kNumScoreWarps, lane);
  } else {
    give_registers<kCopyRegisters>();
    copy_works<kIsSplit>(shared, p, place, warp - kNumScoreWarps - kNumValueWarps, lane);
  }
}

auto kernel_of(int num_splits) { return num_splits > 1 ? sparse_mla_fp8_kernel<true> : sparse_mla_fp8_kernel<false>; }

ClusterShape cluster_of(int num_splits) { return {num_splits, kNumThreads, static_cast<int>(sizeof(Shared))}; }

}  // namespace

const char* launch_sparse_mla(const SparseMlaArguments& arguments, int num_splits, void* stream) {
  const int num_works = arguments.num_tokens * num_head_tiles(arguments.num_heads, kTileHeads);
  const int num_blocks = num_splits > 1 ? num_works * num_splits : std::min(num_works, num_multiprocessors());
  return launch_clusters(kernel_of(num_splits), cluster_of(num_splits), num_blocks, stream, arguments, num_splits);
}

const char* count_sparse_mla_clusters(int num_splits, int* count) {
  return count_concurrent_clusters(kernel_of(num_splits), cluster_of(num_splits), count);
}

}  // namespace dsv32
