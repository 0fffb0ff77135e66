// Warps of a block that have different roles: which one a thread is in, and where in a ring of stages a role is.
#pragma once

#include <cstdint>

namespace dsv32 {

// The same in all lanes, which the compiler cannot know of threadIdx. Each role asks for itself: what all of them had
// would take a register of each.
__device__ __forceinline__ int warp_of_thread() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

template <int kNumStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kNumStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace dsv32
