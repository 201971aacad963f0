#pragma once
// Replaces csrc/cuda/sm90/shared.cuh. A thread that writes for the asynchronous units and reaches a barrier without the
// fence causes an error.
#include "emulate_cuda.h"

namespace emulated {

static bool unfenced[1024];
static size_t products_in_flight[1024];  // of each thread

inline void check_fenced() {
  if (unfenced[current]) {
    fail("shared memory was written for TMA or wgmma, and a barrier reached without fence_async");
  }
}

template <typename T>
T* shared_pointer(uint32_t address) {
  if (address + sizeof(T) > kMostShared) {
    fail("an address outside of shared memory");
  }
  return reinterpret_cast<T*>(dynamic_shared + address);
}

// Swizzle with 128 bytes: bits 4 to 6 of an address are xored with bits 7 to 9; with 64 bytes bits 4 and 5 with 7
// and 8.
inline uint32_t swizzled(uint32_t address, uint32_t width) {
  return address ^ (address >> 7 & (width / 16 - 1)) << 4;
}

}  // namespace emulated

namespace fastattn::sm90 {

inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - emulated::dynamic_shared;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(emulated::kMostShared)) {
    emulated::fail("a pointer outside of shared memory");
  }
  return static_cast<uint32_t>(offset);
}

template <typename Word>
void store_for_async(void* pointer, Word word) {
  std::memcpy(emulated::shared_pointer<Word>(shared_address(pointer)), &word, sizeof(word));
  emulated::unfenced[emulated::current] = true;
}

inline void fence_async() {
  emulated::unfenced[emulated::current] = false;
}

}  // namespace fastattn::sm90
