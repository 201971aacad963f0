#pragma once
// Which variant of a CPU kernel runs. Included by wrapper files only, which are compiled with baseline flags.
#include "capability.h"

// The pointer to `name` for the instruction set in use, found once.
#if defined(__x86_64__)
#define FASTATTN_SELECT_CPU(name)                  \
  ([] {                                            \
    static const auto fn = [] {                    \
      switch (fastattn::cpu_capability()) {        \
        case fastattn::CpuCapability::kAvx512Bf16: \
        case fastattn::CpuCapability::kAvx512:     \
          return fastattn::name##_avx512;          \
        case fastattn::CpuCapability::kAvx2:       \
          return fastattn::name##_avx2;            \
        default:                                   \
          return fastattn::name##_default;         \
      }                                            \
    }();                                           \
    return fn;                                     \
  }())
#else
#define FASTATTN_SELECT_CPU(name) (fastattn::name##_default)
#endif
