// Operators of sparse_mla_sm90.h, but for unions.
#include <algorithm>
#include <iterator>

#include "latent_tensors.h"
#include "sparse_mla_sm90.h"

namespace dsv32 {
namespace {

void require_splits(int64_t num_splits) {
  require(std::ranges::find(kSplitCounts, num_splits) != std::end(kSplitCounts),
          "sparse_mla_fp8: num_splits: expected 1 to 6, 8 or 16, got ", num_splits);
}

void sparse_mla_fp8(Tensor q, Tensor cache, Tensor topk_slot, Tensor num_valid, double scale_log2,
                    int64_t num_splits, Tensor out, Tensor lse) {
  const char* op = "sparse_mla_fp8";
  require_splits(num_splits);
  const SparseMlaArguments arguments =
      sparse_mla_arguments(op, ScalarType::Byte, kLatentFp8Nbytes, q, cache, topk_slot, num_valid, scale_log2, out,
                           lse);
  const int64_t num_tokens = q.size(0), num_heads = q.size(1);
  require_tensor(op, out, "out", ScalarType::BFloat16, {num_tokens, num_heads, kKvLoraRank});
  require_tensor(op, lse, "lse", ScalarType::Float, {num_tokens, num_heads});
  if (num_tokens == 0) {
    return;
  }
  launch_for(op, q, [&](void* stream) { return launch_sparse_mla(arguments, static_cast<int>(num_splits), stream); });
}

using LaunchWide = const char* (*)(const SparseMlaArguments&, int, void*);

void sparse_mla_wide(const char* op, LaunchWide launch, ScalarType cache_type, int64_t row_size, const Tensor& q,
                     const Tensor& cache, const Tensor& topk_slot, const Tensor& num_valid, double scale_log2,
                     int64_t num_splits, const Tensor& out, const Tensor& lse) {
  require(num_splits >= 1 && num_splits <= kMaxWideSplits, op, ": num_splits: expected 1 to ", kMaxWideSplits,
          ", got ", num_splits);
  const SparseMlaArguments arguments =
      sparse_mla_arguments(op, cache_type, row_size, q, cache, topk_slot, num_valid, scale_log2, out, lse);
  const int64_t num_tokens = q.size(0), num_heads = q.size(1);
  if (num_splits == 1) {
    require_tensor(op, out, "out", ScalarType::BFloat16, {num_tokens, num_heads, kKvLoraRank});
    require_tensor(op, lse, "lse", ScalarType::Float, {num_tokens, num_heads});
  } else {
    require_tensor(op, out, "out", ScalarType::Float, {num_tokens, num_splits, num_heads, kKvLoraRank});
    require_tensor(op, lse, "lse", ScalarType::Float, {num_tokens, num_splits, num_heads});
  }
  if (num_tokens == 0) {
    return;
  }
  launch_for(op, q, [&](void* stream) { return launch(arguments, static_cast<int>(num_splits), stream); });
}

void sparse_mla_fp8_wide(Tensor q, Tensor cache, Tensor topk_slot, Tensor num_valid, double scale_log2,
                         int64_t num_splits, Tensor out, Tensor lse) {
  sparse_mla_wide("sparse_mla_fp8_wide", launch_sparse_mla_wide, ScalarType::Byte, kLatentFp8Nbytes, q, cache,
                  topk_slot, num_valid, scale_log2, num_splits, out, lse);
}

void sparse_mla_bf16_wide(Tensor q, Tensor cache, Tensor topk_slot, Tensor num_valid, double scale_log2,
                          int64_t num_splits, Tensor out, Tensor lse) {
  sparse_mla_wide("sparse_mla_bf16_wide", launch_sparse_mla_bf16_wide, ScalarType::BFloat16, kLatentDim, q, cache,
                  topk_slot, num_valid, scale_log2, num_splits, out, lse);
}

// Of the current device.
int64_t sparse_mla_fp8_concurrency(int64_t num_splits) {
  require_splits(num_splits);
  return count_for("sparse_mla_fp8_concurrency", count_sparse_mla_clusters, num_splits);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_dsv32, library) {
  library.def(
      "sparse_mla_fp8(Tensor q, Tensor cache, Tensor topk_slot, Tensor num_valid, float scale_log2, int num_splits, "
      "Tensor(a!) out, Tensor(b!) lse) -> ()");
  library.def(
      "sparse_mla_fp8_wide(Tensor q, Tensor cache, Tensor topk_slot, Tensor num_valid, float scale_log2, "
      "int num_splits, Tensor(a!) out, Tensor(b!) lse) -> ()");
  library.def(
      "sparse_mla_bf16_wide(Tensor q, Tensor cache, Tensor topk_slot, Tensor num_valid, float scale_log2, "
      "int num_splits, Tensor(a!) out, Tensor(b!) lse) -> ()");
  library.def("sparse_mla_fp8_concurrency(int num_splits) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_dsv32, CUDA, library) {
  library.impl("sparse_mla_fp8", TORCH_BOX(&sparse_mla_fp8));
  library.impl("sparse_mla_fp8_wide", TORCH_BOX(&sparse_mla_fp8_wide));
  library.impl("sparse_mla_bf16_wide", TORCH_BOX(&sparse_mla_bf16_wide));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_dsv32, CompositeExplicitAutograd, library) {
  library.impl("sparse_mla_fp8_concurrency", TORCH_BOX(&sparse_mla_fp8_concurrency));
}

}  // namespace dsv32
