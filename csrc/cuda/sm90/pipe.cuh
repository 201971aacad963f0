#pragma once
// A ring of stages in shared memory between one warp that fills them and warpgroups that read them.
#include "cuda/sm90/mbarrier.cuh"

namespace fastattn::sm90 {

constexpr int kWarps = 4;  // of a warpgroup

// One thread of every warp arrives once all its lanes are here.
__device__ __forceinline__ void arrive_warp(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    barrier.arrive();
  }
}

// Where one side stands: the stage that comes next, and the parity of the phase in which it is filled
template <int kStages>
struct Ring {
  int stage = 0;
  int parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int kStages>
struct Pipe {
  Barrier full[kStages], empty[kStages];

  __device__ __forceinline__ void init(int warpgroups) {
    for (int stage = 0; stage < kStages; ++stage) {
      full[stage].init(1);
      empty[stage].init(warpgroups * kWarps);
    }
  }
  // The warp that fills: until the stage may be overwritten, at once in the first round. Its lanes go on together: one
  // that is a round behind would wait for a parity that has come and gone.
  __device__ __forceinline__ void wait_empty(const Ring<kStages>& at) {
    empty[at.stage].wait(at.parity ^ 1);
    __syncwarp();
  }
  // The sides that read
  __device__ __forceinline__ void wait_full(const Ring<kStages>& at) { full[at.stage].wait(at.parity); }
  __device__ __forceinline__ void release(int stage) { arrive_warp(empty[stage]); }
};

}  // namespace fastattn::sm90
