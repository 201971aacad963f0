#pragma once
// Replaces csrc/cuda/sm90/warpgroup.cuh.
#include "cuda/sm90/shared.cuh"

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
  static int arrived[16];
  static unsigned generation[16];
  emulated::check_fenced();
  if (id < 1 || id > 15 || threads % 32 != 0) {
    emulated::fail("a named barrier is numbered 1 to 15 and taken by whole warps");
  }
  const unsigned mine = generation[id];
  if (++arrived[id] == threads) {
    arrived[id] = 0;
    ++generation[id];
  }
  emulated::wait_until([=] { return generation[id] != mine; });
}

inline float exp2_fast(float x) {
  return std::exp2(x);
}

}  // namespace fastattn::sm90
