#pragma once
// Shared memory as seen by the asynchronous units. PTX ISA: "Proxies", fence.proxy.async.
#include <cstdint>

namespace fastattn::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// An ordinary store to memory that TMA or wgmma will read, or that TMA will overwrite. A fence_async and then a barrier
// must follow.
template <typename Word>
__device__ __forceinline__ void store_for_async(void* pointer, Word word) {
  *static_cast<Word*>(pointer) = word;
}

// Orders the ordinary stores of this thread to shared memory before the accesses that TMA and wgmma make after the next
// barrier.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace fastattn::sm90
