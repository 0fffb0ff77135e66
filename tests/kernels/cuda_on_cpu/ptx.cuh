// The functions of csrc/ptx.cuh for the emulator, written from the PTX manual, not from that file.
#pragma once

#include "cuda_bf16.h"
#include "cuda_runtime.h"

namespace dsv32 {

using emulator::current;

inline uint8_t* shared_memory() { return current->block->memory; }

// Of this block from 0 on; of block r of the cluster from (r + 1) << 24 on.
inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const uint8_t*>(pointer) - current->block->memory;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(current->block->nbytes)) {
    std::fprintf(stderr, "not in shared memory\n");
    std::abort();
  }
  return static_cast<uint32_t>(offset);
}

inline uint8_t* at(uint32_t address, uint32_t nbytes) {
  auto& block = address >> 24 ? *emulator::blocks[(address >> 24) - 1] : *current->block;
  if (&block != current->block && block.num_done) {
    std::fprintf(stderr, "shared memory of a block whose threads have ended\n");
    std::abort();
  }
  const uint32_t offset = address & 0xffffff;
  if (offset % nbytes || offset + nbytes > block.nbytes) {
    std::fprintf(stderr, "misaligned, or past the end of shared memory\n");
    std::abort();
  }
  return block.memory + offset;
}

struct Mbarrier {
  uint32_t expected : 15;
  uint32_t pending : 16;
  uint32_t phase : 1;
  int32_t nbytes;

  void settle() {
    if (pending == 0 && nbytes == 0) {
      phase ^= 1;
      pending = expected;
    }
  }
  void arrive() {
    if (pending == 0) {
      std::fprintf(stderr, "more arrivals than expected\n");
      std::abort();
    }
    --pending;
    settle();
  }
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& as_mbarrier(uint64_t* barrier) { return *reinterpret_cast<Mbarrier*>(barrier); }

inline void mbarrier_init(uint64_t* barrier, int count) {
  as_mbarrier(barrier) = {static_cast<uint32_t>(count), static_cast<uint32_t>(count), 0, 0};
}
inline void fence_mbarrier_init() {}
inline void fence_async_proxy() {
  for (const uint32_t address : current->unfenced) {
    current->block->show_to_products(address);
  }
  current->unfenced.clear();
  for (const uint32_t address : current->block->unfenced) {
    current->block->show_to_products(address);
  }
  current->block->unfenced.clear();
}
inline void mbarrier_arrive(uint64_t* barrier) {
  as_mbarrier(barrier).arrive();
  emulator::give_way();
}
inline void mbarrier_arrive_expect(uint64_t* barrier, int nbytes) {
  as_mbarrier(barrier).nbytes += nbytes;
  as_mbarrier(barrier).arrive();
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  emulator::wait_until([=] { return as_mbarrier(barrier).phase != parity; });
}

inline void named_barrier(int id, int num_threads) { emulator::meet(current->block->barriers[id], num_threads); }
inline void cluster_barrier() { emulator::meet(emulator::cluster, static_cast<int>(emulator::threads.size())); }
inline void cluster_barrier_relaxed() { cluster_barrier(); }

inline void copy_bulk(void* shared, const void* global, int nbytes, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(global) % 16 || shared_address(shared) % 16 || nbytes % 16) {
    std::fprintf(stderr, "a copy of misaligned rows\n");
    std::abort();
  }
  current->background.push_back([=] {
    std::memcpy(shared, global, nbytes);
    as_mbarrier(barrier).nbytes -= nbytes;
    as_mbarrier(barrier).settle();
  });
}

// Once any thread has fenced, products see what is there.
inline void copy_chunk_if(bool wanted, uint32_t address, const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16) {
    std::fprintf(stderr, "a copy of a misaligned chunk\n");
    std::abort();
  }
  auto& thread = *current;
  uint8_t* shared = at(address, 16);
  ++thread.chunks.num_started;
  thread.background.push_back([=, &thread] {
    std::memset(shared, 0, 16);
    if (wanted) {
      std::memcpy(shared, global, 16);
    }
    thread.block->unfenced.push_back(address);
    ++thread.chunks.num_done;
  });
}
inline void mbarrier_arrive_after_chunks(uint64_t* barrier) {
  current->background.push_back([=] { as_mbarrier(barrier).arrive(); });
}
inline void mbarrier_expect_chunks(uint64_t* barrier) {
  ++as_mbarrier(barrier).pending;
  mbarrier_arrive_after_chunks(barrier);
}
inline void commit_chunks() { current->chunks.groups.push_back(current->chunks.num_started); }
template <int kGroupsLeft>
void wait_for_chunks() {
  auto& chunks = current->chunks;
  while (chunks.groups.size() > kGroupsLeft) {
    while (chunks.num_done < chunks.groups.front()) {
      current->background.front()();
      current->background.pop_front();
    }
    chunks.groups.pop_front();
  }
}

inline int32_t load_if(bool wanted, const int32_t* global) { return wanted ? *global : 0; }
// Threads change only where they wait.
inline int32_t load_relaxed(const int32_t* global) { return *global; }
inline int32_t load_cached(const int32_t* global) { return *global; }
inline void store_relaxed(int32_t* global, int32_t x) { *global = x; }
template <class T>
T load_aligned_if(bool wanted, const void* global) {
  if (wanted && reinterpret_cast<uintptr_t>(global) % sizeof(T)) {
    std::fprintf(stderr, "a misaligned load\n");
    std::abort();
  }
  return wanted ? *static_cast<const T*>(global) : T{};
}
inline uint32_t load_half_if(bool wanted, const uint16_t* global) { return load_aligned_if<uint16_t>(wanted, global); }
inline uint4 load_quad_if(bool wanted, const void* global) { return load_aligned_if<uint4>(wanted, global); }

inline void prefetch(const void* global) { *static_cast<const volatile uint8_t*>(global); }

inline void prefetch_bulk(const void* global, int nbytes) {
  if (reinterpret_cast<uintptr_t>(global) % 16 || nbytes % 16) {
    std::fprintf(stderr, "a misaligned prefetch\n");
    std::abort();
  }
  for (int i = 0; i < nbytes; ++i) {
    static_cast<const volatile uint8_t*>(global)[i];
  }
}

inline void store_chunk(uint32_t address, const uint4& x) {
  std::memcpy(at(address, 16), &x, 16);
  current->unfenced.push_back(address);
}

inline uint4 load_chunk(uint32_t address) { return *reinterpret_cast<const uint4*>(at(address, 16)); }

inline void store_word(uint32_t address, uint32_t x) { std::memcpy(at(address, 4), &x, 4); }

inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  const emulator::Lane* lanes = emulator::exchange({{address}});
  const int lane = current->index % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::memcpy(&r[matrix], at(lanes[matrix * 8 + lane / 4].words[0], 16) + lane % 4 * 4, 4);
  }
}
inline void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  emulator::Lane own = {};
  own.words[0] = address;
  std::memcpy(own.words + 1, r, sizeof(r));
  const emulator::Lane* lanes = emulator::exchange(own);
  const int lane = current->index % 32;  // names a row, and writes it
  uint8_t row[16];
  for (int i = 0; i < 4; ++i) {
    uint32_t words[4];
    std::memcpy(words, lanes[lane % 8 * 4 + i].words + 1, sizeof(words));
    std::memcpy(row + i * 4, &words[lane / 8], 4);
  }
  std::memcpy(at(address, 16), row, 16);
  current->unfenced.push_back(address);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  const emulator::Lane* lanes = emulator::exchange({{address}});
  const int lane = current->index % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t halves[2];
    for (int i = 0; i < 2; ++i) {
      std::memcpy(&halves[i], at(lanes[matrix * 8 + lane % 4 * 2 + i].words[0], 16) + lane / 4 * 2, 2);
    }
    r[matrix] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
}

inline float value_of_bfloat16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
inline float value_of_float16(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return x;
}
template <class Value>
void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Value value) {
  emulator::Lane own;
  own.words[0] = a[0] | static_cast<uint64_t>(a[1]) << 32;
  own.words[1] = a[2] | static_cast<uint64_t>(a[3]) << 32;
  own.words[2] = b0 | static_cast<uint64_t>(b1) << 32;
  const emulator::Lane* lanes = emulator::exchange(own);
  const int lane = current->index % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = acc[i];
    for (int k = 0; k < 16; ++k) {
      const int of_a = row / 8 + k / 8 * 2;
      const uint64_t a_words = lanes[row % 8 * 4 + k % 8 / 2].words[of_a / 2];
      const uint64_t b_words = lanes[column * 4 + k % 8 / 2].words[2];
      sum += static_cast<double>(value(static_cast<uint16_t>(a_words >> (of_a % 2 * 32 + k % 2 * 16)))) *
             value(static_cast<uint16_t>(b_words >> (k / 8 * 32 + k % 2 * 16)));
    }
    acc[i] = static_cast<float>(sum);
  }
}
inline void multiply_bfloat16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply(acc, a, b0, b1, value_of_bfloat16);
}
inline void multiply_float16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply(acc, a, b0, b1, value_of_float16);
}

inline float value_of_e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 127) == 127) {
    return NAN;
  }
  const float x = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(1.0f * mantissa, -9);
  return byte & 128 ? -x : x;
}
inline uint32_t pack_float16(float low, float high) {
  const _Float16 x[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t pair;
  std::memcpy(&pair, x, 4);
  return pair;
}
inline float2 floats_of_float16(uint32_t pair) {
  return {value_of_float16(static_cast<uint16_t>(pair)), value_of_float16(static_cast<uint16_t>(pair >> 16))};
}
inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  const auto of = [=](int shift) {
    return value_of_float16(static_cast<uint16_t>(a >> shift)) * value_of_float16(static_cast<uint16_t>(b >> shift));
  };
  return pack_float16(of(0), of(16));
}
inline uint32_t float16_of_low_bytes(uint32_t bytes) {
  return pack_float16(value_of_e4m3(static_cast<uint8_t>(bytes)), value_of_e4m3(static_cast<uint8_t>(bytes >> 8)));
}
inline uint32_t float16_of_high_bytes(uint32_t bytes) { return float16_of_low_bytes(bytes >> 16); }
inline uint32_t swap_inner_bytes(uint32_t x) {
  return (x & 0xff0000ffu) | (x >> 8 & 0xff00u) | (x << 8 & 0xff0000u);
}

inline uint32_t forget_origin(uint32_t x) { return x; }

inline float exp2_approximate(float x) { return std::exp2(x); }
inline uint32_t max_with_magnitude(uint32_t a, uint32_t b) {
  const auto of = [=](int shift) {
    const float x = value_of_bfloat16(static_cast<uint16_t>(a >> shift));
    const float y = std::fabs(value_of_bfloat16(static_cast<uint16_t>(b >> shift)));
    return __float_as_uint(std::fmax(x, y)) >> 16;
  };
  return of(0) | of(16) << 16;
}
inline float log2_approximate(float x) { return std::log2(x); }

template <int kCount>
void take_registers() {}
template <int kCount>
void give_registers() {}

inline uint32_t address_in_block(uint32_t shared, int rank) { return shared | (rank + 1u) << 24; }
inline float2 load_pair_in_cluster(uint32_t address) { return *reinterpret_cast<const float2*>(at(address, 8)); }
inline float4 load_quad_in_cluster(uint32_t address) { return *reinterpret_cast<const float4*>(at(address, 16)); }
inline uint32_t load_word_in_cluster(uint32_t address) { return *reinterpret_cast<const uint32_t*>(at(address, 4)); }
inline uint4 load_words_in_cluster(uint32_t address) { return *reinterpret_cast<const uint4*>(at(address, 16)); }

inline void mbarrier_arrive_in_cluster(uint32_t barrier) {
  mbarrier_arrive(reinterpret_cast<uint64_t*>(at(barrier, 8)));
}
template <class T>
void store_in_cluster(uint32_t address, const T& x, uint32_t barrier) {
  if (address >> 24 == 0 || address >> 24 != barrier >> 24) {
    std::fprintf(stderr, "a store and its barrier in two blocks\n");
    std::abort();
  }
  current->background.push_back([=] {
    std::memcpy(at(address, sizeof(T)), &x, sizeof(T));
    emulator::blocks[(address >> 24) - 1]->unfenced.push_back(address & 0xfffff0);
    Mbarrier& told = as_mbarrier(reinterpret_cast<uint64_t*>(at(barrier, 8)));
    told.nbytes -= sizeof(T);
    told.settle();
  });
}
inline void store_chunk_in_cluster(uint32_t address, const uint4& x, uint32_t barrier) {
  store_in_cluster(address, x, barrier);
}
inline void store_word_in_cluster(uint32_t address, uint32_t x, uint32_t barrier) {
  store_in_cluster(address, x, barrier);
}

inline void let_next_kernel_start() {}
inline void wait_for_last_kernel() {}

}  // namespace dsv32
