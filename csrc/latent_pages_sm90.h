// Pages of an fp8_ds_mla cache that a step reads, in bfloat16; no CUDA headers, so that operators need none.
#pragma once

#include <cstdint>

namespace dsv32 {

// Pages that are to be decoded, each given a place by the first block that asks for it: see page_places.cuh. All
// zeros before.
struct PagePlaces {
  int32_t* count;          // of places that are given away; more than the capacity are asked for, and no use
  int32_t* place_of_page;  // of all pages of the cache: 1 and up; 0: none yet
  int32_t* page_of_place;  // [capacity]
  int capacity;
  int block_size;
};

struct LatentPagesArguments {
  const uint8_t* cache;      // in fp8_ds_mla
  const int32_t* num_valid;  // [num_groups, 4]
  PagePlaces places;
  uint16_t* latents;    // bfloat16 [capacity, block_size, 576]
  int32_t* num_union;   // [num_groups], of slot_union_sm90.h
  int32_t* num_left;    // [num_groups, 4]
  int64_t page_nbytes;  // of the cache, from page to page, a multiple of 16
  int num_groups;
};

// Decodes them. If there were not enough places, no group is united: all tokens are left as slot_union_sm90.h has it,
// and nothing is decoded. Returns null, or what went wrong.
const char* launch_latent_pages(const LatentPagesArguments& arguments, void* stream);

}  // namespace dsv32
