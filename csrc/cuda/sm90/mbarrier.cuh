#pragma once
// Barriers in shared memory that count arriving threads and bytes. PTX ISA: mbarrier.init, .arrive, .try_wait,
// fence.mbarrier_init.
//
// The phases of a barrier are 0, 1, 0, and so on. A phase ends when all expected arrivals and bytes have come.
// wait(parity) returns once the phase with that parity has ended. On a new barrier, wait(1) returns at once.
#include "cuda/sm90/shared.cuh"

namespace fastattn::sm90 {

class Barrier {
 public:
  // Called by one thread of the block, which must then call publish() before a __syncthreads().
  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }
  static __device__ __forceinline__ void publish() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // Arrives, and keeps the phase open until TMA has written `bytes` more bytes.
  __device__ __forceinline__ void arrive_expecting(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void wait(int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}\n" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }

 private:
  uint64_t state_;
};

}  // namespace fastattn::sm90
