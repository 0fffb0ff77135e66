// Launches of clusters of blocks, and how many of them a GPU runs at once.
//
// A launch may start while the last kernel of its stream ends. What it launches calls wait_for_last_kernel, of ptx.cuh.
#pragma once

#include <cuda_runtime.h>

namespace dsv32 {

constexpr int kPortableClusterSize = 8;  // of more blocks, a kernel has to allow it

struct ClusterShape {
  int num_blocks;
  int num_threads;    // of a block
  int shared_nbytes;  // of a block
};

// A configuration refers to its attributes, so it is never copied.
struct ClusterLaunch {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};

  ClusterLaunch(const ClusterShape& shape, int num_blocks, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(shape.num_blocks), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = dim3(static_cast<unsigned>(num_blocks));
    config.blockDim = dim3(shape.num_threads);
    config.dynamicSmemBytes = shape.shared_nbytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

template <class Kernel>
cudaError_t allow(Kernel kernel, const ClusterShape& shape) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_nbytes);
  if (error != cudaSuccess || shape.num_blocks <= kPortableClusterSize) {
    return error;
  }
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// Of the current device.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

inline const char* describe(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Both return null, or what went wrong.
template <class... Arguments>
const char* launch_clusters(void (*kernel)(Arguments...), const ClusterShape& shape, int num_blocks, void* stream,
                            const Arguments&... arguments) {
  if (const cudaError_t error = allow(kernel, shape); error != cudaSuccess) {
    return describe(error);
  }
  const ClusterLaunch launch(shape, num_blocks, static_cast<cudaStream_t>(stream));
  return describe(cudaLaunchKernelEx(&launch.config, kernel, arguments...));
}

template <class Kernel>
const char* count_concurrent_clusters(Kernel kernel, const ClusterShape& shape, int* count) {
  if (const cudaError_t error = allow(kernel, shape); error != cudaSuccess) {
    return describe(error);
  }
  ClusterLaunch launch(shape, shape.num_blocks, nullptr);
  launch.config.numAttrs = 1;  // the cluster's alone
  const cudaError_t error = cudaOccupancyMaxActiveClusters(count, kernel, &launch.config);
  if (error == cudaErrorInvalidClusterSize) {  // none, then
    cudaGetLastError();
    *count = 0;
    return nullptr;
  }
  return describe(error);
}

}  // namespace dsv32
