// Threads of a cluster of blocks as coroutines of one thread of the CPU, taken up in a random order of warps.
//
// What a kernel waits for (barriers, other lanes, copies in the background) it waits for here. Copies take place at
// random times before they must. Where nothing can go on, the process ends with a message.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

namespace emulator {

struct Rendezvous {
  int count = 0;
  long generation = 0;
};

struct Lane {
  uint64_t words[4];
};

struct Warp {
  Rendezvous meeting;
  Lane lanes[2][32];
};

struct Block {
  int rank;
  std::vector<Warp> warps;
  std::map<int, Rendezvous> barriers;
  uint8_t* memory;
  size_t nbytes;
  std::vector<uint8_t> seen_by_products;  // of shared memory; what was written since, a fence makes visible
  std::vector<uint32_t> unfenced;         // chunks that other blocks, or copies, have written
  int num_done = 0;

  void show_to_products(uint32_t chunk) { std::memcpy(seen_by_products.data() + chunk, memory + chunk, 16); }
};

// Chunks that a thread copies, in groups.
struct Chunks {
  long num_started = 0;
  long num_done = 0;
  std::deque<long> groups;  // started up to their end
};

// Products of a warpgroup that are not known to be done, as one thread has them.
struct Products {
  struct Sums {
    std::vector<float> values;
    int num_pending = 0;
  };
  std::map<const float*, Sums> sums;
  long num_started = 0;
  long num_done = 0;
  std::deque<long> groups;  // started up to their end
  bool is_fenced = false;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  int index;
  bool done = false;
  std::function<bool()> ready;  // while it waits
  std::deque<std::function<void()>> background;
  std::vector<uint32_t> unfenced;  // chunks of shared memory that it has written
  Chunks chunks;
  Products products;
};

inline std::vector<Thread> threads;
inline std::vector<std::unique_ptr<Block>> blocks;
inline Rendezvous cluster;
inline Thread* current;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::mt19937 random_numbers;

inline void wait_until(std::function<bool()> ready) {
  if (!ready()) {
    current->ready = std::move(ready);
    swapcontext(&current->context, &scheduler);
  }
}

// Lets others go on first.
inline void give_way() {
  current->ready = [] { return true; };
  swapcontext(&current->context, &scheduler);
}

inline void meet(Rendezvous& meeting, int count) {
  const long generation = meeting.generation;
  if (++meeting.count == count) {
    meeting.count = 0;
    ++meeting.generation;
    return;
  }
  wait_until([&meeting, generation] { return meeting.generation != generation; });
}

// Every lane's words, once all lanes have given theirs.
inline const Lane* exchange(const Lane& own) {
  Warp& warp = current->block->warps[current->index / 32];
  Lane* lanes = warp.lanes[warp.meeting.generation % 2];
  lanes[current->index % 32] = own;
  meet(warp.meeting, 32);
  return lanes;
}

inline void start() {
  body();
  current->done = true;
  ++current->block->num_done;
  swapcontext(&current->context, &scheduler);
}

inline void run_cluster(int num_blocks, int num_threads, size_t nbytes, std::function<void()> kernel) {
  constexpr size_t kStack = 64 << 10;
  body = std::move(kernel);
  threads.clear();
  blocks.clear();
  cluster = {};
  threads.resize(static_cast<size_t>(num_blocks) * num_threads);
  for (int b = 0; b < num_blocks; ++b) {
    auto block = std::make_unique<Block>();
    block->rank = b;
    block->warps.resize(num_threads / 32);
    block->nbytes = nbytes;
    block->memory = static_cast<uint8_t*>(std::aligned_alloc(1024, (nbytes + 1023) / 1024 * 1024));
    std::memset(block->memory, 0xff, nbytes);  // NaN as any type
    block->seen_by_products.assign(nbytes, 0xff);
    for (int t = 0; t < num_threads; ++t) {
      Thread& thread = threads[b * num_threads + t];
      thread.block = block.get();
      thread.index = t;
      thread.stack = std::make_unique<char[]>(kStack);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, start, 0);
    }
    blocks.push_back(std::move(block));
  }
  const size_t num_warps = threads.size() / 32;
  constexpr int kPatience = 1000;  // rounds
  // Chances in 16 to be passed over. Some warps are slow, so that others run far ahead of them where they may.
  std::vector<unsigned> pause(num_warps);
  std::vector<unsigned> linger(num_warps);  // what is done in the background
  for (size_t warp = 0; warp < num_warps; ++warp) {
    pause[warp] = random_numbers() % 4 ? 2 : 15;
    linger[warp] = random_numbers() % 2 ? 5 : 15;
  }
  int num_rounds_without = 0;
  for (;;) {
    bool progress = false;
    const size_t first = random_numbers() % num_warps;
    for (size_t i = 0; i < num_warps; ++i) {
      const size_t warp = (first + i) % num_warps;
      if (random_numbers() % 16 < pause[warp]) {
        continue;  // not now
      }
      for (size_t t = warp * 32; t < (warp + 1) * 32; ++t) {
        Thread& thread = threads[t];
        while (!thread.background.empty() && random_numbers() % 16 >= linger[warp]) {
          thread.background.front()();
          thread.background.pop_front();
          progress = true;
        }
        progress = progress || !thread.background.empty();
        if (thread.done || (thread.ready && !thread.ready())) {
          continue;
        }
        if (random_numbers() % 8 == 0) {  // lanes do not run in step
          progress = true;
          continue;
        }
        thread.ready = nullptr;
        current = &thread;
        swapcontext(&scheduler, &thread.context);
        progress = true;
      }
    }
    if (std::all_of(threads.begin(), threads.end(), [](const Thread& thread) {
          return thread.done && thread.background.empty();
        })) {
      break;
    }
    num_rounds_without = progress ? 0 : num_rounds_without + 1;
    if (num_rounds_without == kPatience) {
      std::fprintf(stderr, "the kernel hangs\n");
      std::abort();
    }
  }
  for (auto& block : blocks) {
    std::free(block->memory);
  }
}

}  // namespace emulator
