#pragma once
// Shared memory seen by the asynchronous units. PTX ISA: "Proxies", fence.proxy.async.
#include <cstdint>

namespace fastattn::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// An ordinary store that TMA or wgmma will read, or whose place TMA will write: a fence_async must follow it, then a
// barrier.
template <typename Word>
__device__ __forceinline__ void store_for_async(void* pointer, Word word) {
  *static_cast<Word*>(pointer) = word;
}

// Orders this thread's ordinary stores to shared memory before what TMA and wgmma do there after the next barrier.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace fastattn::sm90
