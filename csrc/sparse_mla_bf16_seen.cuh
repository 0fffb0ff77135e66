// Which of a tile's keys a token has selected: 64 bits, those of each thread of a quad together, as it has scores.
#pragma once

#include "slot_union_sm90.h"
#include "sparse_mla_work.cuh"

namespace dsv32 {

constexpr int kSeenBits = 16;  // of a thread: a key pair of every eight keys
static_assert(4 * kSeenBits == kTileKeys);

// Of thread t, bit b of its 16 is of this key of the tile.
__host__ __device__ constexpr int key_of_bit(int t, int b) { return b / 2 * 8 + t * 2 + b % 2; }

}  // namespace dsv32
