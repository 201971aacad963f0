#pragma once
// Selects the variant of a CPU kernel to run. Only wrapper files include this; they are compiled with baseline flags.
#include "capability.h"

// Returns the pointer to the variant of `name` for the instruction set in use. It is looked up once.
#if defined(__x86_64__)
#define FASTATTN_SELECT_CPU(name)                  \
  ([] {                                            \
    static const auto fn = [] {                    \
      switch (fastattn::cpu_capability()) {        \
        case fastattn::CpuCapability::kAmx:        \
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

// The same for kernels that have a separate variant for bfloat16.
#if defined(__x86_64__)
#define FASTATTN_SELECT_CPU_BF16(name, dtype)                                                       \
  ([](fastattn::DType type) {                                                                       \
    return fastattn::has_dots() && type == fastattn::DType::kBFloat16 ? fastattn::name##_avx512bf16 \
                                                                      : FASTATTN_SELECT_CPU(name);  \
  }(dtype))
#else
#define FASTATTN_SELECT_CPU_BF16(name, dtype) FASTATTN_SELECT_CPU(name)
#endif

// The same for kernels that also have a variant for the tiles of AMX.
#if defined(__x86_64__)
#define FASTATTN_SELECT_CPU_TILES(name, dtype)                                         \
  (dtype == fastattn::DType::kBFloat16 && fastattn::has_tiles() ? fastattn::name##_amx \
                                                                : FASTATTN_SELECT_CPU_BF16(name, dtype))
#else
#define FASTATTN_SELECT_CPU_TILES(name, dtype) FASTATTN_SELECT_CPU(name)
#endif
