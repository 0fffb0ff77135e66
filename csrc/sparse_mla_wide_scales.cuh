// Scales of rows, which are not in what rows are decoded to: products of scores are multiplied by them, and weights.
//
// A key has four. They are held relative to a power of two, which takes the greatest to between 1 and 2; weights that
// are handed over are multiplied by that power. Their products with the scales become float16: grown() says of range.
#pragma once

#include "sparse_mla_float16.cuh"
#include "sparse_mla_wide_block.cuh"

namespace dsv32::wide {

// The power of two of a key, and its logarithm, as two numbers of bfloat16.
__device__ __forceinline__ uint32_t pack_power(int exponent) {
  return pack_bfloat16(static_cast<float>(exponent), power_of_two(exponent));
}
__device__ __forceinline__ float log2_of_power(uint32_t power) { return bfloat16_low(power); }
__device__ __forceinline__ float value_of_power(uint32_t power) { return bfloat16_high(power); }
__device__ __forceinline__ float reciprocal_of_power(uint32_t power) {
  return __uint_as_float(0x7f000000u - (power & 0xffff0000u));
}

// Writes those of a half. Lanes r and r + 16 of a warp have the same key, and one of the two groups each.
template <int kHalf>
__device__ __forceinline__ void store_scales(Shared& shared, int stage, const uint4& bits, int key, bool is_second) {
  const float x = __uint_as_float(bits.x), y = __uint_as_float(bits.y);
  const float z = __uint_as_float(bits.z), w = __uint_as_float(bits.w);
  const float greatest = fmaxf(fmaxf(kLeastScale, fmaxf(x, y)), fmaxf(z, w));  // of NaN alone: the least
  const int exponent = min(exponent_of(greatest), 126);
  const float own = kHalf == kRight ? (is_second ? w : z) : (is_second ? y : x);
  shared.scales[stage][kHalf * kGroupsOfHalf + is_second][key] = own * power_of_two(-exponent);
  if (kHalf == kRight && !is_second) {
    shared.powers[stage][key] = pack_power(exponent);
  }
}

}  // namespace dsv32::wide
