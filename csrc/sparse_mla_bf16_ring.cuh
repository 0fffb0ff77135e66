// The ring of stages, as a warpgroup that sums goes round it: once it has done with a tile, it copies another one there,
// three tiles on.
#pragma once

#include "sparse_mla_bf16_copy.cuh"

namespace dsv32::wide::bf16 {

class Ring {
 public:
  // Fills all stages.
  __device__ __forceinline__ Ring(Shared& shared, const SparseMlaArguments& p, int num_splits, int half, int warp,
                                  int lane)
      : source_(p, num_splits, warp, lane), half_(half), warp_(warp), lane_(lane) {
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) {
      turn_.stage = stage;
      copy_first(shared, p, num_splits);
      copy_rest(shared, p, num_splits);
    }
    turn_.stage = 0;
  }

  __device__ __forceinline__ int stage() const { return turn_.stage; }

  // For weights, or until queries were taken.
  __device__ __forceinline__ void wait(Shared& shared) const {
    mbarrier_wait(&shared.weights_full[turn_.stage], turn_.parity);
  }

  // The first part, once this warp has done with it.
  __device__ __forceinline__ void replace_first(Shared& shared, const SparseMlaArguments& p, int num_splits) {
    named_barrier(kValueBarrier + half_, kWarpgroup);
    copy_first(shared, p, num_splits);
  }

  // What remains, and goes on. What is rotated has to wait for the other warpgroup too, as weights are in its place.
  __device__ __forceinline__ void replace_rest(Shared& shared, const SparseMlaArguments& p, int num_splits) {
    named_barrier(kValueBarrier + half_, kWarpgroup);
    if (half_ == kLeft) {
      arrive_for_warp(lane_, &shared.weights_free[turn_.stage]);
    } else {
      mbarrier_wait(&shared.weights_free[turn_.stage], turn_.parity);
    }
    copy_rest(shared, p, num_splits);
    turn_.next();
  }

 private:
  __device__ __forceinline__ void copy_part(Shared& shared, const SparseMlaArguments& p, int part) const {
    const int first = half_ * kPanelsOfHalf;
    copy_panels<kPanelsOfHalf>(shared_address(shared.rows[turn_.stage][first]), first * kPanelColumns * 2, row_, p,
                               part, warp_, lane_);
  }

  __device__ __forceinline__ void copy_first(Shared& shared, const SparseMlaArguments& p, int num_splits) {
    if (source_.has_tile(p, num_splits)) {
      row_ = source_.row(p, num_splits);
      copy_part(shared, p, 0);
    }
  }

  __device__ __forceinline__ void copy_rest(Shared& shared, const SparseMlaArguments& p, int num_splits) {
    if (!source_.has_tile(p, num_splits)) {
      tell_last(shared);
      return;
    }
    static_assert(kParts == 2);
    copy_part(shared, p, 1);
    if (half_ == kRight) {
      const uint32_t panel = shared_address(shared.rows[turn_.stage][kRopePanel]);
      copy_panels<1>(panel, kKvLoraRank * 2, row_, p, 0, warp_, lane_);
      copy_panels<1>(panel, kKvLoraRank * 2, row_, p, 1, warp_, lane_);
    }
    tell(shared);
    source_.next(p, num_splits, half_, lane_);
  }

  __device__ __forceinline__ void tell(Shared& shared) {
    uint64_t* full = &shared.rows_full[turn_.stage];
    if (kArrival == Arrival::kCopies) {
      mbarrier_arrive_after_chunks(full);
    } else if (kArrival == Arrival::kCopiesAndWarps) {
      mbarrier_expect_chunks(full);
      arrive_for_warp(lane_, full);
    } else {
      commit_chunks();
      tell_untold<1>(shared);
      untold_ = turn_.stage;
    }
  }
  __device__ __forceinline__ void tell_last(Shared& shared) {
    if (kArrival == Arrival::kThreads) {
      tell_untold<0>(shared);
      untold_ = -1;
    }
  }
  template <int kGroupsLeft>
  __device__ __forceinline__ void tell_untold(Shared& shared) {
    if (untold_ >= 0) {
      wait_for_chunks<kGroupsLeft>();
      fence_async_proxy();
      arrive_for_warp(lane_, &shared.rows_full[untold_]);
    }
  }

  Source source_;
  Turn<kStages> turn_;
  int half_, warp_, lane_;
  const uint8_t* row_ = nullptr;  // of this lane, of the tile that is being copied
  int untold_ = -1;               // the stage copied to last
};

}  // namespace dsv32::wide::bf16
