// Products of a warpgroup, which the tensor cores compute in the background. All four warps take part in each.
//
// Between the fence and the wait nobody touches the sums, nor what else a product takes. Of sums [64, N], thread
// 32 w + 4 g + t holds as elements 4 j and 4 j + 1 row 16 w + g at columns 8 j + 2 t and 8 j + 2 t + 1; the two
// elements after these are of row 16 w + g + 8.
// A matrix in shared memory is named by a descriptor; see panels.cuh. Who writes one calls fence_async_proxy.
#pragma once

#include <cstdint>

namespace dsv32 {

// Before the first product, and after registers of the next ones were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Products since the last commit are a group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// What reads these sums comes after what stands before this, and what writes them before.
template <int kSize>
__device__ __forceinline__ void pin(float (&sums)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    asm volatile("" : "+f"(sums[i])::"memory");
  }
}

// Returns when all groups but the last few are done, among them those of these sums.
template <int kGroupsLeft, class... Sums>
__device__ __forceinline__ void wgmma_wait(Sums&... sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
  (pin(sums), ...);
}

#define DSV32_SUMS_8(x, i) \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), \
      "+f"(x[i + 7])
#define DSV32_SUMS_32(x, i) \
  DSV32_SUMS_8(x, i), DSV32_SUMS_8(x, i + 8), DSV32_SUMS_8(x, i + 16), DSV32_SUMS_8(x, i + 24)

// sums[64, 64] = a[64, 16] b[64, 16]^T, plus the sums where wanted; columns of both are contiguous.
#define DSV32_MULTIPLY_TRANSPOSED(name, types)                                                                     \
  __device__ __forceinline__ void name(float (&sums)[32], uint64_t a, uint64_t b, bool add) {                      \
    asm volatile(                                                                                                  \
        "{\n"                                                                                                      \
        ".reg .pred p;\n"                                                                                          \
        "setp.ne.s32 p, %34, 0;\n"                                                                                 \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." types                                                        \
        " {"                                                                                                       \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                   \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                           \
        "}, %32, %33, p, 1, 1, 0, 0;\n"                                                                            \
        "}\n"                                                                                                      \
        : DSV32_SUMS_32(sums, 0)                                                                                   \
        : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                             \
  }
DSV32_MULTIPLY_TRANSPOSED(multiply_transposed_bfloat16, "bf16.bf16")
DSV32_MULTIPLY_TRANSPOSED(multiply_transposed_float16, "f16.f16")
#undef DSV32_MULTIPLY_TRANSPOSED

// As above in bfloat16, but a is in registers: see below.
__device__ __forceinline__ void multiply_transposed_bfloat16(float (&sums)[32], const uint32_t (&a)[4], uint64_t b,
                                                             bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n"
      "}\n"
      : DSV32_SUMS_32(sums, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

// sums[64, 128] += a[64, 16] b[16, 128] in float16; columns of b are contiguous. Of the same thread, a holds rows
// 16 w + g and 16 w + g + 8 at columns 2 t and 2 t + 1, then both at columns 2 t + 8 and 2 t + 9.
__device__ __forceinline__ void multiply(float (&sums)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
      : DSV32_SUMS_32(sums, 0), DSV32_SUMS_32(sums, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// sums[64, 256] += a[64, 16] b[16, 256] in bfloat16; columns of both are contiguous.
__device__ __forceinline__ void multiply_bfloat16(float (&sums)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, %128, %129, 1, 1, 1, 0, 1;\n"
      : DSV32_SUMS_32(sums, 0), DSV32_SUMS_32(sums, 32), DSV32_SUMS_32(sums, 64), DSV32_SUMS_32(sums, 96)
      : "l"(a), "l"(b));
}

// sums[64, 128] = a[64, 32] b[128, 32]^T in e4m3, plus the sums where wanted; columns of both are contiguous.
__device__ __forceinline__ void multiply_e4m3(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1;\n"
      "}\n"
      : DSV32_SUMS_32(sums, 0), DSV32_SUMS_32(sums, 32)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

#undef DSV32_SUMS_32
#undef DSV32_SUMS_8

}  // namespace dsv32
