// Lists of what may be selected: a block reads its share of a row, and keeps in shared memory what reaches a
// threshold, in the order of positions.
#pragma once

#include "topk_select_block.cuh"

namespace dsv32::topk {

// A row of logits, in words of four; the last word may lie in it in part. What is not in the row is not read.
template <bool kAligned>
struct Row {
  const float* logits;
  int num_keys;

  __device__ __forceinline__ int num_words() const { return (num_keys + 3) / 4; }

  __device__ __forceinline__ void load_whole(float (&x)[4], int word) const {
    const float* source = logits + static_cast<int64_t>(word) * 4;
    if constexpr (kAligned) {
      const float4 quad = *reinterpret_cast<const float4*>(source);
      x[0] = quad.x, x[1] = quad.y, x[2] = quad.z, x[3] = quad.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = source[i];
      }
    }
  }

  __device__ __forceinline__ void load(float (&x)[4], int word) const {
    if (word < num_keys / 4) {
      load_whole(x, word);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = word * 4 + i < num_keys ? logits[static_cast<int64_t>(word) * 4 + i] : NAN;
      }
    }
  }

  // Of a logit that has been loaded; NaN counts as minus infinity in the row, and as nothing behind it.
  __device__ __forceinline__ uint32_t key(float x, int word, int i) const {
    return word * 4 + i < num_keys ? key_of(x) : kBelowAll;
  }
};

// Words of a row.
struct Share {
  int begin;
  int end;
};

// A tile is read by a block at a time: each warp has neighbouring words, of which each lane takes every 32nd.
template <class C>
struct Tile {
  static constexpr int kWords = C::kThreads * C::kTileWords;
  float logits[C::kTileWords][4];

  __device__ __forceinline__ static int word(const Block<C>& block, int first, int j) {
    return first + block.warp * (32 * C::kTileWords) + j * 32 + block.lane;
  }

  template <bool kAligned>
  __device__ __forceinline__ void load(const Block<C>& block, const Row<kAligned>& row, Share share, int first) {
    if (first + kWords <= min(share.end, row.num_keys / 4)) {
#pragma unroll
      for (int j = 0; j < C::kTileWords; ++j) {
        row.load_whole(logits[j], word(block, first, j));
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < C::kTileWords; ++j) {
      const int at = word(block, first, j);
      if (at < share.end) {
        row.load(logits[j], at);
      } else {
        logits[j][0] = logits[j][1] = logits[j][2] = logits[j][3] = NAN;
      }
    }
  }
};

// Bits 4 j + i of a mask are logit i of word j of a thread's tile. Finds how many bits of the tile come before each
// word, in the order of positions; returns how many there are.
template <class C>
__device__ __forceinline__ int count_before(Block<C>& block, uint32_t mask, int (&before)[C::kTileWords]) {
  static_assert(C::kTileWords <= 4);
  uint32_t counts = 0;  // a byte a word, which 32 lanes of four do not fill
#pragma unroll
  for (int j = 0; j < C::kTileWords; ++j) {
    counts |= static_cast<uint32_t>(__popc(mask >> (4 * j) & 15)) << (8 * j);
  }
  uint32_t sums = counts;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, sums, distance);
    sums += block.lane >= distance ? other : 0;
  }
  const uint32_t sums_of_warp = __shfl_sync(kAllLanes, sums, 31);
  sums -= counts;
  int num_of_warp = 0;
#pragma unroll
  for (int j = 0; j < C::kTileWords; ++j) {
    before[j] = num_of_warp + static_cast<int>(sums >> (8 * j) & 255);
    num_of_warp += static_cast<int>(sums_of_warp >> (8 * j) & 255);
  }
  int total;
  const int before_warp = block.sum_of_warps_before(num_of_warp, total);
#pragma unroll
  for (int j = 0; j < C::kTileWords; ++j) {
    before[j] += before_warp;
  }
  return total;
}

// What passes a guess; NaN does not.
struct Guess {
  static constexpr bool kAhead = true;
  float threshold;

  template <class C, bool kAligned>
  __device__ __forceinline__ uint32_t mask(Block<C>& block, const Row<kAligned>&, const Tile<C>& tile, int) {
    uint32_t mask = 0;
#pragma unroll
    for (int j = 0; j < C::kTileWords; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mask |= tile.logits[j][i] >= threshold ? 1u << (4 * j + i) : 0u;
      }
    }
    return mask;
  }
};

// What is selected: the keys above the lowest that is, and of those equal to it the first.
struct Exact {
  static constexpr bool kAhead = false;  // its loops need the registers
  uint32_t key;
  int num_ties;      // of this share
  int num_tied = 0;  // so far

  template <class C, bool kAligned>
  __device__ __forceinline__ uint32_t mask(Block<C>& block, const Row<kAligned>& row, const Tile<C>& tile, int first) {
    const float lowest = logit_of(key);
    uint32_t higher = 0, tied = 0;
#pragma unroll
    for (int j = 0; j < C::kTileWords; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = tile.logits[j][i];
        const bool in_row = Tile<C>::word(block, first, j) * 4 + i < row.num_keys;
        const bool counts_as_lowest = key == kLowest && x != x && in_row;
        higher |= x > lowest ? 1u << (4 * j + i) : 0u;
        tied |= x == lowest || counts_as_lowest ? 1u << (4 * j + i) : 0u;
      }
    }
    int before[C::kTileWords];
    const int total = count_before(block, tied, before);
#pragma unroll
    for (int j = 0; j < C::kTileWords; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t bit = 1u << (4 * j + i);
        const int rank = num_tied + before[j] + __popc(tied >> (4 * j) & ((1u << i) - 1));
        higher |= rank < num_ties ? tied & bit : 0u;
      }
    }
    num_tied += total;
    return higher;
  }
};

// Returns how many pass; if they are more than the list has room for, some are missing in it. The first tile is
// loaded already if tiles are loaded ahead.
template <class C, bool kAligned, class Test>
__device__ __forceinline__ int list_share(Block<C>& block, const Row<kAligned>& row, Share share, Tile<C>& upcoming,
                                          Test test) {
  int count = 0;
  for (int first = share.begin; first < share.end; first += Tile<C>::kWords) {
    Tile<C> tile;
    if constexpr (!Test::kAhead) {
      tile.load(block, row, share, first);
    } else {
      tile = upcoming;
      if (first + Tile<C>::kWords < share.end) {
        upcoming.load(block, row, share, first + Tile<C>::kWords);
      }
    }
    const uint32_t mask = test.mask(block, row, tile, first);
    int before[C::kTileWords];
    const int total = count_before(block, mask, before);
    if (count + total <= C::kCapacity) {
#pragma unroll
      for (int j = 0; j < C::kTileWords; ++j) {
        int place = count + before[j];
        // Few pass: a turn for each is shorter than four.
        for (uint32_t bits = mask >> (4 * j) & 15; bits != 0; bits &= bits - 1) {
          const int i = __ffs(static_cast<int>(bits)) - 1;
          const auto& x = tile.logits[j];
          block.shared.logits[place] = i < 2 ? (i == 0 ? x[0] : x[1]) : (i == 2 ? x[2] : x[3]);
          block.shared.positions[place] = Tile<C>::word(block, first, j) * 4 + i;
          ++place;
        }
      }
    }
    count += total;
  }
  return count;
}

struct GuessedThreshold {
  float logit;
  bool is_crowded;  // more are equal to it, or higher, than a list holds
};

// A logit that k of a row are all but certain to reach, and not many more unless they are equal.
//
// It is guessed from words at equal distances. The expectation lies five standard deviations of a random sample above
// k: neighbours are alike, which leaves less than that, but enough.
template <class C>
struct Sample {
  Logits<C::kSampleWords> logits;

  template <bool kAligned>
  __device__ __forceinline__ Sample(const Block<C>& block, const Row<kAligned>& row) {
    constexpr int kWords = C::kSample / 4;
    logits.num_words = C::kSampleWords;
#pragma unroll
    for (int j = 0; j < C::kSampleWords; ++j) {
      const uint32_t index = j * C::kThreads + block.thread;
      float x[4];
      row.load_whole(x, static_cast<int>(static_cast<uint64_t>(index) * (row.num_keys / 4) / kWords));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits.x[j * 4 + i] = fmaxf(x[i], -INFINITY);
      }
    }
  }

  __device__ __forceinline__ GuessedThreshold guess_threshold(Block<C>& block, int num_keys, int k) const {
    const float weight = static_cast<float>(num_keys) / C::kSample;
    const float deviations = 2.5f * sqrtf(weight);
    const float root = deviations + sqrtf(deviations * deviations + k);
    // In rows so long that the list might not hold them, half way between too few and too many.
    const float expected = fminf(root * root, 0.5f * (k + C::kCapacity));
    const int rank = min(static_cast<int>(expected / weight) + 1, C::kSample);
    const auto found = search(block, logits, rank, max(4, rank / 8));
    const bool equal = found.bins.low == found.bins.high;
    const float num_expected = weight * (found.boundary.above + found.boundary.inside);
    return {fmaxf(found.bins.bottom_of(found.boundary.bin), kLowestFinite), equal && num_expected > C::kCapacity};
  }
};

}  // namespace dsv32::topk
