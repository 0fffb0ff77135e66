// Operators of slot_union_sm90.h, latent_pages_sm90.h and, over unions, sparse_mla_sm90.h.
#include "latent_pages_sm90.h"
#include "latent_tensors.h"
#include "slot_union_sm90.h"
#include "sparse_mla_sm90.h"

namespace dsv32 {
namespace {

constexpr int64_t kUnionHeads = kUnionTokens * 16;
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
  require(topk_slot.dim() == 2 && topk_slot.size(0) % kUnionTokens == 0, op,
          ": topk_slot: expected two dimensions and tokens by four, got ", describe(topk_slot));
  const int64_t num_groups = topk_slot.size(0) / kUnionTokens, num_slots = topk_slot.size(1);
  require(num_slots <= kMaxUnionSlots, op, ": topk_slot: expected at most ", kMaxUnionSlots, " a token, got ",
          num_slots);
  require(num_groups <= kMaxUnionGroups, op, ": topk_slot: too large");
  require_tensor(op, topk_slot, "topk_slot", ScalarType::Int, {num_groups * kUnionTokens, num_slots});
  require_tensor(op, num_valid, "num_valid", ScalarType::Int, {num_groups * kUnionTokens});
  require_tensor(op, union_slot, "union_slot", ScalarType::Int, {num_groups, num_slots * kUnionTokens});
  require_tensor(op, num_union, "num_union", ScalarType::Int, {num_groups});
  require_tensor(op, seen, "seen", ScalarType::Long,
                 {num_groups, num_union_tiles(num_slots * kUnionTokens), kUnionTokens});
  require_tensor(op, num_left, "num_left", ScalarType::Int, {num_groups * kUnionTokens});
  const PagePlaces of_pages = page_places(op, places, pages, block_size);
  if (num_groups == 0) {
    return;
  }
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
  launch_for(op, topk_slot, [&](void* stream) { return launch_slot_union(arguments, stream); });
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
  require_tensor(op, num_valid, "num_valid", ScalarType::Int, {num_groups * kUnionTokens});
  require_tensor(op, num_left, "num_left", ScalarType::Int, {num_groups * kUnionTokens});
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
  launch_for(op, cache, [&](void* stream) { return launch_latent_pages(arguments, stream); });
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
  require(union_slot.size(1) <= kMaxUnionSlots * kUnionTokens, op, ": union_slot: expected at most ",
          kMaxUnionSlots * kUnionTokens, " a group, got ", union_slot.size(1));
  require_tensor(op, seen, "seen", ScalarType::Long, {num_groups, num_union_tiles(union_slot.size(1)), kUnionTokens});
  require_tensor(op, out, "out", ScalarType::BFloat16, {num_groups, kUnionHeads, kKvLoraRank});
  require_tensor(op, lse, "lse", ScalarType::Float, {num_groups, kUnionHeads});
  if (num_groups == 0) {
    return;
  }
  launch_for(op, q, [&](void* stream) { return launch_sparse_mla_bf16_union(arguments, seen.data_ptr(), stream); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vllm_dsv32, library) {
  library.def(
      "slot_union(Tensor topk_slot, Tensor num_valid, float max_share, int block_size, Tensor(a!) union_slot, "
      "Tensor(b!) num_union, Tensor(c!) seen, Tensor(d!) num_left, Tensor(e!) places, Tensor(f!) pages) -> ()");
  library.def(
      "latent_pages(Tensor cache, Tensor num_valid, Tensor places, Tensor pages, Tensor(a!) latents, "
      "Tensor(b!) num_union, Tensor(c!) num_left) -> ()");
  library.def(
      "sparse_mla_bf16_union(Tensor q, Tensor cache, Tensor union_slot, Tensor num_union, Tensor seen, "
      "float scale_log2, Tensor(a!) out, Tensor(b!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vllm_dsv32, CUDA, library) {
  library.impl("slot_union", TORCH_BOX(&slot_union));
  library.impl("latent_pages", TORCH_BOX(&latent_pages));
  library.impl("sparse_mla_bf16_union", TORCH_BOX(&sparse_mla_bf16_union));
}

}  // namespace dsv32
