#pragma once
// The interface between the op wrappers (LibTorch stable ABI) and the kernels (no torch header at all):
// plain structs and raw pointers in, an error code out.
#include <cstdint>

namespace fastattn {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// Declares one CPU kernel for every instruction set: rows, tiles or chunks [begin, end) on the calling thread.
#define FASTATTN_DECLARE_CPU(name, Args)                             \
  void name##_default(const Args& args, int64_t begin, int64_t end); \
  void name##_avx2(const Args& args, int64_t begin, int64_t end);    \
  void name##_avx512(const Args& args, int64_t begin, int64_t end)

// Dropout: a kept element is multiplied by scale; the halfword of an element is compared with threshold. rng points to
// (seed, offset) on the device of the op; nullptr: no dropout; else threshold > 0.
struct Dropout {
  const int64_t* rng;
  uint32_t threshold;
  float scale;
};

}  // namespace fastattn
