// sparse_mla for a cache in bfloat16 and 64 heads at a time, on SM 90.
//
// A block attends all keys of one token, or a split of them, 64 at a time, with products of warpgroups. Three
// warpgroups: one computes scores and weights; two sum half of the latents each, and copy rows as they are, to where
// products read them as keys and as values. What splits give out is joined by another launch.
//
// Blocks of other heads of a token are neighbours: what one has read, the second-level cache has for the other.
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.cuh"
#include "sparse_mla_bf16_works.cuh"
#include "sparse_mla_sm90.h"

namespace dsv32 {
namespace wide::bf16 {
namespace {

__global__ void __launch_bounds__(kNumThreads, 1)
    sparse_mla_bf16_wide_kernel(const __grid_constant__ SparseMlaArguments p, const int num_splits) {
  attend_works<AllKeys>(p, num_splits, {});
}

}  // namespace
}  // namespace wide::bf16

const char* launch_sparse_mla_bf16_wide(const SparseMlaArguments& arguments, int num_splits, void* stream) {
  using namespace wide::bf16;
  const ClusterShape shape = {1, kNumThreads, static_cast<int>(sizeof(Shared))};
  const int num_blocks = std::min(wide::num_works<1>(arguments, num_splits), num_multiprocessors());
  return launch_clusters(sparse_mla_bf16_wide_kernel, shape, num_blocks, stream, arguments, num_splits);
}

}  // namespace dsv32
