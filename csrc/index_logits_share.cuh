// Which part of all work is a block's.
//
// All work is a sequence: of each tile of rows its requests, of each request its tiles of keys. Blocks take parts of it
// that are equally long, wherever these begin. Lengths of rows are known to the GPU alone, so each block counts.
#pragma once

#include "index_logits_block.cuh"

namespace dsv32::index_logits {

__host__ __device__ __forceinline__ int count_tiles(int size, int tile) { return (size + tile - 1) / tile; }

// Adjacent rows of a tile that are of one request.
struct Run {
  int first, end;
  int num_keys;  // the most that one of them sees
};

struct RowTile {
  int request_ids[kTileRows];
  int num_keys[kTileRows];

  // Loads do not wait for each other.
  __device__ __forceinline__ RowTile(const IndexLogitsArguments& p, int tile) {
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      const int row = tile * kTileRows + i;
      request_ids[i] = load_if(true, p.request_ids + min(row, p.num_rows - 1));
      num_keys[i] = load_if(row < p.num_rows, p.num_keys + row);
    }
  }

  __device__ __forceinline__ Run run_from(int first) const {
    Run run = {first, first, 0};
    int request_id = 0;
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      request_id = i == first ? request_ids[i] : request_id;
      if (i == run.end && request_ids[i] == request_id) {
        ++run.end;
        run.num_keys = max(run.num_keys, num_keys[i]);
      }
    }
    return run;
  }

  __device__ __forceinline__ int num_key_tiles() const {
    int total = 0;
#pragma unroll 1
    for (int first = 0; first < kTileRows;) {
      const Run run = run_from(first);
      total += count_tiles(run.num_keys, kTileKeys);
      first = run.end;
    }
    return total;
  }
};

// Of the sequence, a part.
struct Share {
  int first_row_tile;
  int first_key_tile;  // of that tile of rows, whose requests are one after the other
  int num_tiles;       // of keys
};

// All threads of the block call it.
__device__ __forceinline__ Share share_of_block(Shared& shared, const IndexLogitsArguments& p) {
  const int num_row_tiles = count_tiles(p.num_rows, kTileRows);
  const int of_thread = count_tiles(num_row_tiles, kNumThreads);
  const int first = threadIdx.x * of_thread, end = min(num_row_tiles, first + of_thread);
  int own = 0;
#pragma unroll 1
  for (int tile = first; tile < end; ++tile) {
    own += RowTile(p, tile).num_key_tiles();
  }
  const int warp = warp_of_thread(), lane = threadIdx.x % 32;
  int before = own;  // with its own
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, distance);
    before += lane >= distance ? other : 0;
  }
  if (lane == 31) {
    shared.tiles_of_warp[warp] = before;
  }
  before -= own;
  __syncthreads();
  int total = 0;
  for (int other = 0; other < kNumWarps; ++other) {
    before += other < warp ? shared.tiles_of_warp[other] : 0;
    total += shared.tiles_of_warp[other];
  }
  const int num_blocks = gridDim.x, block = blockIdx.x;
  const int begin = static_cast<int>(static_cast<int64_t>(total) * block / num_blocks);
  const int next = static_cast<int>(static_cast<int64_t>(total) * (block + 1) / num_blocks);
  if (before <= begin && begin < before + own) {
    int tile = first;
    for (int tiles = RowTile(p, tile).num_key_tiles(); begin - before >= tiles;) {
      before += tiles;
      tiles = RowTile(p, ++tile).num_key_tiles();
    }
    shared.first_row_tile = tile;
    shared.first_key_tile = begin - before;
  }
  __syncthreads();
  return {shared.first_row_tile, shared.first_key_tile, next - begin};
}

}  // namespace dsv32::index_logits
