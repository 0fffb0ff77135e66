// Scales of rows. Those of a key are held relative to a power of two of its own, which takes the greatest to between 16
// and 32: latents of a row, relative to it, are less than 448 x 32 and become float16. Scores are multiplied by it, and
// weights that are handed over: see hand_over_weights.
//
// A scale becomes float16 too, so a latent is rounded twice, each time to 11 bits. A group whose scales are less than
// 2^-18 of the key's greatest loses bits gradually: its scales below 2^-14, its latents below that.
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

// Of a key: its power, and its four scales relative to it, two in a word.
struct KeyScales {
  uint32_t power;
  uint2 relative;

  __device__ __forceinline__ explicit KeyScales(const uint4& bits) {
    constexpr int kLog2OfGreatest = 4;
    const float x = __uint_as_float(bits.x), y = __uint_as_float(bits.y);
    const float z = __uint_as_float(bits.z), w = __uint_as_float(bits.w);
    const float greatest = fmaxf(fmaxf(kLeastScale, fmaxf(x, y)), fmaxf(z, w));  // of NaN alone: the least
    const int exponent = min(exponent_of(greatest), 127) - kLog2OfGreatest;
    const float back = power_of_two(-exponent);
    power = pack_power(exponent);
    relative = make_uint2(pack_float16(x * back, y * back), pack_float16(z * back, w * back));
  }
};

// Of the first and the second group of a word, as often as a product of pairs takes it.
__device__ __forceinline__ uint32_t twice_low(uint32_t pair) { return __byte_perm(pair, 0, 0x1010); }
__device__ __forceinline__ uint32_t twice_high(uint32_t pair) { return __byte_perm(pair, 0, 0x3232); }

}  // namespace dsv32::wide
