// What operators of sparse_mla ask of the latent cache and of queries.
#pragma once

#include "layout.h"
#include "operator_tensors.h"
#include "sparse_mla_sm90.h"

namespace dsv32 {

// Of a cache of latents.
inline int64_t page_nbytes_of(const Tensor& cache) {
  return cache.stride(0) * (cache.scalar_type() == ScalarType::Byte ? 1 : 2);
}

// Rows of so many values of the type.
inline void require_latent_cache(const char* op, const Tensor& cache, ScalarType type, int64_t row_size) {
  require(cache.dim() == 3 && cache.is_cuda() && cache.scalar_type() == type && cache.size(2) == row_size &&
              cache.stride(2) == 1 && cache.stride(1) == row_size,
          op, ": cache: expected ", type == ScalarType::Byte ? "uint8" : "bfloat16", " [num_blocks, block_size, ",
          row_size, "] with dense rows, got ", describe(cache));
  const int64_t page_nbytes = page_nbytes_of(cache);
  require(page_nbytes % 16 == 0 && reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16 == 0, op,
          ": cache: expected pages at multiples of 16 bytes, got one every ", page_nbytes);
}

// Of results, the caller says what they are like.
inline SparseMlaArguments sparse_mla_arguments(const char* op, ScalarType cache_type, int64_t row_size,
                                               const Tensor& q, const Tensor& cache, const Tensor& topk_slot,
                                               const Tensor& num_valid, double scale_log2, const Tensor& out,
                                               const Tensor& lse) {
  require(q.dim() == 3 && topk_slot.dim() == 2, op, ": expected q and topk_slot of 3 and 2 dimensions, got ", q.dim(),
          " and ", topk_slot.dim());
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), num_slots = topk_slot.size(1);
  require_tensor(op, q, "q", ScalarType::BFloat16, {num_tokens, num_heads, kLatentDim});
  require_aligned(op, q.data_ptr(), "q");
  require_tensor(op, topk_slot, "topk_slot", ScalarType::Int, {num_tokens, num_slots});
  require_tensor(op, num_valid, "num_valid", ScalarType::Int, {num_tokens});
  require_latent_cache(op, cache, cache_type, row_size);
  return {
      .q = q.data_ptr(),
      .cache = static_cast<const uint8_t*>(cache.data_ptr()),
      .topk_slot = static_cast<const int32_t*>(topk_slot.data_ptr()),
      .num_valid = static_cast<const int32_t*>(num_valid.data_ptr()),
      .out = out.data_ptr(),
      .lse = static_cast<float*>(lse.data_ptr()),
      .page_nbytes = page_nbytes_of(cache),
      .scale_log2 = static_cast<float>(scale_log2),
      .num_tokens = static_cast<int>(num_tokens),
      .num_heads = static_cast<int>(num_heads),
      .num_slots = static_cast<int>(num_slots),
      .block_size = static_cast<int>(cache.size(1)),
  };
}

}  // namespace dsv32
