// sparse_mla for an fp8_ds_mla cache and 16 heads at a time, on SM 90.
//
// A block attends a share of the keys of one token, 64 at a time; the shares of a token are the blocks of a cluster,
// which join their results through each other's shared memory. Four warpgroups: one has rows copied to a ring of
// tiles, one computes scores and weights, two sum rows by weights, and barriers in shared memory are all that they
// wait for.
//
// Rows stay bytes in shared memory; both products decode them into operands in registers. A decoded copy in shared
// memory would be written once and read twice, 192 KB a tile where this takes 64: at 128 bytes a clock, more time
// than the GPU's memory takes to deliver the tile.
#include <cuda_runtime.h>

#include <algorithm>

#include "sparse_mla_copy.cuh"
#include "sparse_mla_scores.cuh"
#include "sparse_mla_sm90.h"
#include "sparse_mla_values.cuh"

namespace dsv32 {
namespace {

template <class C>
__device__ __forceinline__ void sum_works(Shared<C>& shared, const SparseMlaArguments& p, const Place& place,
                                          int warp, int lane) {
  ValueTurns<C> turns;
  for (int index = place.first_work; index < place.num_works; index += place.stride) {
    const Work work(p, place, index);
    Sums sums = {};
    sum_tiles(sums, turns, shared, work, warp, lane);
    if (place.num_splits == 1) {
      store_sums(sums, turns, shared, p, work, warp, lane);
      continue;
    }
    // Rows are where sums will be: all are used.
    named_barrier(kValueBarrier, kNumValueWarps * 32);
    keep_sums(sums, shared, warp, lane);
    cluster_barrier();
    const int thread = warp * 32 + lane;
    switch (place.num_splits) {
      case 2: join_sums<2>(shared, p, work, place.rank, thread); break;
      case 4: join_sums<4>(shared, p, work, place.rank, thread); break;
      case 8: join_sums<8>(shared, p, work, place.rank, thread); break;
      case 16: join_sums<16>(shared, p, work, place.rank, thread); break;
    }
    // A block stays until all have read its shared memory; what they read, they have used.
    cluster_barrier_relaxed();
  }
}

template <class C>
__device__ __forceinline__ void score_works(Shared<C>& shared, const SparseMlaArguments& p, const Place& place,
                                            int warp, int lane) {
  ScoreTurns<C> turns;
  for (int index = place.first_work; index < place.num_works; index += place.stride) {
    score_tiles(turns, shared, p, Work(p, place, index), warp, lane);
    if (place.num_splits > 1) {
      cluster_barrier();
      cluster_barrier_relaxed();
    }
  }
}

template <class C>
__device__ __forceinline__ void copy_works(Shared<C>& shared, const SparseMlaArguments& p, const Place& place,
                                           int warp, int lane) {
  Turn<C::kStages> turn;
  for (int index = place.first_work; index < place.num_works; index += place.stride) {
    const Work work(p, place, index);
    if constexpr (C::kCopies == Copies::kChunks) {
      copy_tiles_in_chunks(turn, shared, p, work, warp, lane);
    } else {
      copy_tiles_in_bulk(turn, shared, p, work, warp, lane);
    }
    if (place.num_splits > 1) {
      cluster_barrier();
      cluster_barrier_relaxed();
    }
  }
}

template <class C>
__global__ void __launch_bounds__(kNumThreads, 1)
    sparse_mla_fp8_kernel(const __grid_constant__ SparseMlaArguments p, const int num_splits) {
  auto& shared = *reinterpret_cast<Shared<C>*>(shared_memory());
  // The same in all lanes, which the compiler cannot know of threadIdx.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      mbarrier_init(&shared.rows_full[stage], C::kCopies == Copies::kChunks ? kWarpgroup : 1);
      mbarrier_init(&shared.rows_free[stage], kNumValueWarps);
    }
    for (int stage = 0; stage < kWeightStages; ++stage) {
      mbarrier_init(&shared.weights_full[stage], kNumScoreWarps);
      mbarrier_init(&shared.weights_free[stage], kNumValueWarps);
    }
    mbarrier_init(&shared.softmax_full, 1);
    mbarrier_init(&shared.softmax_free, kNumValueWarps);
    fence_mbarrier_init();
  }
  const Place place(p, num_splits);
  __syncthreads();

  if (warp < kNumScoreWarps) {
    if constexpr (C::kQueriesInRegisters) {
      take_registers<C::kScoreRegisters>();
    }
    score_works(shared, p, place, warp, lane);
  } else if (warp < kNumScoreWarps + kNumValueWarps) {
    if constexpr (C::kQueriesInRegisters) {
      give_registers<C::kValueRegisters>();
    }
    sum_works(shared, p, place, warp - kNumScoreWarps, lane);
  } else {
    if constexpr (C::kQueriesInRegisters) {
      give_registers<C::kCopyRegisters>();
    }
    copy_works(shared, p, place, warp - kNumScoreWarps - kNumValueWarps, lane);
  }
}

using Kernel = void (*)(SparseMlaArguments, int);

struct Variant {
  Kernel kernel;
  int shared_nbytes;
};

template <class C>
Variant variant_of() {
  static_assert(sizeof(Shared<C>) <= 227 * 1024);
  return {sparse_mla_fp8_kernel<C>, static_cast<int>(sizeof(Shared<C>))};
}

Variant find_variant(int variant) {
  switch (variant) {
    case 0: return variant_of<Config<Copies::kRowOfWarp, true>>();
    case 1: return variant_of<Config<Copies::kRowOfWarp, false>>();
    case 2: return variant_of<Config<Copies::kChunks, true>>();
    case 3: return variant_of<Config<Copies::kChunks, false>>();
    case 4: return variant_of<Config<Copies::kRowOfLane, true>>();
    default: return {nullptr, 0};
  }
}

const char* describe(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// A launch configuration that refers to itself cannot be copied.
struct Launch {
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = {};

  Launch(const Variant& variant, int num_blocks, int num_splits, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(num_splits), 1, 1};
    config.gridDim = dim3(num_blocks);
    config.blockDim = dim3(kNumThreads);
    config.dynamicSmemBytes = variant.shared_nbytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
};

cudaError_t prepare(const Variant& variant) {
  const cudaError_t error =
      cudaFuncSetAttribute(variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, variant.shared_nbytes);
  if (error != cudaSuccess) {
    return error;
  }
  return cudaFuncSetAttribute(variant.kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

}  // namespace

const char* launch_sparse_mla(const SparseMlaArguments& arguments, int num_splits, int variant, void* stream) {
  const Variant chosen = find_variant(variant);
  if (const cudaError_t error = prepare(chosen); error != cudaSuccess) {
    return describe(error);
  }
  const int num_works = arguments.num_tokens * num_head_tiles(arguments.num_heads);
  int device = 0, num_multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int num_blocks = num_splits > 1 ? num_works * num_splits : std::min(num_works, num_multiprocessors);
  const Launch launch(chosen, num_blocks, num_splits, static_cast<cudaStream_t>(stream));
  return describe(cudaLaunchKernelEx(&launch.config, chosen.kernel, arguments, num_splits));
}

const char* count_concurrent_clusters(int num_splits, int variant, int* count) {
  const Variant chosen = find_variant(variant);
  if (const cudaError_t error = prepare(chosen); error != cudaSuccess) {
    return describe(error);
  }
  const Launch launch(chosen, num_splits, num_splits, nullptr);
  return describe(cudaOccupancyMaxActiveClusters(count, chosen.kernel, &launch.config));
}

}  // namespace dsv32
