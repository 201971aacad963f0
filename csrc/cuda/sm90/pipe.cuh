#pragma once
// A ring of stages in shared memory between one warp that fills them and warpgroups that read them.
#include "cuda/sm90/mbarrier.cuh"

namespace fastattn::sm90 {

constexpr int kWarps = 4;  // the warps of a warpgroup

// One thread of every warp arrives once all lanes of the warp are here.
__device__ __forceinline__ void arrive_warp(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    barrier.arrive();
  }
}

// The position of one side: the next stage, and the parity of the phase in which it is filled.
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
  // Called by the warp that fills. Waits until the stage may be overwritten, which is immediate in the first round. All
  // lanes continue together: a lane that is one round behind would wait for a parity that has already passed.
  __device__ __forceinline__ void wait_empty(const Ring<kStages>& at) {
    empty[at.stage].wait(at.parity ^ 1);
    __syncwarp();
  }
  // Called by the readers. Waits until the stage is full.
  __device__ __forceinline__ void wait_full(const Ring<kStages>& at) { full[at.stage].wait(at.parity); }
  __device__ __forceinline__ void release(int stage) { arrive_warp(empty[stage]); }
};

}  // namespace fastattn::sm90
