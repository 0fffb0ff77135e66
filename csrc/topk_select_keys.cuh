// Logits as integers of the same order, and ranges of them divided into bins.
#pragma once

#include <cstdint>

namespace dsv32::topk {

constexpr uint32_t kLowest = 0x007fffff;  // of minus infinity, and of NaN
constexpr uint32_t kHighest = 0xff800000;
constexpr uint32_t kBelowAll = 0;
constexpr float kLowestFinite = -3.402823466e+38f;

__device__ __forceinline__ uint32_t key_of(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // which makes both zeros one
  return logit != logit ? kLowest : bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float logit_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Logits from low to high, as keys, in kNum bins, the highest first. Bins of equal differences of logits part what is
// dense, in few instructions; bins of equal numbers of keys end any search in a few rounds, whatever the logits.
template <int kNum>
struct Bins {
  uint32_t low;
  uint32_t high;
  int shift;
  bool even;  // in differences of logits
  float top;
  float scale;

  __device__ __forceinline__ static Bins of_keys(uint32_t low, uint32_t high) {
    constexpr int kLog2 = 31 - __builtin_clz(kNum);
    static_assert(kNum == 1 << kLog2);
    return {low, high, max(0, 32 - kLog2 - __clz(high - low)), false, 0.0f, 0.0f};
  }

  // Of differences if the range allows it.
  __device__ __forceinline__ static Bins of_logits(uint32_t low, uint32_t high) {
    constexpr float kAlmostAll = kNum * (1.0f - 1.0f / 65536);  // rounding leads to no bin past the last
    Bins bins = of_keys(low, high);
    bins.top = logit_of(high);
    const float range = bins.top - logit_of(low);
    bins.scale = kAlmostAll / range;
    bins.even = range < INFINITY && bins.scale < INFINITY;
    return bins;
  }

  // kNum for NaN. Of even bins, for logits of the range.
  __device__ __forceinline__ int even_bin(float logit) const {
    return static_cast<int>(fminf((top - logit) * scale, static_cast<float>(kNum)));
  }

  // Of bins of keys; -1 above the range, kNum below.
  __device__ __forceinline__ int bin(uint32_t key) const {
    return key > high ? -1 : key < low ? kNum : static_cast<int>((high - key) >> shift);
  }
  __device__ __forceinline__ uint32_t highest_of(int bin) const { return high - (static_cast<uint32_t>(bin) << shift); }
  __device__ __forceinline__ uint32_t lowest_of(int bin) const {
    const uint32_t highest = highest_of(bin);
    return (highest - low) >> shift ? highest - ((1u << shift) - 1) : low;
  }

  // About where a bin ends.
  __device__ __forceinline__ float bottom_of(int bin) const {
    return even ? fmaxf(top - (bin + 1) / scale, logit_of(low)) : logit_of(lowest_of(bin));
  }
};

}  // namespace dsv32::topk
