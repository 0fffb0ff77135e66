// Both caches, as vllm_dsv32/layout.py has them; a test compares the two.
//
// Latents in the fp8_ds_mla format, one row a token, 656 bytes: 512 e4m3 | 4 float32 scales, one per 128 values |
// 64 bfloat16, rotated. In bfloat16, 1152 bytes: 512 | 64, rotated.
// Index keys, block after block: block_size rows of 128 e4m3 | block_size float32 scales.
#pragma once

namespace dsv32 {

constexpr int kKvLoraRank = 512;
constexpr int kRopeDim = 64;
constexpr int kLatentGroupSize = 128;
constexpr int kLatentFp8Nbytes = 656;
constexpr int kIndexHeadDim = 128;
constexpr int kIndexKeyNbytes = 132;

constexpr int kNumGroups = kKvLoraRank / kLatentGroupSize;
constexpr int kLatentDim = kKvLoraRank + kRopeDim;
constexpr int kLatentBf16Nbytes = kLatentDim * 2;
constexpr int kScalesOffset = kKvLoraRank;
constexpr int kRopeOffset = kScalesOffset + kNumGroups * 4;

static_assert(kLatentFp8Nbytes == kRopeOffset + kRopeDim * 2);
static_assert(kIndexKeyNbytes == kIndexHeadDim + 4);
// What makes eight rows at the same column conflict-free for ldmatrix, with no swizzle and no padding.
static_assert(kLatentFp8Nbytes % 16 == 0 && kLatentFp8Nbytes / 16 % 2 == 1);

}  // namespace dsv32
