// sparse_mla for a cache in bfloat16 and 16 heads, on SM 90: four tokens at a time.
//
// Four adjacent tokens of 16 heads are the 64 rows that a block of sparse_mla_bf16_wide_sm90.cu has. Their keys are the
// union of what each has selected, each read and multiplied once for all of them; a key that a token has not selected
// has no weight in its rows. slot_union_sm90.cu makes the unions.
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.cuh"
#include "sparse_mla_bf16_works.cuh"
#include "sparse_mla_sm90.h"

namespace dsv32 {
namespace wide::bf16 {
namespace {

__global__ void __launch_bounds__(kNumThreads, 1)
    sparse_mla_bf16_union_kernel(const __grid_constant__ SparseMlaArguments p, const uint16_t* const seen) {
  attend_works<SelectedKeys>(p, 1, seen);
}

}  // namespace
}  // namespace wide::bf16

const char* launch_sparse_mla_bf16_union(const SparseMlaArguments& arguments, const void* seen, void* stream) {
  using namespace wide::bf16;
  const ClusterShape shape = {1, kNumThreads, static_cast<int>(sizeof(Shared))};
  const int num_blocks = std::min(arguments.num_tokens, num_multiprocessors());
  return launch_clusters(sparse_mla_bf16_union_kernel, shape, num_blocks, stream, arguments,
                         static_cast<const uint16_t*>(seen));
}

}  // namespace dsv32
