// The functions of csrc/tensor_map.cuh for the emulator, written from the manuals of CUDA, not from that file.
#pragma once

#include "ptx.cuh"

namespace dsv32 {

constexpr int kBoxRowNbytes = 128;

struct TensorMap {
  const uint8_t* rows;
  int64_t num_rows, num_pages, page_nbytes;
  int box_rows;
};

inline const char* map_pages(TensorMap* map, const void* rows, int64_t num_rows, int64_t num_pages,
                             int64_t page_nbytes, int box_rows) {
  if (reinterpret_cast<uintptr_t>(rows) % 16 || page_nbytes % 16 || box_rows > 256) {
    return "the tensor or its box is not what a map takes";
  }
  *map = {static_cast<const uint8_t*>(rows), num_rows, num_pages, page_nbytes, box_rows};
  return nullptr;
}

// Products see what copies have written without a fence, as both are of the async proxy.
inline void copy_box(void* panels, const TensorMap& map, int row, int page, uint64_t* barrier) {
  if (shared_address(panels) % 1024) {
    std::fprintf(stderr, "a box at an address that is not a multiple of 1024\n");
    std::abort();
  }
  auto& block = *current->block;
  current->background.push_back([=, &map, &block] {
    for (int i = 0; i < map.box_rows; ++i) {
      for (int chunk = 0; chunk < 8; ++chunk) {
        uint8_t bytes[16] = {};
        if (row + i < map.num_rows && page >= 0 && page < map.num_pages) {
          std::memcpy(bytes, map.rows + page * map.page_nbytes + (row + i) * 128 + chunk * 16, 16);
        }
        const auto offset = static_cast<uint8_t*>(panels) - block.memory + i * 128 + (chunk ^ i % 8) * 16;
        std::memcpy(block.memory + offset, bytes, 16);
        std::memcpy(block.seen_by_products.data() + offset, bytes, 16);
      }
    }
    as_mbarrier(barrier).nbytes -= map.box_rows * 128;
    as_mbarrier(barrier).settle();
  });
}

}  // namespace dsv32
