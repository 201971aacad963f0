#pragma once
// Vec with AVX-512; see vec.h.
#include <immintrin.h>

#include "halves.h"

namespace {

struct Mask {
  __mmask16 m;
};

struct Vec {
  static constexpr int kSize = 16;
  __m512 v;

  static Vec fill(float value) { return {_mm512_set1_ps(value)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BF16* p) { return widen(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const FP16* p) { return widen(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const int8_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  // Loads 2 * kSize elements, those with an even index and those with an odd one, with half the work of two loads.
  static void load_halves(const BF16* p, Vec& even, Vec& odd) { Vec{_mm512_loadu_ps(p)}.halves<BF16>(even, odd); }
  // The same for a vector whose lanes hold two 16-bit elements.
  template <typename T>
  void halves(Vec& even, Vec& odd) const {
    const __m512i both = _mm512_castps_si512(v);
    if constexpr (std::is_same_v<T, BF16>) {
      even.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      odd.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    } else {
      even.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
      odd.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    }
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BF16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p)); }
  void store(FP16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p)); }

  // Stores past the caches. p must be aligned to the vector.
  void stream(float* p) const { _mm512_stream_ps(p, v); }
  template <typename T>
  void stream(T* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(p));
  }

  // Loads the first n elements, 0 < n < kSize; the others become 0.
  static Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  template <typename T>
  static Vec load(const T* p, int n) {
    return widen(p, _mm256_maskz_loadu_epi16(first(n), p));
  }
  static Vec load(const int8_t* p, int n) { return widen(_mm_maskz_loadu_epi8(first(n), p)); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  template <typename T>
  void store(T* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n), narrow(p));
  }

  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }

 private:
  static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static Vec widen(const BF16*, __m256i half) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }
  static Vec widen(const FP16*, __m256i half) { return {_mm512_cvtph_ps(half)}; }
  static Vec widen(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }
  __m256i narrow(const BF16*) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
  __m256i narrow(const FP16*) const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
};

inline Vec operator+(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}
inline Vec operator-(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}
inline Vec operator*(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}
inline Vec operator/(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}
// a * b + c
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
// c - a * b
inline Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}
// max and min return b if one operand is NaN, in all variants
inline Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}
inline Vec min(Vec a, Vec b) {
  return {_mm512_min_ps(a.v, b.v)};
}
inline Vec abs(Vec a) {
  return {_mm512_abs_ps(a.v)};
}
inline Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Mask operator<(Vec a, Vec b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
// mask ? a : b
inline Vec select(Mask mask, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(mask.m, b.v, a.v)};
}
// lanes 1, 0, 3, 2, ...
inline Vec swap_pairs(Vec a) {
  return {_mm512_permute_ps(a.v, 0b10110001)};
}
// a * 2^n for an integer n
inline Vec scale_by_power_of_2(Vec a, Vec n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}

}  // namespace
