// Instructions of SM 90 that CUDA C++ has no name for, one function each.
#pragma once

#include <cstdint>

namespace dsv32 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// What the launch has allocated. Panels of matrices, of panels.cuh, want the alignment.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

// ---- mbarrier -------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Makes initialised barriers visible to copies, which another unit carries out.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Of this thread; warp_barriers.cuh says how a warp arrives, and which lanes racecheck credits with order.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and has the phase wait for so many bytes besides.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, int nbytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(nbytes)
               : "memory");
}

// Returns when the phase of this parity is complete. Phases alternate from 0; that before the first counts as
// complete, so who waits for a free stage starts with parity 1.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- barriers of threads ----------------------------------------------------------------------------------------

__device__ __forceinline__ void named_barrier(int id, int num_threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Of all threads of the cluster. What a thread has written before, the others see after.
__device__ __forceinline__ void cluster_barrier() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// As above, but orders nothing: for who only has to stay until the others come.
__device__ __forceinline__ void cluster_barrier_relaxed() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// ---- copies from global to shared memory ------------------------------------------------------------------------

// Both addresses and the size are multiples of 16; the barrier is told of every byte that has arrived.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int nbytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(nbytes), "r"(shared_address(barrier))
               : "memory");
}

// Of 16 bytes, in the background; zeros where not wanted. Products of warpgroups see them after fence_async_proxy, by a
// thread that knows that they are there.
__device__ __forceinline__ void copy_chunk_if(bool wanted, uint32_t address, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(__cvta_generic_to_global(global)),
               "r"(wanted ? 16 : 0)
               : "memory");
}

// Arrives once what this thread has copied so far by chunks is there: one of the arrivals that the barrier expects.
__device__ __forceinline__ void mbarrier_arrive_after_chunks(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// As above, but has the phase expect an arrival more first.
__device__ __forceinline__ void mbarrier_expect_chunks(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Chunks since the last commit are a group.
__device__ __forceinline__ void commit_chunks() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when all groups but the last few are there.
template <int kGroupsLeft>
__device__ __forceinline__ void wait_for_chunks() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// Orders what this thread has written to shared memory before later copies to it, and before products of warpgroups
// that read it. For the thread that wrote, before it tells others.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- loads ------------------------------------------------------------------------------------------------------

// Zero where not wanted; no branch, so that several are on their way at once.
__device__ __forceinline__ int32_t load_if(bool wanted, const int32_t* global) {
  int32_t x;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %2, 0;\n"
      "mov.s32 %0, 0;\n"
      "@p ld.global.s32 %0, [%1];\n"
      "}\n"
      : "=r"(x)
      : "l"(__cvta_generic_to_global(global)), "r"(static_cast<int>(wanted))
      : "memory");
  return x;
}

// As above, of two bytes.
__device__ __forceinline__ uint32_t load_half_if(bool wanted, const uint16_t* global) {
  uint32_t x;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %2, 0;\n"
      "mov.b32 %0, 0;\n"
      "@p ld.global.u16 %0, [%1];\n"
      "}\n"
      : "=r"(x)
      : "l"(__cvta_generic_to_global(global)), "r"(static_cast<int>(wanted))
      : "memory");
  return x;
}

// As above, of 16 bytes.
__device__ __forceinline__ uint4 load_quad_if(bool wanted, const void* global) {
  uint4 x;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.s32 p, %5, 0;\n"
      "mov.b32 %0, 0;\n"
      "mov.b32 %1, 0;\n"
      "mov.b32 %2, 0;\n"
      "mov.b32 %3, 0;\n"
      "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(__cvta_generic_to_global(global)), "r"(static_cast<int>(wanted))
      : "memory");
  return x;
}

// What threads of other blocks may be writing.
__device__ __forceinline__ int32_t load_relaxed(const int32_t* global) {
  int32_t x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(global)) : "memory");
  return x;
}

// As a multiprocessor's own cache may have it: what it was at some time since the kernel started.
__device__ __forceinline__ int32_t load_cached(const int32_t* global) {
  int32_t x;
  asm volatile("ld.global.ca.s32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(global)) : "memory");
  return x;
}

// From shared memory, at a multiple of 16.
__device__ __forceinline__ uint4 load_chunk(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// To the second-level cache.
__device__ __forceinline__ void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)) : "memory");
}

// As above, of so many bytes; that and the address are multiples of 16.
__device__ __forceinline__ void prefetch_bulk(const void* global, int nbytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(nbytes)
               : "memory");
}

// ---- stores -----------------------------------------------------------------------------------------------------

// What threads of other blocks may be reading.
__device__ __forceinline__ void store_relaxed(int32_t* global, int32_t x) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(x) : "memory");
}

// To shared memory, at a multiple of 16.
__device__ __forceinline__ void store_chunk(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

__device__ __forceinline__ void store_word(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// ---- matrices ---------------------------------------------------------------------------------------------------

// Four matrices of eight rows of 16 bytes. Lane 8 i + r names row r of matrix i; lane 4 g + t receives of each
// matrix the four bytes 4 t of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// The other way about.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// As load_matrices, but lane 4 g + t receives the two bytes 2 g of row 2 t, and above them those of row 2 t + 1.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// acc[16, 8] += a[16, 16] b[16, 8]. Lane 4 g + t holds
//   a: (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8), each with the next column above it,
//   b: (2 t, g), (2 t + 8, g), each with the next row above it,
//   acc: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1), in float32.
__device__ __forceinline__ void multiply_bfloat16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_float16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- conversions ------------------------------------------------------------------------------------------------

// e4m3 to float16, which holds every value of it: of bytes 0 to 3, bytes 0 and 1. NaN stays NaN.
__device__ __forceinline__ uint32_t float16_of_low_bytes(uint32_t bytes) {
  uint32_t pair;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %1;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "}\n"
      : "=r"(pair)
      : "r"(bytes));
  return pair;
}

// Of bytes 0 to 3, bytes 2 and 3.
__device__ __forceinline__ uint32_t float16_of_high_bytes(uint32_t bytes) {
  uint32_t pair;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %1;\n"
      "cvt.rn.f16x2.e4m3x2 %0, high;\n"
      "}\n"
      : "=r"(pair)
      : "r"(bytes));
  return pair;
}

__device__ __forceinline__ float2 floats_of_float16(uint32_t pair) {
  float2 x;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n"
      "}\n"
      : "=f"(x.x), "=f"(x.y)
      : "r"(pair));
  return x;
}

// Beyond 65504 and half a step: infinity.
__device__ __forceinline__ uint32_t pack_float16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(low), "f"(high));
  return pair;
}

// Two products of float16.
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t pair;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// Bytes 0, 2, 1, 3.
__device__ __forceinline__ uint32_t swap_inner_bytes(uint32_t bytes) { return __byte_perm(bytes, 0, 0x3120); }

// ---- functions --------------------------------------------------------------------------------------------------

// What exp2f adds to these is the care for subnormal arguments and results, which weights do without.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// max(a, |b|) of two values in bfloat16 each; NaN only if both are.
__device__ __forceinline__ uint32_t max_with_magnitude(uint32_t a, uint32_t b) {
  uint32_t pair;
  asm("{\n"
      ".reg .b32 magnitude;\n"
      "abs.bf16x2 magnitude, %2;\n"
      "max.bf16x2 %0, %1, magnitude;\n"
      "}\n"
      : "=r"(pair)
      : "r"(a), "r"(b));
  return pair;
}

// ---- registers --------------------------------------------------------------------------------------------------

// The same value, of which the compiler no longer knows where it came from: what is computed from it is computed anew.
__device__ __forceinline__ uint32_t forget_origin(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Of each thread of this warpgroup; all four warps call it.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- shared memory of other blocks of the cluster ---------------------------------------------------------------

__device__ __forceinline__ uint32_t address_in_block(uint32_t shared, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

__device__ __forceinline__ float2 load_pair_in_cluster(uint32_t address) {
  float2 x;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
  return x;
}

__device__ __forceinline__ float4 load_quad_in_cluster(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address));
  return x;
}

__device__ __forceinline__ uint32_t load_word_in_cluster(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

__device__ __forceinline__ uint4 load_words_in_cluster(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address));
  return x;
}

// For a thread that has only read: of wider scope, it would wait until the whole GPU sees what it has written.
__device__ __forceinline__ void mbarrier_arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// In the background. The barrier, of the same block as the address, is told of every byte that has arrived.
__device__ __forceinline__ void store_chunk_in_cluster(uint32_t address, const uint4& x, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(barrier)
      : "memory");
}

// As above, of four bytes.
__device__ __forceinline__ void store_word_in_cluster(uint32_t address, uint32_t x, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
               "r"(x), "r"(barrier)
               : "memory");
}

// ---- launches ---------------------------------------------------------------------------------------------------

// Lets the blocks of the next kernel of the stream start where this one leaves room, once all blocks of this one have
// called it. That kernel waits in turn.
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;"); }

// Returns when the last kernel of the stream has ended and what it wrote can be read. Every thread calls it before it
// reads or writes global memory, even if it does neither: the next kernel, which waits for this one alone, has then
// waited for all before it.
__device__ __forceinline__ void wait_for_last_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace dsv32
