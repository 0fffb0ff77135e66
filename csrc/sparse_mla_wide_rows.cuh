// The warpgroup that reads rows of the cache, decodes them and writes them to shared memory.
//
// Eight lanes read 128 bytes of a row, a group with one scale, and write the two chunks that each has decoded to two
// panels; scales are kept apart. Half of the columns of a tile at a time: they are read before the stage is free for
// them. Whole rows are brought to the GPU's second-level cache a tile ahead.
#pragma once

#include "sparse_mla_wide_block.cuh"
#include "sparse_mla_wide_scales.cuh"
#include "wgmma.cuh"

namespace dsv32::wide {

constexpr int kRowsOfWarp = kTileKeys / 4;
constexpr int kRowsOfLane = 4;  // every fourth one of the warp

// What a lane has read of a half of its rows; zeros of rows that do not exist.
template <int kHalf>
struct Bytes {
  uint4 latents[kRowsOfLane][kGroupsOfHalf];
  uint4 rope[kRowsOfLane];  // of the right half
};

// Lane r has row r of the warp; null if it does not exist.
template <int kHalf>
__device__ __forceinline__ void load_half(Bytes<kHalf>& bytes, const uint8_t* row, int lane) {
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    const auto* source = reinterpret_cast<const uint8_t*>(
        __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(row), 4 * i + lane / 8));
    const bool exists = source != nullptr;
#pragma unroll
    for (int group = 0; group < kGroupsOfHalf; ++group) {
      const int column = (kHalf * kGroupsOfHalf + group) * kLatentGroupSize;
      bytes.latents[i][group] = load_quad_if(exists, source + column + lane % 8 * 16);
    }
    if (kHalf == kRight) {
      bytes.rope[i] = load_quad_if(exists, source + kRopeOffset + lane % 8 * 16);
    }
  }
}

// To float16, which holds every value of e4m3.
__device__ __forceinline__ void store_decoded(uint32_t chunk, const uint4& bytes) {
  store_chunk(chunk, make_uint4(float16_of_low_bytes(bytes.x), float16_of_low_bytes(bytes.y),
                                float16_of_low_bytes(bytes.z), float16_of_low_bytes(bytes.w)));
  store_chunk(chunk + kPanelNbytes, make_uint4(float16_of_high_bytes(bytes.x), float16_of_high_bytes(bytes.y),
                                               float16_of_high_bytes(bytes.z), float16_of_high_bytes(bytes.w)));
}

template <int kHalf>
__device__ __forceinline__ void decode_half(const Turn<kStages>& turn, Shared& shared, const uint8_t* row, int warp,
                                            int lane) {
  Bytes<kHalf> bytes;
  load_half(bytes, row, lane);
  const uint4 scales = load_quad_if(row != nullptr, row + kScalesOffset);
  mbarrier_wait(&shared.rows_free[turn.stage][kHalf], turn.parity ^ 1);
  const uint32_t panels = shared_address(shared.rows[turn.stage]);
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    // Eight rows on, chunks are in the same order.
    const int first = warp * kRowsOfWarp + i % 2 * 4 + lane / 8;
    const uint32_t chunk = panels + chunk_offset(first, lane % 8) + i / 2 * 8 * 128;
#pragma unroll
    for (int group = 0; group < kGroupsOfHalf; ++group) {
      const int panel = kHalf * kPanelsOfHalf + 2 * group;
      store_decoded(chunk + panel * kPanelNbytes, bytes.latents[i][group]);
    }
    if (kHalf == kRight) {
      store_chunk(chunk + kRopePanel * kPanelNbytes, bytes.rope[i]);
    }
  }
  store_scales<kHalf>(shared, turn.stage, scales, warp * kRowsOfWarp + lane % kRowsOfWarp, lane >= kRowsOfWarp);
  fence_async_proxy();
  arrive_for_warp(lane, &shared.rows_full[turn.stage][kHalf]);
}

// Two lanes have the same row. A bulk prefetch would take one instruction, but of one lane at a time.
__device__ __forceinline__ void prefetch_row(const uint8_t* row, int lane) {
  constexpr int kFetched = 64;  // bytes, half of a line: in case that no more is fetched
#pragma unroll
  for (int offset = 0; offset < kLatentFp8Nbytes; offset += 2 * kFetched) {
    const int own = offset + lane / kRowsOfWarp * kFetched;
    if (own < kLatentFp8Nbytes) {
      prefetch(row + own);
    }
  }
}

// Slots past the last key are not read; their rows are zeros, since what the cache has there may be NaN.
__device__ __forceinline__ void decode_tiles(Turn<kStages>& turn, Shared& shared, const SparseMlaArguments& p,
                                             const Work& work, int warp, int lane) {
  const int first = warp * kRowsOfWarp + lane % kRowsOfWarp;
  const auto slot_of_tile = [&](int tile) {
    const int key = tile * kTileKeys + first;
    return load_if(key < work.num_keys, work.slots + key);
  };
  const auto row_of_tile = [&](int tile, int slot) {
    const bool exists = tile * kTileKeys + first < work.num_keys;
    const uint8_t* row = exists ? row_of_slot(p, slot) : nullptr;
    if (exists) {
      prefetch_row(row, lane);
    }
    return row;
  };
  const int first_slot = slot_of_tile(0);
  int slot = slot_of_tile(1);
  const uint8_t* row = row_of_tile(0, first_slot);
  for (int tile = 0; tile < work.num_tiles; ++tile, turn.next()) {
    decode_half<kRight>(turn, shared, row, warp, lane);
    const uint8_t* next_row = row_of_tile(tile + 1, slot);
    slot = slot_of_tile(tile + 2);
    decode_half<kLeft>(turn, shared, row, warp, lane);
    row = next_row;
  }
}

}  // namespace dsv32::wide
