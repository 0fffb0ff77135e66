// index_logits for prefill with 64 heads, on SM 90.
//
// A block has the queries of eight rows in shared memory and walks over tiles of their keys. Two warpgroups multiply
// and sum over the heads, four rows each; one warp has everything copied. Blocks are as many as multiprocessors, and
// each takes an equal part of all tiles: a score is computed by one thread, in the same order wherever its tile is.
#include <cuda_runtime.h>

#include <algorithm>

#include "index_logits_copy.cuh"
#include "index_logits_scores.cuh"
#include "index_logits_share.cuh"
#include "launch.cuh"

namespace dsv32 {
namespace index_logits {
namespace {

__global__ void __launch_bounds__(kNumThreads, 1) index_logits_kernel(const __grid_constant__ Problem problem) {
  let_next_kernel_start();
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kWorkStages; ++stage) {
      init_warp_barrier(&shared.work_full[stage], 1);
      init_warp_barrier(&shared.work_free[stage], kScoreWarps);
    }
    for (int stage = 0; stage < kKeyStages; ++stage) {
      init_warp_barrier(&shared.keys_full[stage], 1);
      init_warp_barrier(&shared.keys_free[stage], kScoreWarps);
    }
    fence_mbarrier_init();
  }
  wait_for_last_kernel();
  const Share share = share_of_block(shared, problem.arguments);

  const int warp = warp_of_thread(), lane = threadIdx.x % 32;
  if (warp >= kScoreWarps) {
    give_registers<kCopyRegisters>();
    if (warp == kScoreWarps) {
      copy_share(shared, problem, share, lane);
    }
  } else {
    take_registers<kScoreRegisters>();
    score_works(shared, problem.arguments, warp / 4, warp % 4, lane);
  }
}

}  // namespace
}  // namespace index_logits

const char* launch_index_logits(const IndexLogitsArguments& arguments, void* stream) {
  using namespace index_logits;
  Problem problem;
  problem.arguments = arguments;
  const int64_t num_queries = static_cast<int64_t>(arguments.num_rows) * kHeads;
  const char* error = map_pages(&problem.queries, arguments.q, num_queries, 1, num_queries * kIndexHeadDim,
                                kRowsOfBox * kHeads);
  if (error != nullptr) {
    return error;
  }
  error = map_pages(&problem.keys, arguments.cache, arguments.block_size, arguments.num_blocks, arguments.page_nbytes,
                    kTileKeys);
  if (error != nullptr) {
    return error;
  }
  // Each row may be of another request.
  const int64_t most_tiles = static_cast<int64_t>(arguments.num_rows) * count_tiles(arguments.length, kTileKeys);
  const int num_blocks = static_cast<int>(std::min<int64_t>(num_multiprocessors(), most_tiles));
  const ClusterShape shape = {1, kNumThreads, static_cast<int>(sizeof(Shared))};
  return launch_clusters(index_logits_kernel, shape, num_blocks, stream, problem);
}

}  // namespace dsv32
