// The functions of csrc/wgmma.cuh for the emulator, written from the PTX manual, not from that file.
//
// A thread computes its own part of a product, at a random time before it must. Until it has waited, its sums are NaN.
#pragma once

#include "ptx.cuh"

namespace dsv32 {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "%s\n", message);
  std::abort();
}

inline void wgmma_fence() { current->products.is_fenced = true; }
inline void wgmma_commit() { current->products.groups.push_back(current->products.num_started); }

template <int kSize>
void pin(float (&)[kSize]) {}

template <int kSize>
void give_back(float (&sums)[kSize]) {
  auto& held = current->products.sums;
  const auto place = held.find(sums);
  if (place == held.end() || place->second.num_pending) {
    fail("sums of products that are not done, or of none");
  }
  std::copy_n(place->second.values.begin(), kSize, sums);
  held.erase(place);
}

template <int kGroupsLeft, class... Sums>
void wgmma_wait(Sums&... sums) {
  auto& products = current->products;
  while (products.groups.size() > kGroupsLeft) {
    while (products.num_done < products.groups.front()) {
      current->background.front()();
      current->background.pop_front();
    }
    products.groups.pop_front();
  }
  emulator::exchange({});  // a warp waits as one
  products.is_fenced = false;
  (give_back(sums), ...);
}

// A matrix in shared memory: "Matrix descriptor" and "Strides" of the manual, for the swizzle of 128 bytes; and for
// none if it is K-major.
struct Matrix {
  const emulator::Block* block;
  uint64_t descriptor;

  uint32_t field(int bit) const { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; }

  bool is_swizzled() const { return descriptor >> 62 == 1; }

  template <class Bits>
  Bits at(uint32_t offset) const {
    if (descriptor >> 62 > 1 || (descriptor >> 49 & 7) != 0) {
      fail("a descriptor of another kind");
    }
    uint32_t address = field(0) + offset;
    if (is_swizzled()) {
      address ^= (address >> 7 & 7) << 4;
    }
    if (address + sizeof(Bits) > block->nbytes) {
      fail("a product past the end of shared memory");
    }
    Bits bits;
    std::memcpy(&bits, block->seen_by_products.data() + address, sizeof(Bits));
    return bits;
  }
  // Rows of 128 bytes, eight of them a swizzle atom; the stride is between atoms.
  // Else core matrices of eight rows of 16 bytes; the leading stride goes along K, the other along M or N.
  template <class Bits>
  Bits k_major(int mn, int k) const {
    if (!is_swizzled()) {
      const int byte = k * sizeof(Bits);
      return at<Bits>(mn % 8 * 16 + mn / 8 * field(32) + byte / 16 * field(16) + byte % 16);
    }
    return at<Bits>(mn % 8 * 128 + mn / 8 * field(32) + k * sizeof(Bits));
  }
  // 64 elements, by 8 along K: an atom. The leading stride goes along M or N, the other along K.
  uint16_t mn_major(int mn, int k) const {
    if (!is_swizzled()) {
      fail("a descriptor of another kind");
    }
    return at<uint16_t>(mn % 64 * 2 + mn / 64 * field(16) + k % 8 * 128 + k / 8 * field(32));
  }
};

// The part of a thread of sums[64, kSize * 2] (+)= a[64, kDepth] b[kDepth, kSize * 2], of numbers whose bits a and b
// give.
template <int kDepth, int kSize, class A, class B, class Value>
void start_product(float (&sums)[kSize], bool add, A a, B b, Value value) {
  auto& products = current->products;
  if (!products.is_fenced) {
    fail("a product without a fence");
  }
  auto& held = products.sums[sums];
  if (held.num_pending++ == 0 && held.values.empty()) {
    held.values.assign(sums, sums + kSize);
    std::fill_n(sums, kSize, NAN);
  }
  ++products.num_started;
  const int lane = current->index % 32;
  current->background.push_back([=, &products, &held] {
    for (int i = 0; i < kSize; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = add ? held.values[i] : 0.0;
      for (int k = 0; k < kDepth; ++k) {
        sum += static_cast<double>(value(a(row, k))) * value(b(column, k));
      }
      held.values[i] = static_cast<float>(sum);
    }
    --held.num_pending;
    ++products.num_done;
  });
}

template <int kDepth, class Bits, int kSize, class Value>
void multiply_transposed(float (&sums)[kSize], uint64_t a, uint64_t b, bool add, Value value) {
  emulator::exchange({});  // all lanes come
  const Matrix rows = {current->block, a}, columns = {current->block, b};
  const int first = current->index / 32 % 4 * 16;
  start_product<kDepth>(
      sums, add, [=](int row, int k) { return rows.k_major<Bits>(first + row, k); },
      [=](int column, int k) { return columns.k_major<Bits>(column, k); }, value);
}
inline void multiply_transposed_bfloat16(float (&sums)[32], uint64_t a, uint64_t b, bool add) {
  multiply_transposed<16, uint16_t>(sums, a, b, add, value_of_bfloat16);
}
inline void multiply_transposed_float16(float (&sums)[32], uint64_t a, uint64_t b, bool add) {
  multiply_transposed<16, uint16_t>(sums, a, b, add, value_of_float16);
}
inline void multiply_e4m3(float (&sums)[64], uint64_t a, uint64_t b, bool add) {
  static const auto values = [] {
    std::array<float, 256> values;
    for (int byte = 0; byte < 256; ++byte) {
      values[byte] = value_of_e4m3(static_cast<uint8_t>(byte));
    }
    return values;
  }();
  multiply_transposed<32, uint8_t>(sums, a, b, add, [](uint8_t byte) { return values[byte]; });
}

// Of the first operand, what all lanes of a warp hold in registers.
inline auto rows_in_registers(const uint32_t (&a)[4]) {
  emulator::Lane own = {};
  std::memcpy(own.words, a, sizeof(a));
  const emulator::Lane* all = emulator::exchange(own);
  std::array<emulator::Lane, 32> lanes;
  std::copy_n(all, 32, lanes.begin());
  return [lanes](int row, int k) {
    uint32_t registers[4];
    std::memcpy(registers, lanes[row % 8 * 4 + k % 8 / 2].words, sizeof(registers));
    return static_cast<uint16_t>(registers[row / 8 + k / 8 * 2] >> k % 2 * 16);
  };
}

inline void multiply(float (&sums)[64], const uint32_t (&a)[4], uint64_t b) {
  const auto rows = rows_in_registers(a);
  const Matrix columns = {current->block, b};
  start_product<16>(sums, true, rows, [=](int column, int k) { return columns.mn_major(column, k); },
                    value_of_float16);
}
inline void multiply_transposed_bfloat16(float (&sums)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  const auto rows = rows_in_registers(a);
  const Matrix columns = {current->block, b};
  start_product<16>(sums, add, rows, [=](int column, int k) { return columns.k_major<uint16_t>(column, k); },
                    value_of_bfloat16);
}
inline void multiply_bfloat16(float (&sums)[128], uint64_t a, uint64_t b) {
  emulator::exchange({});
  const Matrix rows = {current->block, a}, columns = {current->block, b};
  const int first = current->index / 32 % 4 * 16;
  start_product<16>(
      sums, true, [=](int row, int k) { return rows.k_major<uint16_t>(first + row, k); },
      [=](int column, int k) { return columns.mn_major(column, k); }, value_of_bfloat16);
}

}  // namespace dsv32
