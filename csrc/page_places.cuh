// Places of pages, given to whoever asks first. Which place a page has differs from run to run; what is read there does
// not.
#pragma once

#include "latent_pages_sm90.h"
#include "ptx.cuh"

namespace dsv32 {

constexpr int kNoPlace = 0;
constexpr int kPlaceComes = -1;

// Of a slot of the cache, the slot that its row has among the places. A page beyond the capacity has one behind them.
__device__ __forceinline__ int32_t placed_slot(const PagePlaces& places, int32_t slot) {
  const unsigned page = static_cast<unsigned>(slot) / static_cast<unsigned>(places.block_size);
  int32_t* const entry = places.place_of_page + page;
  int place = load_cached(entry);  // a place stays what it is; if it is none yet, it is looked for where it is given
  if (place == kNoPlace && atomicCAS(entry, kNoPlace, kPlaceComes) == kNoPlace) {
    place = atomicAdd(places.count, 1) + 1;
    if (place <= places.capacity) {
      places.page_of_place[place - 1] = static_cast<int32_t>(page);
    }
    store_relaxed(entry, place);
  }
  while (place <= 0) {  // whoever gives it away waits for nobody
    place = load_relaxed(entry);
  }
  return (place - 1) * places.block_size + slot % places.block_size;
}

}  // namespace dsv32
