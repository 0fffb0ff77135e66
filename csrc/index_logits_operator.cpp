// The operator of index_logits_sm90.h.
#include "index_logits_sm90.h"
#include "layout.h"
#include "operator_tensors.h"

namespace dsv32 {
namespace {

void index_logits(Tensor q, Tensor weights, Tensor cache, Tensor block_table, Tensor request_ids, Tensor num_keys,
                  Tensor logits) {
  const char* op = "index_logits";
  require_rows(op, logits, "logits", ScalarType::Float);
  require_rows(op, block_table, "block_table", ScalarType::Int);
  const int64_t num_rows = logits.size(0), length = logits.size(1);
  require_tensor(op, q, "q", ScalarType::Float8_e4m3fn, {num_rows, kIndexHeads, kIndexHeadDim});
  require_tensor(op, weights, "weights", ScalarType::Float, {num_rows, kIndexHeads});
  require_tensor(op, request_ids, "request_ids", ScalarType::Int, {num_rows});
  require_tensor(op, num_keys, "num_keys", ScalarType::Int, {num_rows});
  require(cache.is_cuda() && cache.scalar_type() == ScalarType::Byte && cache.dim() == 3 &&
              cache.size(2) == kIndexKeyNbytes && cache.stride(2) == 1 && cache.stride(1) == kIndexKeyNbytes,
          op, ": cache: expected uint8 [num_blocks, block_size, ", kIndexKeyNbytes, "] with dense rows");
  require(cache.size(1) % kIndexTileKeys == 0, op, ": cache: expected blocks of a multiple of ", kIndexTileKeys,
          " tokens, got ", cache.size(1));
  require(cache.stride(0) % 16 == 0, op, ": cache: expected pages at multiples of 16 bytes, got one every ",
          cache.stride(0));
  require_aligned(op, q.data_ptr(), "q");
  require_aligned(op, weights.data_ptr(), "weights");
  require_aligned(op, cache.data_ptr(), "cache");
  require(length < int64_t{1} << 30 && num_rows < int64_t{1} << 24, op, ": logits: too large");
  if (num_rows == 0 || length == 0) {
    return;
  }
  const IndexLogitsArguments arguments = {
      .q = static_cast<const uint8_t*>(q.data_ptr()),
      .weights = static_cast<const float*>(weights.data_ptr()),
      .cache = static_cast<const uint8_t*>(cache.data_ptr()),
      .block_table = static_cast<const int32_t*>(block_table.data_ptr()),
      .request_ids = static_cast<const int32_t*>(request_ids.data_ptr()),
      .num_keys = static_cast<const int32_t*>(num_keys.data_ptr()),
      .logits = static_cast<float*>(logits.data_ptr()),
      .page_nbytes = cache.stride(0),
      .block_table_stride = block_table.stride(0),
      .logits_stride = logits.stride(0),
      .num_rows = static_cast<int>(num_rows),
      .num_blocks = static_cast<int>(cache.size(0)),
      .block_size = static_cast<int>(cache.size(1)),
      .length = static_cast<int>(length),
  };
  launch_for(op, q, [&](void* stream) { return launch_index_logits(arguments, stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_dsv32, library) {
  library.def(
      "index_logits(Tensor q, Tensor weights, Tensor cache, Tensor block_table, Tensor request_ids, Tensor num_keys, "
      "Tensor(a!) logits) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_dsv32, CUDA, library) {
  library.impl("index_logits", TORCH_BOX(&index_logits));
}

}  // namespace dsv32
