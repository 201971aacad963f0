#pragma once
// The instruction set of the CPU kernels: the best one of this processor, or a lower one named by
// FASTATTN_CPU_CAPABILITY (default, avx2, avx512, avx512bf16). Include this file only in files that are compiled with
// baseline flags.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <string_view>

namespace fastattn {

// avx512bf16 is avx512 with dot products of bfloat16. Only kernels that benefit have this variant.
enum class CpuCapability { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

inline const char* capability_name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kAvx512Bf16:
      return "avx512bf16";
    case CpuCapability::kAvx512:
      return "avx512";
    case CpuCapability::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}

inline CpuCapability best_capability() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;  // some versions of clang do not know __builtin_cpu_supports("f16c")
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) {
    return CpuCapability::kDefault;
  }
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? CpuCapability::kAvx512Bf16 : CpuCapability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return CpuCapability::kAvx2;
  }
#endif
  return CpuCapability::kDefault;
}

inline CpuCapability cpu_capability() {
  const CpuCapability best = best_capability();
  const char* wanted = std::getenv("FASTATTN_CPU_CAPABILITY");
  // Python has checked the word already; here an unknown word means no limit
  for (CpuCapability lower : {CpuCapability::kDefault, CpuCapability::kAvx2, CpuCapability::kAvx512}) {
    if (wanted && capability_name(lower) == std::string_view(wanted) && lower < best) {
      return lower;
    }
  }
  return best;
}

}  // namespace fastattn
