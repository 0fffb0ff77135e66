// Matrices in shared memory as products of a warpgroup read them: panels of 64 rows and 64 columns of 16-bit numbers, or
// 128 of fp8.
//
// A row of a panel is 128 bytes: eight chunks of 16, which lie in the order of chunk XOR (row % 8). So neither eight
// rows at one chunk nor eight chunks of one row conflict, and the tensor cores undo it. Panels start at multiples of
// 1024 bytes; the columns of a matrix go on in the next panel.
#pragma once

#include <cstdint>

namespace dsv32 {

constexpr int kPanelRows = 64;
constexpr int kPanelColumns = 64;
constexpr int kPanelNbytes = kPanelRows * kPanelColumns * 2;
constexpr int kPanelAlignment = 1024;

__device__ __forceinline__ uint32_t chunk_offset(int row, int chunk) { return row * 128 + (chunk ^ row % 8) * 16; }

// Bits of a descriptor: from 0 the address, from 16 and 32 two strides, all of them in units of 16 bytes; from 62 the
// order of chunks, 1 for the one above. One stride is from eight rows to the next eight. The other is from panel to
// panel, where a product takes more than one.
__device__ __forceinline__ uint64_t describe(uint32_t address, uint32_t panel_stride) {
  constexpr uint64_t kRowsStride = 8 * 128 / 16;
  return (address >> 4 & 0x3fff) | static_cast<uint64_t>(panel_stride) << 16 | kRowsStride << 32 | uint64_t{1} << 62;
}

// 32 bytes of all rows, whose number is the size of the product.
__device__ __forceinline__ uint64_t describe_columns(uint32_t panels) { return describe(panels, 1); }
__device__ __forceinline__ uint64_t at_column(uint64_t columns, int column) {
  return columns + (column / kPanelColumns * kPanelNbytes + column % kPanelColumns * 2) / 16;
}
// Within a panel.
__device__ __forceinline__ uint64_t at_byte(uint64_t columns, int byte) { return columns + byte / 16; }

// 16 columns of 64 rows alone, not in a panel: eight rows of either chunk are 128 bytes, one after the other.
__device__ __forceinline__ uint32_t step_chunk_offset(int row, int chunk) {
  return (row / 8 * 2 + chunk) * 128 + row % 8 * 16;
}
__device__ __forceinline__ uint64_t describe_step(uint32_t address) {
  constexpr uint64_t kChunkStride = 128 / 16, kRowsStride = 2 * 128 / 16;
  return (address >> 4 & 0x3fff) | kChunkStride << 16 | kRowsStride << 32;
}

// All columns of 16 rows.
__device__ __forceinline__ uint64_t describe_rows(uint32_t panels) { return describe(panels, kPanelNbytes / 16); }
__device__ __forceinline__ uint64_t at_row(uint64_t rows, int row) { return rows + row * 128 / 16; }

}  // namespace dsv32
