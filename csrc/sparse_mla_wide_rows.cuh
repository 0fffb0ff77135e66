// The warpgroup that reads rows of the cache, decodes them and writes them to shared memory.
//
// Eight lanes read 128 bytes of a row, a group with one scale, and write the two chunks that each has decoded to two
// panels. Rows are handed on by halves of their columns. What a lane has decoded leaves its registers to rows that are
// read next, so loads are on their way all the time.
//
// Of two blocks each decodes half of the keys of a tile, and writes what it has decoded to both.
#pragma once

#include "sparse_mla_wide_block.cuh"
#include "sparse_mla_wide_scales.cuh"
#include "wgmma.cuh"

namespace dsv32::wide {

template <int kBlocks>
constexpr int kRowsOfWarp = kTileKeys / kBlocks / 4;
template <int kBlocks>
constexpr int kRowsOfLane = kRowsOfWarp<kBlocks> / 4;  // every fourth one of the warp

// What a lane has read of a half of its rows; zeros of rows that do not exist.
template <int kBlocks>
struct Bytes {
  uint4 latents[kRowsOfLane<kBlocks>][kGroupsOfHalf];
  uint4 rope[kRowsOfLane<kBlocks>];  // of the right half
};

// Lane r has row r of the warp; null if it does not exist.
template <int kHalf, int kBlocks>
__device__ __forceinline__ void load_row(Bytes<kBlocks>& bytes, int i, const uint8_t* row, int lane) {
  const auto* source = reinterpret_cast<const uint8_t*>(
      __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(row), 4 * i + lane / 8));
  const bool exists = source != nullptr;
  source += lane % 8 * 16;
#pragma unroll
  for (int group = 0; group < kGroupsOfHalf; ++group) {
    bytes.latents[i][group] = load_quad_if(exists, source + (kHalf * kGroupsOfHalf + group) * kLatentGroupSize);
  }
  if (kHalf == kRight) {
    bytes.rope[i] = load_quad_if(exists, source + kRopeOffset);
  }
}

template <int kHalf, int kBlocks>
__device__ __forceinline__ void load_rows(Bytes<kBlocks>& bytes, const uint8_t* row, int lane) {
#pragma unroll
  for (int i = 0; i < kRowsOfLane<kBlocks>; ++i) {
    load_row<kHalf>(bytes, i, row, lane);
  }
}

// Where a warp writes rows: in its own block, and in the other one, whose barrier is told of every byte.
template <int kBlocks>
struct Target {
  uint32_t to_other;  // from an address of this block to that of the same in the other
  uint32_t barrier;   // of the other

  __device__ __forceinline__ void store(uint32_t address, const uint4& x) const {
    store_chunk(address, x);
    if (kBlocks == 2) {
      store_chunk_in_cluster(address + to_other, x, barrier);
    }
  }
  __device__ __forceinline__ void store(uint32_t address, uint32_t x) const {
    store_word(address, x);
    if (kBlocks == 2) {
      store_word_in_cluster(address + to_other, x, barrier);
    }
  }
};

// To float16, which holds every value of e4m3, times the scale.
template <int kBlocks>
__device__ __forceinline__ void store_decoded(const Target<kBlocks>& target, uint32_t chunk, const uint4& bytes,
                                              uint32_t scale) {
  const auto low = [=](uint32_t x) { return multiply_pairs(float16_of_low_bytes(x), scale); };
  const auto high = [=](uint32_t x) { return multiply_pairs(float16_of_high_bytes(x), scale); };
  target.store(chunk, make_uint4(low(bytes.x), low(bytes.y), low(bytes.z), low(bytes.w)));
  target.store(chunk + kPanelNbytes, make_uint4(high(bytes.x), high(bytes.y), high(bytes.z), high(bytes.w)));
}

// Decodes and hands on a half. Calls load_next(i) once row i of the lane has left its registers. Lane r has the scales
// of row r of the warp.
template <int kHalf, int kBlocks, class LoadNext>
__device__ __forceinline__ void decode_half(const Bytes<kBlocks>& bytes, const Turn<kStages>& turn, Shared& shared,
                                            const KeyScales& scales, int warp, int lane, LoadNext load_next) {
  constexpr int kRows = kRowsOfWarp<kBlocks>;
  uint64_t* full = &shared.rows_full[turn.stage][kHalf];
  Target<kBlocks> target;
  if (kBlocks == 2) {
    target.barrier = address_in_block(shared_address(full), rank_in_cluster<kBlocks>() ^ 1);
    target.to_other = target.barrier - shared_address(full);
  }
  const int first = (rank_in_cluster<kBlocks>() * 4 + warp) * kRows;
  const uint32_t panels = shared_address(shared.rows[turn.stage]);
  mbarrier_wait(&shared.rows_free[turn.stage][kHalf], turn.parity ^ 1);
#pragma unroll
  for (int i = 0; i < kRowsOfLane<kBlocks>; ++i) {
    // Eight rows on, chunks are in the same order.
    const uint32_t chunk = panels + chunk_offset(first + i % 2 * 4 + lane / 8, lane % 8) + i / 2 * 8 * 128;
    const uint32_t pair =
        __shfl_sync(0xffffffffu, kHalf == kLeft ? scales.relative.x : scales.relative.y, 4 * i + lane / 8);
#pragma unroll
    for (int group = 0; group < kGroupsOfHalf; ++group) {
      const int panel = kHalf * kPanelsOfHalf + 2 * group;
      store_decoded(target, chunk + panel * kPanelNbytes, bytes.latents[i][group],
                    group == 0 ? twice_low(pair) : twice_high(pair));
    }
    if (kHalf == kRight) {
      target.store(chunk + kRopePanel * kPanelNbytes, bytes.rope[i]);
    }
    load_next(i);
  }
  if (kHalf == kRight && lane < kRows) {
    target.store(shared_address(&shared.powers[turn.stage][first + lane]), scales.power);
  }
  fence_async_proxy();
  if (kBlocks == 2) {  // the other block's warp writes as many bytes here
    constexpr int kOfRow = kPanelsOfHalf * kPanelColumns * 2 + (kHalf == kRight ? kRopeDim * 2 + 4 : 0);
    arrive_for_warp_expect(lane, full, kRows * kOfRow);
  } else {
    arrive_for_warp(lane, full);
  }
}

// Slots past the last key are not read; their rows are zeros, since what the cache has there may be NaN.
template <int kBlocks>
__device__ __forceinline__ void decode_tiles(Turn<kStages>& turn, Shared& shared, const SparseMlaArguments& p,
                                             const Work& work, int warp, int lane) {
  constexpr int kRows = kRowsOfWarp<kBlocks>;
  const int first = (rank_in_cluster<kBlocks>() * 4 + warp) * kRows + lane % kRows;
  const auto slot_of_tile = [&](int tile) {
    const int key = tile * kTileKeys + first;
    return load_if(key < work.num_keys, work.slots + key);
  };
  const auto row_of_tile = [&](int tile, int slot) {
    const bool exists = tile * kTileKeys + first < work.num_keys;
    return exists ? row_of_slot(p, slot) : nullptr;
  };
  const auto scales_of = [](const uint8_t* row) { return load_quad_if(row != nullptr, row + kScalesOffset); };
  const int first_slot = slot_of_tile(0);
  int slot = slot_of_tile(1);
  const uint8_t* row = row_of_tile(0, first_slot);
  uint4 scale_bits = scales_of(row);
  Bytes<kBlocks> right, left;
  load_rows<kRight>(right, row, lane);
  if (kBlocks == 2) {  // has registers for a whole tile
    load_rows<kLeft>(left, row, lane);
  }
  for (int tile = 0; tile < work.num_tiles; ++tile, turn.next()) {
    const KeyScales scales(scale_bits);
    if constexpr (kBlocks == 2) {
      row = row_of_tile(tile + 1, slot);
      slot = slot_of_tile(tile + 2);
      scale_bits = scales_of(row);
      decode_half<kRight>(right, turn, shared, scales, warp, lane,
                          [&](int i) { load_row<kRight>(right, i, row, lane); });
      decode_half<kLeft>(left, turn, shared, scales, warp, lane, [&](int i) { load_row<kLeft>(left, i, row, lane); });
    } else {
      decode_half<kRight>(right, turn, shared, scales, warp, lane,
                          [&](int i) { load_row<kLeft>(left, i, row, lane); });
      row = row_of_tile(tile + 1, slot);
      slot = slot_of_tile(tile + 2);
      scale_bits = scales_of(row);
      decode_half<kLeft>(left, turn, shared, scales, warp, lane,
                         [&](int i) { load_row<kRight>(right, i, row, lane); });
    }
  }
}

}  // namespace dsv32::wide
