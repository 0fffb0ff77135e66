// Operators of topk_select_sm90.h.
#include "operator_tensors.h"
#include "topk_select_sm90.h"

namespace dsv32 {
namespace {

bool is_power_of_two(int64_t x, int64_t largest) { return x >= 1 && x <= largest && (x & (x - 1)) == 0; }

void require_cluster_size(int64_t cluster_size) {
  require(is_power_of_two(cluster_size, kMaxTopkCluster), "topk_select: cluster_size: expected a power of two up to ",
          kMaxTopkCluster, ", got ", cluster_size);
}

void topk_select(Tensor logits, Tensor num_keys, Tensor request_ids, Tensor block_table, int64_t block_size,
                 int64_t cluster_size, Tensor topk_slot) {
  const char* op = "topk_select";
  require_cluster_size(cluster_size);
  require_rows(op, logits, "logits", ScalarType::Float);
  require_rows(op, block_table, "block_table", ScalarType::Int);
  require_rows(op, topk_slot, "topk_slot", ScalarType::Int);
  require(topk_slot.size(1) <= kMaxTopk, op, ": topk_slot: expected at most ", kMaxTopk, " a row, got ",
          topk_slot.size(1));
  const int64_t num_rows = logits.size(0), length = logits.size(1), k = topk_slot.size(1);
  require_tensor(op, num_keys, "num_keys", ScalarType::Int, {num_rows});
  require_tensor(op, request_ids, "request_ids", ScalarType::Int, {num_rows});
  require(topk_slot.size(0) == num_rows, op, ": topk_slot: expected ", num_rows, " rows, got ", topk_slot.size(0));
  require(length < int64_t{1} << 30 && num_rows * cluster_size < int64_t{1} << 31, op, ": logits: too large");
  require(block_size >= 1 && block_size < int64_t{1} << 31, op, ": block_size: expected 1 or more, got ", block_size);
  if (num_rows == 0 || k == 0) {
    return;
  }
  const TopkSelectArguments arguments = {
      .logits = static_cast<const float*>(logits.data_ptr()),
      .num_keys = static_cast<const int32_t*>(num_keys.data_ptr()),
      .request_ids = static_cast<const int32_t*>(request_ids.data_ptr()),
      .block_table = static_cast<const int32_t*>(block_table.data_ptr()),
      .topk_slot = static_cast<int32_t*>(topk_slot.data_ptr()),
      .logits_stride = logits.stride(0),
      .block_table_stride = block_table.stride(0),
      .topk_slot_stride = topk_slot.stride(0),
      .num_rows = static_cast<int>(num_rows),
      .length = static_cast<int>(length),
      .k = static_cast<int>(k),
      .block_size = static_cast<int>(block_size),
  };
  launch_for(op, logits, [&](void* stream) {
    return launch_topk_select(arguments, static_cast<int>(cluster_size), stream);
  });
}

// Of the current device.
int64_t topk_select_concurrency(int64_t cluster_size) {
  require_cluster_size(cluster_size);
  return count_for("topk_select_concurrency", count_topk_select_clusters, cluster_size);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_dsv32, library) {
  library.def(
      "topk_select(Tensor logits, Tensor num_keys, Tensor request_ids, Tensor block_table, int block_size, "
      "int cluster_size, Tensor(a!) topk_slot) -> ()");
  library.def("topk_select_concurrency(int cluster_size) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_dsv32, CUDA, library) {
  library.impl("topk_select", TORCH_BOX(&topk_select));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_dsv32, CompositeExplicitAutograd, library) {
  library.impl("topk_select_concurrency", TORCH_BOX(&topk_select_concurrency));
}

}  // namespace dsv32
