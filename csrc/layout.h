// The latent cache in the fp8_ds_mla format, as vllm_dsv32/layout.py has it; a test compares the two.
//
// One row a token, 656 bytes: 512 e4m3 | 4 float32 scales, one per 128 values | 64 bfloat16, rotated.
#pragma once

namespace dsv32 {

constexpr int kKvLoraRank = 512;
constexpr int kRopeDim = 64;
constexpr int kLatentGroupSize = 128;
constexpr int kLatentFp8Nbytes = 656;

constexpr int kNumGroups = kKvLoraRank / kLatentGroupSize;
constexpr int kLatentDim = kKvLoraRank + kRopeDim;
constexpr int kScalesOffset = kKvLoraRank;
constexpr int kRopeOffset = kScalesOffset + kNumGroups * 4;

static_assert(kLatentFp8Nbytes == kRopeOffset + kRopeDim * 2);
// What makes eight rows at the same column conflict-free for ldmatrix, with no swizzle and no padding.
static_assert(kLatentFp8Nbytes % 16 == 0 && kLatentFp8Nbytes / 16 % 2 == 1);

}  // namespace dsv32
