#pragma once
// Matrix products of a warpgroup: D (64 x N, fp32, in registers) += A (64 x 16) * B (16 x N), with 16-bit operands. PTX
// ISA: wgmma.mma_async, .fence, .commit_group, .wait_group.
//
// A product runs asynchronously. From wgmma_begin to the wgmma_wait that covers it, its accumulators and A registers
// must not be accessed, and the shared memory that it reads must not be written.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/sm90/fragment.cuh"

namespace fastattn::sm90 {

// Called before the first product of a group. Orders earlier accesses to its registers.
__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kGroups groups are still running.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// The accumulators as operands %0, %1, ...
#define FASTATTN_TEXT_32                                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_TEXT_40 FASTATTN_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FASTATTN_TEXT_48 \
  FASTATTN_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTATTN_TEXT_56 FASTATTN_TEXT_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FASTATTN_TEXT_64 FASTATTN_TEXT_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_TEXT_88                                                                                        \
  FASTATTN_TEXT_64                                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87"
#define FASTATTN_TEXT_96 FASTATTN_TEXT_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTATTN_TEXT_128                                                                                      \
  FASTATTN_TEXT_96                                                                                             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTATTN_LIST_8(d, i)                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FASTATTN_LIST_16(d, i) FASTATTN_LIST_8(d, i), FASTATTN_LIST_8(d, i + 8)
#define FASTATTN_LIST_32(d, i) FASTATTN_LIST_16(d, i), FASTATTN_LIST_16(d, i + 16)
#define FASTATTN_LIST_40(d, i) FASTATTN_LIST_32(d, i), FASTATTN_LIST_8(d, i + 32)
#define FASTATTN_LIST_48(d, i) FASTATTN_LIST_32(d, i), FASTATTN_LIST_16(d, i + 32)
#define FASTATTN_LIST_56(d, i) FASTATTN_LIST_48(d, i), FASTATTN_LIST_8(d, i + 48)
#define FASTATTN_LIST_64(d, i) FASTATTN_LIST_32(d, i), FASTATTN_LIST_32(d, i + 32)
#define FASTATTN_LIST_88(d, i) FASTATTN_LIST_64(d, i), FASTATTN_LIST_16(d, i + 64), FASTATTN_LIST_8(d, i + 80)
#define FASTATTN_LIST_96(d, i) FASTATTN_LIST_64(d, i), FASTATTN_LIST_32(d, i + 64)
#define FASTATTN_LIST_128(d, i) FASTATTN_LIST_64(d, i), FASTATTN_LIST_64(d, i + 64)

// `accumulate` is a predicate. After it come the signs of A and B, and then the flags of the operands that are
// MN-major.
#define FASTATTN_WGMMA_SS(n, type, count, a, b, accumulate, mn_major)                                     \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #accumulate                         \
               ", 0;\n"                                                                                   \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" FASTATTN_TEXT_##count \
               "}, %" #a ", %" #b ", accumulate, 1, 1, %" #mn_major ", %" #mn_major ";\n}\n"              \
               : FASTATTN_LIST_##count(d, 0)                                                              \
               : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(accumulates)), "n"(kMnMajor))
#define FASTATTN_WGMMA_RS(n, type, count, a0, a1, a2, a3, b)                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" FASTATTN_TEXT_##count \
               "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", 1, 1, 1, 1;\n"                      \
               : FASTATTN_LIST_##count(d, 0)                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc_b))
// Defines both types for N = n. They are used if there are as many accumulators as N needs.
#define FASTATTN_CASE(form, n, count, ...)                  \
  if constexpr (kAccumulators == count) {                   \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {       \
      FASTATTN_WGMMA_##form(n, "bf16", count, __VA_ARGS__); \
    } else {                                                \
      FASTATTN_WGMMA_##form(n, "f16", count, __VA_ARGS__);  \
    }                                                       \
  }

// d = [d +] A * B with both operands in shared memory. Both are K-major (A * Bᵀ of two tiles) or both MN-major (Aᵀ *
// B).
template <typename T, bool kMnMajor = false, int kAccumulators>
__device__ __forceinline__ void wgmma_ss(float (&d)[kAccumulators], uint64_t desc_a, uint64_t desc_b,
                                         bool accumulates) {
  static_assert(kAccumulators == 32 || kAccumulators == 40 || kAccumulators == 48 || kAccumulators == 56 ||
                    kAccumulators == 64 || kAccumulators == 88,
                "N is 64, 80, 96, 112, 128 or 176");
  FASTATTN_CASE(SS, 64, 32, 32, 33, 34, 35)
  FASTATTN_CASE(SS, 80, 40, 40, 41, 42, 43)
  FASTATTN_CASE(SS, 96, 48, 48, 49, 50, 51)
  FASTATTN_CASE(SS, 112, 56, 56, 57, 58, 59)
  FASTATTN_CASE(SS, 128, 64, 64, 65, 66, 67)
  FASTATTN_CASE(SS, 176, 88, 88, 89, 90, 91)
}

// d += A * B with A in registers and B in shared memory. B is MN-major.
template <typename T, int kAccumulators>
__device__ __forceinline__ void wgmma_rs(float (&d)[kAccumulators], const uint32_t (&a)[4], uint64_t desc_b) {
  static_assert(
      kAccumulators == 32 || kAccumulators == 48 || kAccumulators == 64 || kAccumulators == 96 || kAccumulators == 128,
      "N is 64, 96, 128, 192 or 256");
  FASTATTN_CASE(RS, 64, 32, 32, 33, 34, 35, 36)
  FASTATTN_CASE(RS, 96, 48, 48, 49, 50, 51, 52)
  FASTATTN_CASE(RS, 128, 64, 64, 65, 66, 67, 68)
  FASTATTN_CASE(RS, 192, 96, 96, 97, 98, 99, 100)
  FASTATTN_CASE(RS, 256, 128, 128, 129, 130, 131, 132)
}

#undef FASTATTN_TEXT_32
#undef FASTATTN_TEXT_40
#undef FASTATTN_TEXT_48
#undef FASTATTN_TEXT_56
#undef FASTATTN_TEXT_64
#undef FASTATTN_TEXT_88
#undef FASTATTN_TEXT_96
#undef FASTATTN_TEXT_128
#undef FASTATTN_LIST_8
#undef FASTATTN_LIST_16
#undef FASTATTN_LIST_32
#undef FASTATTN_LIST_40
#undef FASTATTN_LIST_48
#undef FASTATTN_LIST_56
#undef FASTATTN_LIST_64
#undef FASTATTN_LIST_88
#undef FASTATTN_LIST_96
#undef FASTATTN_LIST_128
#undef FASTATTN_WGMMA_SS
#undef FASTATTN_WGMMA_RS
#undef FASTATTN_CASE

}  // namespace fastattn::sm90
