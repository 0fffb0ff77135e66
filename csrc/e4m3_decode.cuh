// e4m3 to bfloat16 in seven integer operations for four values, as the kernel for many heads has it.
//
// Sign and magnitude are moved to where bfloat16 has them, which gives the value times 2^-120, exactly, and the
// products are scaled back. Subnormal codes stay subnormal; tensor cores multiply those exactly (Fasi et al., 2021,
// doi:10.7717/peerj-cs.330). Every code gives a finite value: codes of NaN give 480, and rows that were quantised
// from NaN are NaN by their scale.
#pragma once

#include <cstdint>

namespace dsv32::wide {

// Half of the 2^120 that decoded values lack, on either side of a product: neither leaves the range of float32.
constexpr float kTwoPow60 = 1152921504606846976.0f;

// Of bytes 0 to 3, bytes 0 and 2.
__device__ __forceinline__ uint32_t decode_even(uint32_t bytes) {
  return ((bytes << 4) & 0x07f007f0u) | ((bytes << 8) & 0x80008000u);
}

// Of bytes 0 to 3, bytes 1 and 3.
__device__ __forceinline__ uint32_t decode_odd(uint32_t bytes) {
  return ((bytes >> 4) & 0x07f007f0u) | (bytes & 0x80008000u);
}

}  // namespace dsv32::wide
