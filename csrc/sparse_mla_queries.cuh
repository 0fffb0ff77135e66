// Queries as operands of the products of scores, in registers.
//
// Their latent part becomes float16, since that is what e4m3 is decoded to, times a power of two for each head. The
// rotary part stays bfloat16, as rows have it.
#pragma once

#include "sparse_mla_block.cuh"
#include "sparse_mla_float16.cuh"

namespace dsv32 {

template <int kNum, class F>
__device__ __forceinline__ void for_each_word(uint4 (&quads)[kNum][2], const F& f) {
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      f(quads[i][half].x), f(quads[i][half].y), f(quads[i][half].z), f(quads[i][half].w);
    }
  }
}

// What a lane holds of the first operand of each step.
using Queries = uint32_t[kSteps][4];

constexpr int kThreadsOfHead = kWarpgroup / kTileHeads;
constexpr int kLatentStepsOfThread = kLatentSteps / kThreadsOfHead;
static_assert(kThreadsOfHead >= kRopeSteps && kLatentStepsOfThread * kThreadsOfHead == kLatentSteps);

// 16 columns of a step. In the latent part, where a lane takes four bytes of a row, the even pairs come first.
__device__ __forceinline__ void store_step(uint16_t* row, int step, const uint4& low, const uint4& high) {
  auto* columns = reinterpret_cast<uint4*>(row + step * 16);
  columns[0] = low;
  columns[1] = high;
}

// Of all heads to shared memory, once, by the threads of the warps that compute scores; zeros for heads that do not
// exist. Of code that each lane would run for its own operands, a launch of few tiles would wait for the instructions.
__device__ __forceinline__ void convert_queries(Shared& shared, const SparseMlaArguments& p, const Work& work,
                                                int thread) {
  const int head = thread / kThreadsOfHead, part = thread % kThreadsOfHead;
  const bool exists = head < work.num_heads;
  const auto* row = static_cast<const uint16_t*>(p.q) +
                    (static_cast<int64_t>(work.token) * p.num_heads + work.first_head + head) * kLatentDim;
  uint4 latent[kLatentStepsOfThread][2], rope[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kLatentStepsOfThread; ++i) {
      latent[i][half] = load_quad_if(exists, row + (i * kThreadsOfHead + part) * 16 + half * 8);
    }
    const bool has_rope = part < kRopeSteps;
    rope[half] = load_quad_if(exists && has_rope, row + kKvLoraRank + (has_rope ? part : 0) * 16 + half * 8);
  }

  uint32_t magnitudes = 0;  // of even and of odd dimensions
  for_each_word(latent, [&](uint32_t& pair) { magnitudes = max_with_magnitude(magnitudes, pair); });
  float greatest = fmaxf(bfloat16_low(magnitudes), bfloat16_high(magnitudes));
#pragma unroll
  for (int distance = 1; distance < kThreadsOfHead; distance *= 2) {
    greatest = fmaxf(greatest, __shfl_xor_sync(0xffffffffu, greatest, distance));
  }
  const int exponent = exponent_for_queries(greatest);
  const float forth = power_of_two(exponent);
  for_each_word(latent, [&](uint32_t& pair) { pair = float16_of_queries(pair, forth); });

  auto* converted = shared.queries[head];
#pragma unroll
  for (int i = 0; i < kLatentStepsOfThread; ++i) {
    const uint4 &a = latent[i][0], &b = latent[i][1];
    store_step(converted, i * kThreadsOfHead + part, make_uint4(a.x, a.z, b.x, b.z), make_uint4(a.y, a.w, b.y, b.w));
  }
  if (part < kRopeSteps) {
    store_step(converted, kLatentSteps + part, rope[0], rope[1]);
  }
  if (part == 0) {
    shared.query_factors[head] = power_of_two(-exponent);
  }
}

// Of heads g and g + 8; back[i] undoes the factor of the latent part.
__device__ __forceinline__ void load_queries(Queries& queries, float (&back)[2], Shared& shared,
                                             const SparseMlaArguments& p, const Work& work, int warp, int lane) {
  // Queries of the last work are in registers: all of these warps have met since they loaded them.
  convert_queries(shared, p, work, warp * 32 + lane);
  named_barrier(kScoreBarrier, kWarpgroup);
  const int row = lane % 8 + lane / 8 % 2 * 8, column = lane / 16 * 8;
  const uint32_t address = shared_address(&shared.queries[row][column]);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    load_matrices(queries[step], address + step * 16 * 2);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    back[half] = shared.query_factors[lane / 4 + 8 * half];
  }
}

}  // namespace dsv32
