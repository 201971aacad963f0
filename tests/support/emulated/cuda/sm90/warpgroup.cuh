#pragma once
// Replaces csrc/cuda/sm90/warpgroup.cuh.
#include <array>

#include "cuda/sm90/shared.cuh"

namespace emulated {

static std::array<int64_t, 2> exponentials;  // alone, and under a product

// bar.sync and bar.arrive count threads: those that wait and those that do not.
struct NamedBarrier {
  int threads = 0;
  unsigned generation = 0;
  std::vector<size_t> arrived;
};
static NamedBarrier named_barriers[16];

inline NamedBarrier& arrive_at(int id, int threads) {
  check_fenced();
  if (id < 1 || id > 15 || threads % 32 != 0) {
    fail("a named barrier is numbered 1 to 15 and taken by whole warps");
  }
  NamedBarrier& barrier = named_barriers[id];
  if (!barrier.arrived.empty() && barrier.threads != threads) {
    fail("a named barrier with two numbers of threads");
  }
  for (const size_t thread : barrier.arrived) {
    if (thread == current) {
      fail("a thread arrives twice at a named barrier that still waits for others");
    }
  }
  barrier.threads = threads;
  barrier.arrived.push_back(current);
  if (static_cast<int>(barrier.arrived.size()) == threads) {
    barrier.arrived.clear();
    ++barrier.generation;
  }
  return barrier;
}

inline void check_answered() {
  for (const NamedBarrier& barrier : named_barriers) {
    if (!barrier.arrived.empty()) {
      current = barrier.arrived[0];
      fail("a block ended with an arrival at a named barrier that nobody waited for");
    }
  }
}
inline const bool barriers_are_checked = (end_of_block.push_back(check_answered), true);

}  // namespace emulated

namespace fastattn::sm90 {

constexpr int kWarpgroup = 128;

template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void give_registers() {
  take_registers<kRegisters>();
}

inline void meet(int id, int threads) {
  emulated::NamedBarrier& barrier = emulated::arrive_at(id, threads);
  const unsigned mine = barrier.arrived.empty() ? barrier.generation - 1 : barrier.generation;
  emulated::wait_until([=, &barrier] { return barrier.generation != mine; });
}
inline void arrive(int id, int threads) {
  emulated::arrive_at(id, threads);
}

inline float exp2_fast(float x) {
  ++emulated::exponentials[emulated::products_in_flight[emulated::current] > 0];
  return std::exp2(x);
}

}  // namespace fastattn::sm90

extern "C" {
// Writes how many exponentials ran alone and how many under a product of their thread, in the order of the source,
// since the last call.
__attribute__((visibility("default"))) void emulated_exponentials(int64_t* found) {
  std::memcpy(found, std::exchange(emulated::exponentials, {}).data(), sizeof(emulated::exponentials));
}
}
