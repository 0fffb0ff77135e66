// Copies of boxes of bytes from global to shared memory, by one thread, into panels of panels.cuh.
//
// The map of a matrix is made on the host and is an argument of the kernel.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

namespace dsv32 {

using TensorMap = CUtensorMap;

constexpr int kBoxRowNbytes = 128;

// Of pages of rows of 128 bytes each, box_rows of which are copied at a time. Returns null, or what went wrong.
inline const char* map_pages(TensorMap* map, const void* rows, int64_t num_rows, int64_t num_pages,
                             int64_t page_nbytes, int box_rows) {
  // The driver is not linked with: where it is not installed, the library can yet be loaded.
  static void* const encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  if (encode == nullptr) {
    return "the driver has no cuTensorMapEncodeTiled";
  }
  const cuuint64_t sizes[] = {kBoxRowNbytes, static_cast<cuuint64_t>(num_rows), static_cast<cuuint64_t>(num_pages)};
  const cuuint64_t strides[] = {kBoxRowNbytes, static_cast<cuuint64_t>(page_nbytes)};  // but the first, which is 1
  const cuuint32_t box[] = {kBoxRowNbytes, static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(rows), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses the tensor";
}

// The box from a row of a page on; rows past the page's last are zeros. The barrier is told of every byte.
__device__ __forceinline__ void copy_box(void* panels, const TensorMap& map, int row, int page, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
      "[%5];" ::"r"(shared_address(panels)),
      "l"(&map), "r"(0), "r"(row), "r"(page), "r"(shared_address(barrier))
      : "memory");
}

}  // namespace dsv32
