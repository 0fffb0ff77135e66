// What the kernels use of CUDA's own headers, for the emulator.
#pragma once

#include <algorithm>
#include <cmath>

#include "emulator.h"

#define __device__
#define __host__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct alignas(16) int4 { int x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {
inline int first_block;
struct ThreadIndex {
  struct { operator unsigned() const { return current->index; } } x;
};
struct BlockIndex {
  struct { operator int() const { return first_block + current->block->rank; } } x;
};
}  // namespace emulator
inline emulator::ThreadIndex threadIdx;
inline emulator::BlockIndex blockIdx;
inline dim3 gridDim;

inline void __syncthreads() {
  auto& block = *emulator::current->block;
  emulator::meet(block.barriers[0], static_cast<int>(block.warps.size()) * 32);
}

inline void __syncwarp() { emulator::exchange({}); }

template <class T>
T __shfl_sync(unsigned, T x, int source) {
  emulator::Lane own = {};
  std::memcpy(own.words, &x, sizeof(T));
  std::memcpy(&x, emulator::exchange(own)[source].words, sizeof(T));
  return x;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int other) {
  return __shfl_sync(mask, x, emulator::current->index % 32 ^ other);
}

// Of lanes below the distance, their own.
template <class T>
T __shfl_up_sync(unsigned mask, T x, int distance) {
  const int lane = emulator::current->index % 32;
  return __shfl_sync(mask, x, lane < distance ? lane : lane - distance);
}

template <class T, class Operation>
T reduce_lanes(T x, Operation operation) {
  const emulator::Lane* lanes = emulator::exchange({{static_cast<uint32_t>(x)}});
  T result = static_cast<T>(lanes[0].words[0]);
  for (int lane = 1; lane < 32; ++lane) {
    result = operation(result, static_cast<T>(lanes[lane].words[0]));
  }
  return result;
}
template <class T>
T __reduce_add_sync(unsigned, T x) {
  return reduce_lanes(x, [](T a, T b) { return a + b; });
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
  return reduce_lanes(x, [](unsigned a, unsigned b) { return min(a, b); });
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  return reduce_lanes(x, [](unsigned a, unsigned b) { return max(a, b); });
}

// Threads change only where they wait.
template <class T>
T atomicAdd(T* address, T x) {
  const T old = *address;
  *address += x;
  return old;
}

template <class T>
T atomicMin(T* address, T x) {
  const T old = *address;
  *address = min(old, x);
  return old;
}
template <class T>
T atomicCAS(T* address, T expected, T x) {
  const T old = *address;
  *address = old == expected ? x : old;
  return old;
}

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

inline unsigned __ballot_sync(unsigned, bool x) {
  const emulator::Lane* lanes = emulator::exchange({{x}});
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    bits |= static_cast<unsigned>(lanes[lane].words[0] != 0) << lane;
  }
  return bits;
}

inline bool __any_sync(unsigned, bool x) {
  const emulator::Lane* lanes = emulator::exchange({{x}});
  return std::any_of(lanes, lanes + 32, [](const emulator::Lane& lane) { return lane.words[0] != 0; });
}

// Nibble i of the selector says which of the eight bytes is byte i.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidClusterSize };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  int id;
  struct { dim3 clusterDim; int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  int numAttrs = 0;
};
enum { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
// So few that blocks have several works.
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 3;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t*) {
  *count = 1;
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const int size = config->attrs[0].val.clusterDim.x;
  gridDim = config->gridDim;
  for (unsigned block = 0; block < config->gridDim.x; block += size) {
    emulator::first_block = block;
    emulator::run_cluster(size, config->blockDim.x, config->dynamicSmemBytes, [=] { kernel(arguments...); });
  }
  return cudaSuccess;
}
