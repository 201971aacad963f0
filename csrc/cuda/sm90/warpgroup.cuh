#pragma once
// Operations of warps and warpgroups in a kernel with roles: redistribution of registers, barriers, powers of two.
// PTX ISA: setmaxnreg, bar.sync, bar.arrive, ex2.
#include <cstdint>

namespace fastattn::sm90 {

constexpr int kWarpgroup = 128;  // threads

// Called by all warps of a warpgroup. The kernel must be compiled with __launch_bounds__(threads, 1).
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Waits at barrier `id`, 1 to 15; 0 is the barrier of __syncthreads.
__device__ __forceinline__ void meet(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Arrives at barrier `id` without waiting. `threads` counts those that arrive and those that wait.
__device__ __forceinline__ void arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 2^x with an error of about 2 units in the last place; 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fastattn::sm90
