#pragma once
// The instruction set of the CPU kernels: the best one of this processor, or a lower one named by
// FASTATTN_CPU_CAPABILITY (default, avx2, avx512, avx512bf16, amx). Include this file only in files that are compiled
// with baseline flags.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <string_view>

namespace fastattn {

// Each set contains those before it. avx512bf16 adds dot products of bfloat16 to avx512, and amx adds tiles of
// bfloat16. Only kernels that benefit have these two variants.
enum class CpuCapability { kDefault, kAvx2, kAvx512, kAvx512Bf16, kAmx };

inline const char* capability_name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kAmx:
      return "amx";
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

// True if the processor has AMX for bfloat16 and the system lets this process use it.
inline bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

inline CpuCapability best_capability() {
#if defined(__x86_64__)
  // Not __builtin_cpu_supports("f16c"), because some versions of clang do not know that name.
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) {
    return CpuCapability::kDefault;
  }
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    if (!__builtin_cpu_supports("avx512bf16")) {
      return CpuCapability::kAvx512;
    }
    return may_use_tiles() ? CpuCapability::kAmx : CpuCapability::kAvx512Bf16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return CpuCapability::kAvx2;
  }
#endif
  return CpuCapability::kDefault;
}

// Returns the instruction set to use. In a virtual machine, each CPUID instruction takes microseconds, so callers store
// the result.
inline CpuCapability cpu_capability() {
  const CpuCapability best = best_capability();
  const char* wanted = std::getenv("FASTATTN_CPU_CAPABILITY");
  // Python has already checked the name. Here an unknown name means that there is no limit.
  for (CpuCapability lower :
       {CpuCapability::kDefault, CpuCapability::kAvx2, CpuCapability::kAvx512, CpuCapability::kAvx512Bf16}) {
    if (wanted && capability_name(lower) == std::string_view(wanted) && lower < best) {
      return lower;
    }
  }
  return best;
}

inline bool has_dots() {
  static const bool found = cpu_capability() >= CpuCapability::kAvx512Bf16;
  return found;
}

inline bool has_tiles() {
  static const bool found = cpu_capability() == CpuCapability::kAmx;
  return found;
}

}  // namespace fastattn
