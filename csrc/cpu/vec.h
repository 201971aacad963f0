#pragma once
// One vector of floats in the widest registers that the compiler flags allow: AVX-512, AVX2, or otherwise 16 bytes in
// the portable vector extension of gcc and clang (SSE2, NEON). at::vec is not used: it is not part of the stable ABI,
// and translation units with different flags would share its inline functions. Here everything has internal linkage.
//
// Storage types: float, BF16, FP16, and int8 for loads. Loads widen to fp32. Stores round to nearest even and keep NaN.
#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif
#undef FASTATTN_PARTIAL

namespace {

// Must follow the last stream() of a thread.
inline void end_of_streams() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

inline Vec operator-(Vec a) {
  return Vec::fill(-0.f) - a;
}

// e^x = 2^n * e^f with n = round(x / ln 2) and |f| <= ln 2 / 2. The relative error is below 1e-7. The result is 0 below
// -104 and inf above 88.8.
inline Vec exp(Vec x) {
  x = min(Vec::fill(88.8f), max(Vec::fill(-104.5f), x));  // if x is NaN, the result is the second operand
  const Vec n = round(x * Vec::fill(1.44269504f));
  Vec f = fnma(n, Vec::fill(0.693359375f), x);
  f = fnma(n, Vec::fill(-2.12194440e-4f), f);
  Vec p = Vec::fill(1.9875691500e-4f);
  p = fma(p, f, Vec::fill(1.3981999507e-3f));
  p = fma(p, f, Vec::fill(8.3334519073e-3f));
  p = fma(p, f, Vec::fill(4.1665795894e-2f));
  p = fma(p, f, Vec::fill(1.6666665459e-1f));
  p = fma(p, f, Vec::fill(5.0000001201e-1f));
  p = fma(p, f * f, f + Vec::fill(1.f));
  return scale_by_power_of_2(p, n);
}

inline Vec tanh(Vec x) {
  const Vec e = exp(abs(x) * Vec::fill(-2.f));
  Vec large = (Vec::fill(1.f) - e) / (Vec::fill(1.f) + e);
  large = select(x < Vec::fill(0.f), -large, large);
  const Vec s = x * x;  // Taylor series: 1 - e would lose digits
  Vec p = fma(Vec::fill(21844.f / 6081075), s, Vec::fill(-1382.f / 155925));
  p = fma(p, s, Vec::fill(62.f / 2835));
  p = fma(p, s, Vec::fill(-17.f / 315));
  p = fma(p, s, Vec::fill(2.f / 15));
  p = fma(p, s, Vec::fill(-1.f / 3));
  return select(abs(x) < Vec::fill(0.3f), fma(p * s, x, x), large);
}

// term(begin) + ... + term(end - 1). The two halves are summed separately and then added, so the rounding error grows
// with the logarithm of the number of terms. Up to 64 terms are added in order.
template <typename Term>
Vec pairwise_sum(int64_t begin, int64_t end, const Term& term) {
  if (end - begin > 64) {
    const int64_t middle = begin + (end - begin) / 2;
    return pairwise_sum(begin, middle, term) + pairwise_sum(middle, end, term);
  }
  Vec total = Vec::fill(0.f);
  for (int64_t i = begin; i < end; ++i) {
    total = total + term(i);
  }
  return total;
}

}  // namespace

// The name of this file's variant of `name`: name_default, name_avx2 or name_avx512.
#define FASTATTN_CONCAT_(a, b) a##_##b
#define FASTATTN_CONCAT(a, b) FASTATTN_CONCAT_(a, b)
#define FASTATTN_CPU_NAME(name) FASTATTN_CONCAT(name, CPU_CAPABILITY)
