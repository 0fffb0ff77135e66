// What all operators ask of tensors, and how they launch. They are on torch's stable ABI: one build serves every torch
// from 2.11 on, and every Python.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include "checks.h"

namespace dsv32 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string describe(ScalarType type, const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << type << " [";
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    text << (dim > 0 ? ", " : "") << sizes[dim];
  }
  text << "]";
  return text.str();
}

inline std::string describe(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < x.dim(); ++dim) {
    sizes.push_back(x.size(dim));
  }
  return describe(x.scalar_type(), sizes) + (x.is_contiguous() ? "" : ", not contiguous") +
         (x.is_cuda() ? "" : ", not on CUDA");
}

inline void require_tensor(const char* op, const Tensor& x, const char* name, ScalarType type,
                           std::initializer_list<int64_t> sizes) {
  bool fits = x.is_cuda() && x.scalar_type() == type && x.is_contiguous() && x.dim() == int64_t(sizes.size());
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    fits = fits && x.size(dim++) == size;
  }
  if (!fits) {
    require(false, op, ": ", name, ": expected ", describe(type, sizes), ", got ", describe(x));
  }
}

inline void require_rows(const char* op, const Tensor& x, const char* name, ScalarType type) {
  if (!(x.is_cuda() && x.scalar_type() == type && x.dim() == 2 && (x.stride(1) == 1 || x.size(1) <= 1))) {
    require(false, op, ": ", name, ": expected ", type, " in two dimensions with dense rows, got ", describe(x));
  }
}

// Looked up when called: a torch without CUDA lacks the function, and can yet load the library and describe its
// operators.
inline void* current_stream(int device_index) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  require(get_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device_index, &stream));
  return stream;
}

inline void require_aligned(const char* op, const void* data, const char* name) {
  require(reinterpret_cast<uintptr_t>(data) % 16 == 0, op, ": ", name, ": expected data at a multiple of 16 bytes");
}

// On the device of a tensor, in its current stream. A launch returns null, or what went wrong.
template <class Launch>
void launch_for(const char* op, const Tensor& x, Launch launch) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const char* error = launch(current_stream(x.get_device_index()));
  require(error == nullptr, op, ": ", error ? error : "");
}

// What a kernel's launch counts, of the current device.
inline int64_t count_for(const char* op, const char* (*count)(int, int*), int64_t argument) {
  int result = 0;
  const char* error = count(static_cast<int>(argument), &result);
  require(error == nullptr, op, ": ", error ? error : "");
  return result;
}

}  // namespace dsv32
