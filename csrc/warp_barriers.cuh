// Barriers in shared memory at which warps arrive.
//
// One lane arrives for its warp, after __syncwarp: order is transitive, so who waits sees what the other lanes have
// written too, and may write what they have read. compute-sanitizer's racecheck credits order to arriving lanes alone,
// and reports what the others access. It is run on a build in which all of them arrive: DSV32_ALL_LANES_ARRIVE.
#pragma once

#include "ptx.cuh"

namespace dsv32 {

#ifdef DSV32_ALL_LANES_ARRIVE
constexpr int kArrivalsOfWarp = 32;
#else
constexpr int kArrivalsOfWarp = 1;
#endif

// For phases that end when so many warps have arrived.
__device__ __forceinline__ void init_warp_barrier(uint64_t* barrier, int num_warps) {
  mbarrier_init(barrier, num_warps * kArrivalsOfWarp);
}

// At one barrier or more. All lanes of a warp call it.
template <class... Barriers>
__device__ __forceinline__ void arrive_for_warp(int lane, Barriers*... barriers) {
  __syncwarp();
  if (lane < kArrivalsOfWarp) {
    (mbarrier_arrive(barriers), ...);
  }
}

// At a barrier of every block of the cluster.
template <int kBlocks>
__device__ __forceinline__ void arrive_for_warp_in_cluster(int lane, uint64_t* barrier) {
  __syncwarp();
  if (lane < kArrivalsOfWarp) {
#pragma unroll
    for (int rank = 0; rank < kBlocks; ++rank) {
      mbarrier_arrive_in_cluster(address_in_block(shared_address(barrier), rank));
    }
  }
}

// And has the phase wait for so many bytes besides, of the whole warp.
__device__ __forceinline__ void arrive_for_warp_expect(int lane, uint64_t* barrier, int nbytes) {
  __syncwarp();
  if (lane == 0) {
    mbarrier_arrive_expect(barrier, nbytes);
  } else if (kArrivalsOfWarp > 1) {
    mbarrier_arrive(barrier);
  }
}

}  // namespace dsv32
