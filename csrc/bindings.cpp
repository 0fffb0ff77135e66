// Operators of the library, on torch's stable ABI: one build serves every torch from 2.11 on, and every Python.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "checks.h"
#include "index_logits_sm90.h"
#include "latent_pages_sm90.h"
#include "layout.h"
#include "slot_union_sm90.h"
#include "sparse_mla_sm90.h"
#include "topk_select_sm90.h"

namespace dsv32 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string describe(ScalarType type, const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << type << " [";
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    text << (dim > 0 ? ", " : "") << sizes[dim];
  }
  text << "]";
  return text.str();
}

std::string describe(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    sizes.push_back(x.size(dim));
  }
  return describe(x.scalar_type(), sizes) + (x.is_contiguous() ? "" : ", not contiguous") +
         (x.is_cuda() ? "" : ", not on CUDA");
}

void require_tensor(const char* op, const Tensor& x, const char* name, ScalarType type,
                    std::initializer_list<int64_t> sizes) {
  bool fits = x.is_cuda() && x.scalar_type() == type && x.is_contiguous() && x.dim() == int64_t(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    fits = fits && x.size(dim++) == size;
  }
  if (!fits) {
    require(false, op, ": ", name, ": expected ", describe(type, sizes), ", got ", describe(x));
  }
}

void require_rows(const char* op, const Tensor& x, const char* name, ScalarType type) {
  if (!(x.is_cuda() && x.scalar_type() == type && x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1))) {
    require(false, op, ": ", name, ": expected ", type, " in two dimensions with dense rows, got ", describe(x));
  }
}

bool is_power_of_two(int64_t x, int64_t largest) { return x >= 1 && x <= largest && (x & (x - 1)) == 0; }

// Looked up when called: a torch without CUDA lacks the function, and can yet load the library and describe its
// operators.
void* current_stream(int device_index) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  require(get_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device_index, &stream));
  return stream;
}

void require_splits(int64_t num_splits) {
  require(std::ranges::find(kSplitCounts, num_splits) != std::end(kSplitCounts),
          "sparse_mla_fp8: num_splits: expected 1 to 6, 8 or 16, got ", num_splits);
}

void require_aligned(const char* op, const void* data, const char* name) {
  require(reinterpret_cast<uintptr_t>(data) % 16 == 0, op, ": ", name, ": expected data at a multiple of 16 bytes");
}

// Of a cache of latents.
int64_t page_nbytes_of(const Tensor& cache) { return cache.stride(0) * (cache.scalar_type() == ScalarType::Byte ? 1 : 2); }

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
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
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
  const char* error = launch_index_logits(arguments, current_stream(q.get_device_index()));
  require(error == nullptr, op, ": ", error ? error : "");
}

// Rows of so many values of the type.
void require_latent_cache(const char* op, const Tensor& cache, ScalarType type, int64_t row_size) {
  require(cache.dim() == 3 && cache.is_cuda() && cache.scalar_type() == type && cache.size(2) == row_size &&
              cache.stride(2) == 1 && cache.stride(1) == row_size,
          op, ": cache: expected ", type == ScalarType::Byte ? "uint8" : "bfloat16", " [num_blocks, block_size, ",
          row_size, "] with dense rows, got ", describe(cache));
  const int64_t page_nbytes = page_nbytes_of(cache);
  require(page_nbytes % 16 == 0 && reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16 == 0, op,
          ": cache: expected pages at multiples of 16 bytes, got one every ", page_nbytes);
}

// Of results, the caller says what they are like.
SparseMlaArguments sparse_mla_arguments(const char* op, ScalarType cache_type, int64_t row_size, const Tensor& q,
                                        const Tensor& cache, const Tensor& topk_slot,
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
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const char* error =
      launch_sparse_mla(arguments, static_cast<int>(num_splits), current_stream(q.get_device_index()));
  require(error == nullptr, op, ": ", error ? error : "");
}

using LaunchWide = const char* (*)(const SparseMlaArguments&, int, void*);

void sparse_mla_wide(const char* op, LaunchWide launch, ScalarType cache_type, int64_t row_size, const Tensor& q,
                     const Tensor& cache, const Tensor& topk_slot, const Tensor& num_valid, double scale_log2,
                     int64_t num_splits, const Tensor& out, const Tensor& lse) {
  require(num_splits >= 1 && num_splits <= kMaxWideSplits, op, ": num_splits: expected 1 to ", kMaxWideSplits,
          ", got ", num_splits);
  const SparseMlaArguments arguments =
      sparse_mla_arguments(op, cache_type, row_size, q, cache, topk_slot, num_valid, scale_log2, out, lse);
  require_aligned(op, q.data_ptr(), "q");
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
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const char* error = launch(arguments, static_cast<int>(num_splits), current_stream(q.get_device_index()));
  require(error == nullptr, op, ": ", error ? error : "");
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

constexpr int64_t kUnionHeads = 64;  // four tokens of 16 heads
constexpr int64_t kMaxUnionGroups = int64_t{1} << 19;
constexpr int64_t kMaxPlacedSlots = int64_t{1} << 30;

int64_t num_union_tiles(int64_t num_slots) { return (num_slots + 63) / 64; }

// The count, then the place of each page of the cache, all in one; and the page of each place. None: no places.
PagePlaces page_places(const char* op, const Tensor& places, const Tensor& pages, int64_t block_size) {
  require(places.dim() == 1 && pages.dim() == 1, op, ": expected places and pages of one dimension, got ",
          places.dim(), " and ", pages.dim());
  require_tensor(op, places, "places", ScalarType::Int, {places.size(0)});
  require_tensor(op, pages, "pages", ScalarType::Int, {pages.size(0)});
  if (places.size(0) == 0) {
    return {};
  }
  require(block_size >= 1 && pages.size(0) <= kMaxPlacedSlots / block_size, op, ": pages: expected at most ",
          kMaxPlacedSlots, " slots, got ", pages.size(0), " blocks of ", block_size);
  auto* const count = static_cast<int32_t*>(places.data_ptr());
  return {
      .count = count,
      .place_of_page = count + 1,
      .page_of_place = static_cast<int32_t*>(pages.data_ptr()),
      .capacity = static_cast<int>(pages.size(0)),
      .block_size = static_cast<int>(block_size),
  };
}

void slot_union(Tensor topk_slot, Tensor num_valid, double max_share, int64_t block_size, Tensor union_slot,
                Tensor num_union, Tensor seen, Tensor num_left, Tensor places, Tensor pages) {
  const char* op = "slot_union";
  require(topk_slot.dim() == 2 && topk_slot.size(0) % 4 == 0, op,
          ": topk_slot: expected two dimensions and tokens by four, got ", describe(topk_slot));
  const int64_t num_groups = topk_slot.size(0) / 4, num_slots = topk_slot.size(1);
  require(num_slots <= kMaxUnionSlots, op, ": topk_slot: expected at most ", kMaxUnionSlots, " a token, got ",
          num_slots);
  require(num_groups <= kMaxUnionGroups, op, ": topk_slot: too large");
  require_tensor(op, topk_slot, "topk_slot", ScalarType::Int, {num_groups * 4, num_slots});
  require_tensor(op, num_valid, "num_valid", ScalarType::Int, {num_groups * 4});
  require_tensor(op, union_slot, "union_slot", ScalarType::Int, {num_groups, num_slots * 4});
  require_tensor(op, num_union, "num_union", ScalarType::Int, {num_groups});
  require_tensor(op, seen, "seen", ScalarType::Long, {num_groups, num_union_tiles(num_slots * 4), 4});
  require_tensor(op, num_left, "num_left", ScalarType::Int, {num_groups * 4});
  const PagePlaces of_pages = page_places(op, places, pages, block_size);
  if (num_groups == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(topk_slot.get_device_index());
  const SlotUnionArguments arguments = {
      .topk_slot = static_cast<const int32_t*>(topk_slot.data_ptr()),
      .num_valid = static_cast<const int32_t*>(num_valid.data_ptr()),
      .union_slot = static_cast<int32_t*>(union_slot.data_ptr()),
      .num_union = static_cast<int32_t*>(num_union.data_ptr()),
      .seen = static_cast<uint64_t*>(seen.data_ptr()),
      .num_left = static_cast<int32_t*>(num_left.data_ptr()),
      .places = of_pages,
      .max_share = static_cast<float>(max_share),
      .num_groups = static_cast<int>(num_groups),
      .num_slots = static_cast<int>(num_slots),
  };
  const char* error = launch_slot_union(arguments, current_stream(topk_slot.get_device_index()));
  require(error == nullptr, op, ": ", error ? error : "");
}

void latent_pages(Tensor cache, Tensor num_valid, Tensor places, Tensor pages, Tensor latents, Tensor num_union,
                  Tensor num_left) {
  const char* op = "latent_pages";
  require_latent_cache(op, cache, ScalarType::Byte, kLatentFp8Nbytes);
  const int64_t num_blocks = cache.size(0), block_size = cache.size(1), num_groups = num_union.size(0);
  require_tensor(op, places, "places", ScalarType::Int, {1 + num_blocks});
  const PagePlaces of_pages = page_places(op, places, pages, block_size);
  require_tensor(op, latents, "latents", ScalarType::BFloat16, {pages.size(0), block_size, kLatentDim});
  require_aligned(op, latents.data_ptr(), "latents");
  require_tensor(op, num_union, "num_union", ScalarType::Int, {num_groups});
  require_tensor(op, num_valid, "num_valid", ScalarType::Int, {num_groups * 4});
  require_tensor(op, num_left, "num_left", ScalarType::Int, {num_groups * 4});
  const torch::stable::accelerator::DeviceGuard guard(cache.get_device_index());
  const LatentPagesArguments arguments = {
      .cache = static_cast<const uint8_t*>(cache.data_ptr()),
      .num_valid = static_cast<const int32_t*>(num_valid.data_ptr()),
      .places = of_pages,
      .latents = static_cast<uint16_t*>(latents.data_ptr()),
      .num_union = static_cast<int32_t*>(num_union.data_ptr()),
      .num_left = static_cast<int32_t*>(num_left.data_ptr()),
      .page_nbytes = page_nbytes_of(cache),
      .num_groups = static_cast<int>(num_groups),
  };
  const char* error = launch_latent_pages(arguments, current_stream(cache.get_device_index()));
  require(error == nullptr, op, ": ", error ? error : "");
}

void sparse_mla_bf16_union(Tensor q, Tensor cache, Tensor union_slot, Tensor num_union, Tensor seen,
                           double scale_log2, Tensor out, Tensor lse) {
  const char* op = "sparse_mla_bf16_union";
  const SparseMlaArguments arguments = sparse_mla_arguments(op, ScalarType::BFloat16, kLatentDim, q, cache, union_slot,
                                                            num_union, scale_log2, out, lse);
  const int64_t num_groups = q.size(0);
  require(q.size(1) == kUnionHeads, op, ": q: expected four tokens of 16 heads as ", kUnionHeads, " heads, got ",
          q.size(1));
  require(num_groups <= kMaxUnionGroups, op, ": q: too large");
  require(union_slot.size(1) <= kMaxUnionSlots * 4, op, ": union_slot: expected at most ", kMaxUnionSlots * 4,
          " a group, got ", union_slot.size(1));
  require_tensor(op, seen, "seen", ScalarType::Long, {num_groups, num_union_tiles(union_slot.size(1)), 4});
  require_tensor(op, out, "out", ScalarType::BFloat16, {num_groups, kUnionHeads, kKvLoraRank});
  require_tensor(op, lse, "lse", ScalarType::Float, {num_groups, kUnionHeads});
  if (num_groups == 0) {
    return;
  }
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const char* error = launch_sparse_mla_bf16_union(arguments, seen.data_ptr(), current_stream(q.get_device_index()));
  require(error == nullptr, op, ": ", error ? error : "");
}

// Of the current device.
int64_t sparse_mla_fp8_concurrency(int64_t num_splits) {
  require_splits(num_splits);
  int count = 0;
  const char* error = count_sparse_mla_clusters(static_cast<int>(num_splits), &count);
  require(error == nullptr, "sparse_mla_fp8_concurrency: ", error ? error : "");
  return count;
}

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
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
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
  const char* error =
      launch_topk_select(arguments, static_cast<int>(cluster_size), current_stream(logits.get_device_index()));
  require(error == nullptr, op, ": ", error ? error : "");
}

// Of the current device.
int64_t topk_select_concurrency(int64_t cluster_size) {
  require_cluster_size(cluster_size);
  int count = 0;
  const char* error = count_topk_select_clusters(static_cast<int>(cluster_size), &count);
  require(error == nullptr, "topk_select_concurrency: ", error ? error : "");
  return count;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_dsv32, library) {
  library.def(
      "index_logits(Tensor q, Tensor weights, Tensor cache, Tensor block_table, Tensor request_ids, Tensor num_keys, "
      "Tensor(a!) logits) -> ()");
  library.def(
      "sparse_mla_fp8(Tensor q, Tensor cache, Tensor topk_slot, Tensor num_valid, float scale_log2, int num_splits, "
      "Tensor(a!) out, Tensor(b!) lse) -> ()");
  library.def(
      "sparse_mla_fp8_wide(Tensor q, Tensor cache, Tensor topk_slot, Tensor num_valid, float scale_log2, "
      "int num_splits, Tensor(a!) out, Tensor(b!) lse) -> ()");
  library.def(
      "sparse_mla_bf16_wide(Tensor q, Tensor cache, Tensor topk_slot, Tensor num_valid, float scale_log2, "
      "int num_splits, Tensor(a!) out, Tensor(b!) lse) -> ()");
  library.def(
      "slot_union(Tensor topk_slot, Tensor num_valid, float max_share, int block_size, Tensor(a!) union_slot, "
      "Tensor(b!) num_union, Tensor(c!) seen, Tensor(d!) num_left, Tensor(e!) places, Tensor(f!) pages) -> ()");
  library.def(
      "latent_pages(Tensor cache, Tensor num_valid, Tensor places, Tensor pages, Tensor(a!) latents, "
      "Tensor(b!) num_union, Tensor(c!) num_left) -> ()");
  library.def(
      "sparse_mla_bf16_union(Tensor q, Tensor cache, Tensor union_slot, Tensor num_union, Tensor seen, "
      "float scale_log2, Tensor(a!) out, Tensor(b!) lse) -> ()");
  library.def("sparse_mla_fp8_concurrency(int num_splits) -> int");
  library.def(
      "topk_select(Tensor logits, Tensor num_keys, Tensor request_ids, Tensor block_table, int block_size, "
      "int cluster_size, Tensor(a!) topk_slot) -> ()");
  library.def("topk_select_concurrency(int cluster_size) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_dsv32, CUDA, library) {
  library.impl("index_logits", TORCH_BOX(&index_logits));
  library.impl("sparse_mla_fp8", TORCH_BOX(&sparse_mla_fp8));
  library.impl("sparse_mla_fp8_wide", TORCH_BOX(&sparse_mla_fp8_wide));
  library.impl("sparse_mla_bf16_wide", TORCH_BOX(&sparse_mla_bf16_wide));
  library.impl("slot_union", TORCH_BOX(&slot_union));
  library.impl("latent_pages", TORCH_BOX(&latent_pages));
  library.impl("sparse_mla_bf16_union", TORCH_BOX(&sparse_mla_bf16_union));
  library.impl("topk_select", TORCH_BOX(&topk_select));
}

STABLE_TORCH_LIBRARY_IMPL(vllm_dsv32, CompositeExplicitAutograd, library) {
  library.impl("sparse_mla_fp8_concurrency", TORCH_BOX(&sparse_mla_fp8_concurrency));
  library.impl("topk_select_concurrency", TORCH_BOX(&topk_select_concurrency));
}

}  // namespace dsv32
