// The ring of stages, as a warpgroup that sums goes round it: once it has done with a tile, it copies another one
// there, three tiles on.
#pragma once

#include "sparse_mla_bf16_copy.cuh"

namespace dsv32::wide::bf16 {

struct Ring {
  Shared& shared;
  Source source;
  Turn<kStages> turn;
  int half, warp, lane;
  const uint8_t* row = nullptr;  // of this lane, of the tile that is being copied
  int untold = -1;               // the stage copied to last, where threads tell: see Arrival

  // Fills all stages.
  __device__ __forceinline__ Ring(Shared& memory, const SparseMlaArguments& p, int num_splits, int which_half,
                                  int which_warp, int which_lane)
      : shared(memory),
        source(p, num_splits, which_warp, which_lane),
        half(which_half),
        warp(which_warp),
        lane(which_lane) {
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) {
      turn.stage = stage;
      copy_first();
      copy_rest();
    }
    turn.stage = 0;
  }

  // For weights, or until queries were taken.
  __device__ __forceinline__ void wait() const { mbarrier_wait(&shared.weights_full[turn.stage], turn.parity); }

  // The first part, once this warp has done with it.
  __device__ __forceinline__ void replace_first() {
    named_barrier(kValueBarrier + half, kWarpgroup);
    copy_first();
  }

  // What remains, and goes on. What is rotated has to wait for the other warpgroup too, as weights are in its place.
  __device__ __forceinline__ void replace_rest() {
    named_barrier(kValueBarrier + half, kWarpgroup);
    if (half == kLeft) {
      arrive_for_warp(lane, &shared.weights_free[turn.stage]);
    } else {
      mbarrier_wait(&shared.weights_free[turn.stage], turn.parity);
    }
    copy_rest();
    turn.next();
  }

  __device__ __forceinline__ void copy_first() {
    if (source.has_tile()) {
      row = source.row();
      copy_latents(0);
    }
  }

  __device__ __forceinline__ void copy_rest() {
    if (!source.has_tile()) {
      tell_last();
      return;
    }
    static_assert(kParts == 2);
    copy_latents(1);
    if (half == kRight) {
      copy_rope(0);
      copy_rope(1);
    }
    tell();
    source.next(half, lane);
  }

  // Of this half of the columns.
  __device__ __forceinline__ void copy_latents(int part) const {
    const int first = half * kPanelsOfHalf;
    copy_panels<kPanelsOfHalf>(shared_address(shared.rows[turn.stage][first]), first * kPanelColumns * 2, row, source.p,
                               part, warp, lane);
  }
  __device__ __forceinline__ void copy_rope(int part) const {
    copy_panels<1>(shared_address(shared.rows[turn.stage][kRopePanel]), kKvLoraRank * 2, row, source.p, part, warp,
                   lane);
  }

  __device__ __forceinline__ void tell() {
    uint64_t* full = &shared.rows_full[turn.stage];
    if (kArrival == Arrival::kCopies) {
      mbarrier_arrive_after_chunks(full);
    } else if (kArrival == Arrival::kCopiesAndWarps) {
      mbarrier_expect_chunks(full);
      arrive_for_warp(lane, full);
    } else {
      commit_chunks();
      tell_untold<1>();
      untold = turn.stage;
    }
  }
  __device__ __forceinline__ void tell_last() {
    if (kArrival == Arrival::kThreads) {
      tell_untold<0>();
      untold = -1;
    }
  }
  template <int kGroupsLeft>
  __device__ __forceinline__ void tell_untold() const {
    if (untold >= 0) {
      wait_for_chunks<kGroupsLeft>();
      fence_async_proxy();
      arrive_for_warp(lane, &shared.rows_full[untold]);
    }
  }
};

}  // namespace dsv32::wide::bf16
