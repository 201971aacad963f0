#pragma once
// Matrix products of a warpgroup: D (64 x N, fp32, in registers) += A (64 x 16) * B (16 x N), 16-bit operands.
// PTX ISA: wgmma.mma_async, .fence, .commit_group, .wait_group.
//
// The products run on after the instruction. From wgmma_begin to the wgmma_wait that covers it, nobody may touch the
// accumulators and A registers of a product, nor write the shared memory it reads.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/sm90/fragment.cuh"

namespace fastattn::sm90 {

// Before the first product of a group: orders earlier accesses to its registers.
__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most so many groups are still running.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// The accumulators as operands %0 to %31 or %63
#define FASTATTN_TEXT_32                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21," \
  " %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_TEXT_64                                                                                            \
  FASTATTN_TEXT_32                                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53," \
  " %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_LIST_8(d, i)                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FASTATTN_LIST_32(d, i) \
  FASTATTN_LIST_8(d, i), FASTATTN_LIST_8(d, i + 8), FASTATTN_LIST_8(d, i + 16), FASTATTN_LIST_8(d, i + 24)
#define FASTATTN_LIST_64(d) FASTATTN_LIST_32(d, 0), FASTATTN_LIST_32(d, 32)

// `accumulate` is a predicate; then come the signs of A and B, and which operands are MN-major
#define FASTATTN_WGMMA_SS(n, type, text, list, a, b, accumulate)                                         \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" accumulate                         \
               ", 0;\n"                                                                                  \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" text "}, %" a ", %" b \
               ", accumulate, 1, 1, 0, 0;\n}\n"                                                          \
               : list                                                                                    \
               : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(accumulates)))
#define FASTATTN_WGMMA_RS(n, type, text, list, a0, a1, a2, a3, b)                                                    \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" text "}, {%" a0 ", %" a1 ", %" a2 \
               ", %" a3 "}, %" b ", 1, 1, 1, 1;\n"                                                                   \
               : list                                                                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b))

// d = [d +] A * Bᵀ with both operands in shared memory, K-major
template <typename T, int kAccumulators>
__device__ __forceinline__ void wgmma_ss(float (&d)[kAccumulators], uint64_t desc_a, uint64_t desc_b,
                                         bool accumulates) {
  static_assert(kAccumulators == 32 || kAccumulators == 64, "N is 64 or 128");
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kAccumulators == 32 && kBFloat16) {
    FASTATTN_WGMMA_SS("64", "bf16", FASTATTN_TEXT_32, FASTATTN_LIST_32(d, 0), "32", "33", "34");
  } else if constexpr (kAccumulators == 32) {
    FASTATTN_WGMMA_SS("64", "f16", FASTATTN_TEXT_32, FASTATTN_LIST_32(d, 0), "32", "33", "34");
  } else if constexpr (kBFloat16) {
    FASTATTN_WGMMA_SS("128", "bf16", FASTATTN_TEXT_64, FASTATTN_LIST_64(d), "64", "65", "66");
  } else {
    FASTATTN_WGMMA_SS("128", "f16", FASTATTN_TEXT_64, FASTATTN_LIST_64(d), "64", "65", "66");
  }
}

// d += A * B with A in registers and B in shared memory, MN-major
template <typename T, int kAccumulators>
__device__ __forceinline__ void wgmma_rs(float (&d)[kAccumulators], const uint32_t (&a)[4], uint64_t desc_b) {
  static_assert(kAccumulators == 32 || kAccumulators == 64, "N is 64 or 128");
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kAccumulators == 32 && kBFloat16) {
    FASTATTN_WGMMA_RS("64", "bf16", FASTATTN_TEXT_32, FASTATTN_LIST_32(d, 0), "32", "33", "34", "35", "36");
  } else if constexpr (kAccumulators == 32) {
    FASTATTN_WGMMA_RS("64", "f16", FASTATTN_TEXT_32, FASTATTN_LIST_32(d, 0), "32", "33", "34", "35", "36");
  } else if constexpr (kBFloat16) {
    FASTATTN_WGMMA_RS("128", "bf16", FASTATTN_TEXT_64, FASTATTN_LIST_64(d), "64", "65", "66", "67", "68");
  } else {
    FASTATTN_WGMMA_RS("128", "f16", FASTATTN_TEXT_64, FASTATTN_LIST_64(d), "64", "65", "66", "67", "68");
  }
}

#undef FASTATTN_TEXT_32
#undef FASTATTN_TEXT_64
#undef FASTATTN_LIST_8
#undef FASTATTN_LIST_32
#undef FASTATTN_LIST_64
#undef FASTATTN_WGMMA_SS
#undef FASTATTN_WGMMA_RS

}  // namespace fastattn::sm90
