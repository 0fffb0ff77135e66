// The warp that has queries, weights and keys copied to shared memory, works and tiles ahead of those that score.
#pragma once

#include "index_logits_share.cuh"

namespace dsv32::index_logits {

__device__ __forceinline__ Work work_of_run(const RowTile& rows, const Run& run, int first_row, int first_key,
                                            int num_tiles) {
  Work work = {first_row, first_key, num_tiles, {}};
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) {
    work.ends[i] = i >= run.first && i < run.end ? rows.num_keys[i] : 0;
  }
  return work;
}

// Tells the others of it, and has its queries and weights copied.
__device__ __forceinline__ void copy_work(Turn<kWorkStages>& turn, Shared& shared, const Problem& problem,
                                          const Work& work, int lane) {
  const IndexLogitsArguments& p = problem.arguments;
  const int stage = turn.stage;
  uint64_t* full = &shared.work_full[stage];
  mbarrier_wait(&shared.work_free[stage], turn.parity ^ 1);
  turn.next();
  if (lane == 0) {
    shared.works[stage] = work;
  }
  if (work.num_tiles == 0) {
    arrive_for_warp(lane, full);
    return;
  }
  const int weights_nbytes = min(kTileRows, p.num_rows - work.first_row) * static_cast<int>(kHeads * sizeof(float));
  arrive_for_warp_expect(lane, full, kTileRows * kRowNbytes + weights_nbytes);
  if (lane == 0) {
#pragma unroll 1
    for (int row = 0; row < kTileRows; row += kRowsOfBox) {
      copy_box(&shared.queries[stage][row * kRowNbytes], problem.queries, (work.first_row + row) * kHeads, 0, full);
    }
    copy_bulk(shared.weights[stage], p.weights + static_cast<int64_t>(work.first_row) * kHeads, weights_nbytes, full);
  }
}

__device__ __forceinline__ void copy_keys(Turn<kKeyStages>& turn, Shared& shared, const Problem& problem,
                                          int request_id, int first_key, int num_tiles, int lane) {
  const IndexLogitsArguments& p = problem.arguments;
  const int32_t* blocks = p.block_table + request_id * p.block_table_stride;
  const auto block_of_tile = [&](int tile) {
    return load_if(tile < num_tiles, blocks + (first_key + tile * kTileKeys) / p.block_size);
  };
  int next_blocks = block_of_tile(lane);
#pragma unroll 1
  for (int first = 0; first < num_tiles; first += 32) {
    const int own_block = next_blocks;  // of a tile for each lane
    next_blocks = block_of_tile(first + 32 + lane);
#pragma unroll 1
    for (int tile = first; tile < min(first + 32, num_tiles); ++tile, turn.next()) {
      const int block = __shfl_sync(0xffffffffu, own_block, tile - first);
      const int row = (first_key + tile * kTileKeys) % p.block_size;
      uint64_t* full = &shared.keys_full[turn.stage];
      mbarrier_wait(&shared.keys_free[turn.stage], turn.parity ^ 1);
      arrive_for_warp_expect(lane, full, kPanelNbytes + sizeof(shared.scales[0]));
      if (lane == 0) {
        const uint8_t* scales = p.cache + block * p.page_nbytes + p.block_size * kIndexHeadDim + row * sizeof(float);
        copy_box(shared.keys[turn.stage], problem.keys, row, block, full);
        copy_bulk(shared.scales[turn.stage], scales, sizeof(shared.scales[0]), full);
      }
    }
  }
}

__device__ __forceinline__ void copy_share(Shared& shared, const Problem& problem, const Share& share, int lane) {
  Turn<kWorkStages> work_turn;
  Turn<kKeyStages> key_turn;
  int skipped = share.first_key_tile, left = share.num_tiles;
  for (int row_tile = share.first_row_tile; left > 0; ++row_tile) {
    const RowTile rows(problem.arguments, row_tile);
    const int first_row = row_tile * kTileRows;
    for (int first = 0; first < kTileRows && left > 0;) {
      const Run run = rows.run_from(first);
      const int of_run = count_tiles(run.num_keys, kTileKeys);
      const int count = min(of_run - skipped, left);
      if (count > 0) {
        const int first_key = skipped * kTileKeys;
        copy_work(work_turn, shared, problem, work_of_run(rows, run, first_row, first_key, count), lane);
        const int32_t* request_id = problem.arguments.request_ids + first_row + first;
        copy_keys(key_turn, shared, problem, load_if(true, request_id), first_key, count, lane);
        left -= count;
      }
      skipped = max(0, skipped - of_run);
      first = run.end;
    }
  }
  copy_work(work_turn, shared, problem, Work{}, lane);  // no tiles: the end
}

}  // namespace dsv32::index_logits
