// Rows of an fp8_ds_mla cache in bfloat16, by pages, on SM 90.
//
// Attention over unions multiplies every row for 64 rows of queries, by instructions that take bfloat16 from shared
// memory. A row is in the unions of most groups of a prefill, so it is decoded once for all of them.
//
// A warp has a row: 256 latents by all lanes, then the other 256, then what is rotated.
#include <cuda_runtime.h>

#include "bfloat16_pairs.cuh"
#include "latent_pages_sm90.h"
#include "launch.cuh"
#include "layout.h"
#include "ptx.cuh"
#include "roles.cuh"
#include "slot_union_sm90.h"

namespace dsv32 {
namespace latent_pages {
namespace {

// ---- what is tuned ----------------------------------------------------------------------------------------------

constexpr int kThreads = 512;
constexpr int kBlocksAtOnce = 2;  // of a multiprocessor
constexpr int kRowsAtOnce = 4;    // of a warp, whose loads are on their way together

// -----------------------------------------------------------------------------------------------------------------

constexpr int kWarps = kThreads / 32;
constexpr int kLatentsOfLane = 8;  // of each part
constexpr int kParts = kKvLoraRank / (32 * kLatentsOfLane);
constexpr int kRopeLanes = kRopeDim / kLatentsOfLane;

// What a lane has of a row.
struct Piece {
  uint2 latents[kParts];
  float scales[kParts];
  uint4 rope;
};

__device__ __forceinline__ void load(Piece& piece, const uint8_t* row, int lane) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int first = (part * 32 + lane) * kLatentsOfLane;
    piece.latents[part] = *reinterpret_cast<const uint2*>(row + first);
    piece.scales[part] = reinterpret_cast<const float*>(row + kScalesOffset)[first / kLatentGroupSize];
  }
  piece.rope = load_quad_if(lane < kRopeLanes, row + kRopeOffset + lane % kRopeLanes * 16);
}

__device__ __forceinline__ uint32_t scaled(uint32_t float16_pair, float scale) {
  const float2 x = floats_of_float16(float16_pair);
  return pack_bfloat16(x.x * scale, x.y * scale);
}

__device__ __forceinline__ void store(const Piece& piece, uint16_t* row, int lane) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const uint2 bytes = piece.latents[part];
    const float scale = piece.scales[part];
    reinterpret_cast<uint4*>(row)[part * 32 + lane] =
        make_uint4(scaled(float16_of_low_bytes(bytes.x), scale), scaled(float16_of_high_bytes(bytes.x), scale),
                   scaled(float16_of_low_bytes(bytes.y), scale), scaled(float16_of_high_bytes(bytes.y), scale));
  }
  if (lane < kRopeLanes) {
    reinterpret_cast<uint4*>(row + kKvLoraRank)[lane] = piece.rope;
  }
}

__device__ __forceinline__ void decode_rows(const LatentPagesArguments& p, int num_pages, int first, int stride,
                                            int lane) {
  const PagePlaces& places = p.places;
  const int num_rows = num_pages * places.block_size;
  for (int begin = first; begin < num_rows; begin += stride * kRowsAtOnce) {
    Piece pieces[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int row = min(begin + i * stride, num_rows - 1);  // one more than once, rather than a branch
      const int place = row / places.block_size;
      load(pieces[i],
           p.cache + places.page_of_place[place] * p.page_nbytes + row % places.block_size * kLatentFp8Nbytes, lane);
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const int row = begin + i * stride;
      if (row < num_rows) {
        store(pieces[i], p.latents + static_cast<int64_t>(row) * kLatentDim, lane);
      }
    }
  }
}

__device__ __forceinline__ void leave_all(const LatentPagesArguments& p, int first, int stride) {
  for (int token = first; token < p.num_groups * kUnionTokens; token += stride) {
    p.num_left[token] = max(0, p.num_valid[token]);
    p.num_union[token / kUnionTokens] = kNotUnited;
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) latent_pages_kernel(const LatentPagesArguments p) {
  let_next_kernel_start();
  wait_for_last_kernel();
  const int num_pages = *p.places.count;
  if (num_pages <= p.places.capacity) {
    decode_rows(p, num_pages, blockIdx.x * kWarps + warp_of_thread(), gridDim.x * kWarps, threadIdx.x % 32);
  } else {
    leave_all(p, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
  }
}

}  // namespace
}  // namespace latent_pages

const char* launch_latent_pages(const LatentPagesArguments& arguments, void* stream) {
  using namespace latent_pages;
  const int num_blocks = num_multiprocessors() * kBlocksAtOnce;
  return launch_clusters(latent_pages_kernel, ClusterShape{1, kThreads, 0}, num_blocks, stream, arguments);
}

}  // namespace dsv32
