#pragma once
// One vector of floats in the widest registers the compiler flags allow: AVX-512, AVX2, else 16 bytes in the portable
// vector extension of gcc and clang (SSE2, NEON). at::vec is not part of the stable ABI, and its inline functions would
// be shared between translation units of different flags; here everything has internal linkage.
//
// Storage types: float, BF16, FP16, and int8 for loads. Loads widen to fp32, stores round to nearest even and keep NaN.
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(float value) {
  return value;
}
inline float to_float(BF16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
inline float to_float(FP16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // inf or NaN
    return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  }
  // the exponent bias differs by 112; the product also normalises subnormals
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline BF16 from_float<BF16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  }
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline FP16 from_float<FP16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return {static_cast<uint16_t>(sign | 0x7e00)};
  }
  if (magnitude >= 0x477ff000) {  // rounds to more than 65504
    return {static_cast<uint16_t>(sign | 0x7c00)};
  }
  if (magnitude < 0x38800000) {  // subnormal: an addition rounds to units of 2^-24
    const uint32_t rounded = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  return {static_cast<uint16_t>(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13))};
}

#if defined(__AVX512F__)

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
  // 2 * kSize elements in half the work of two loads: those with an even index, and those with an odd one
  static void load_halves(const BF16* p, Vec& even, Vec& odd) { Vec{_mm512_loadu_ps(p)}.halves<BF16>(even, odd); }
  // the same for lanes that hold two elements of 16 bits
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
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}  // a * b + c
inline Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}  // c - a * b
inline Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}  // b if one is NaN, in all variants
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
inline Vec select(Mask mask, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(mask.m, b.v, a.v)};
}  // mask ? a : b
// lanes 1, 0, 3, 2, ...
inline Vec swap_pairs(Vec a) {
  return {_mm512_permute_ps(a.v, 0b10110001)};
}
// a * 2^n for an integer n
inline Vec scale_by_power_of_2(Vec a, Vec n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}

#else

// Accesses the first n elements through a buffer, for instruction sets without masked 16-bit moves.
#define FASTATTN_PARTIAL                  \
  template <typename T>                   \
  static Vec load(const T* p, int n) {    \
    T lanes[kSize] = {};                  \
    std::memcpy(lanes, p, n * sizeof(T)); \
    return load(lanes);                   \
  }                                       \
  template <typename T>                   \
  void store(T* p, int n) const {         \
    T lanes[kSize];                       \
    store(lanes);                         \
    std::memcpy(p, lanes, n * sizeof(T)); \
  }

#if defined(__AVX2__)

struct Mask {
  __m256 m;
};

struct Vec {
  static constexpr int kSize = 8;
  __m256 v;

  static Vec fill(float value) { return {_mm256_set1_ps(value)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BF16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
  }
  static Vec load(const FP16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static void load_halves(const BF16* p, Vec& even, Vec& odd) {
    Vec{_mm256_loadu_ps(reinterpret_cast<const float*>(p))}.halves<BF16>(even, odd);
  }
  template <typename T>
  void halves(Vec& even, Vec& odd) const {
    const __m256i both = _mm256_castps_si256(v);
    if constexpr (std::is_same_v<T, BF16>) {
      even.v = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      odd.v = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    } else {
      const __m256i low = _mm256_and_si256(both, _mm256_set1_epi32(0xffff)), high = _mm256_srli_epi32(both, 16);
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0b11011000);
      even.v = _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
      odd.v = _mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1));
    }
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BF16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i chosen =
        _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b1000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(FP16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  void stream(float* p) const { _mm256_stream_ps(p, v); }
  template <typename T>
  void stream(T* p) const {
    alignas(16) T lanes[kSize];
    store(lanes);
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
  }
  FASTATTN_PARTIAL

  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
};

inline Vec operator+(Vec a, Vec b) {
  return {_mm256_add_ps(a.v, b.v)};
}
inline Vec operator-(Vec a, Vec b) {
  return {_mm256_sub_ps(a.v, b.v)};
}
inline Vec operator*(Vec a, Vec b) {
  return {_mm256_mul_ps(a.v, b.v)};
}
inline Vec operator/(Vec a, Vec b) {
  return {_mm256_div_ps(a.v, b.v)};
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
inline Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm256_fnmadd_ps(a.v, b.v, c.v)};
}
inline Vec max(Vec a, Vec b) {
  return {_mm256_max_ps(a.v, b.v)};
}
inline Vec min(Vec a, Vec b) {
  return {_mm256_min_ps(a.v, b.v)};
}
inline Vec abs(Vec a) {
  return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)};
}
inline Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Mask operator<(Vec a, Vec b) {
  return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)};
}
inline Vec select(Mask mask, Vec a, Vec b) {
  return {_mm256_blendv_ps(b.v, a.v, mask.m)};
}
inline Vec swap_pairs(Vec a) {
  return {_mm256_permute_ps(a.v, 0b10110001)};
}
// a * 2^n in two steps, so that results can be subnormal: |n| <= 252
inline Vec scale_by_power_of_2(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
}
// The float whose sign and exponent are the lowest nine bits of a.
inline Vec exponent_from_low_bits(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}

#else

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Mask {
  Int4 m;
};

struct Vec {
  static constexpr int kSize = 4;
  Float4 v;

  static Vec fill(float value) { return {Float4{value, value, value, value}}; }
  template <typename T>
  static Vec load(const T* p) {
    return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  static void load_halves(const BF16* p, Vec& even, Vec& odd) {
    even.v = Float4{to_float(p[0]), to_float(p[2]), to_float(p[4]), to_float(p[6])};
    odd.v = Float4{to_float(p[1]), to_float(p[3]), to_float(p[5]), to_float(p[7])};
  }
  template <typename T>
  void halves(Vec& even, Vec& odd) const {
    T lanes[2 * kSize];
    std::memcpy(lanes, &v, sizeof(v));
    for (int i = 0; i < kSize; ++i) {
      even.v[i] = to_float(lanes[2 * i]);
      odd.v[i] = to_float(lanes[2 * i + 1]);
    }
  }
  template <typename T>
  void store(T* p) const {
    for (int i = 0; i < kSize; ++i) {
      p[i] = from_float<T>(v[i]);
    }
  }
  template <typename T>
  void stream(T* p) const {
    store(p);
  }
  FASTATTN_PARTIAL

  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  float max() const {
    const float a = v[0] > v[2] ? v[0] : v[2];
    const float b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
  }
};

inline Vec operator+(Vec a, Vec b) {
  return {a.v + b.v};
}
inline Vec operator-(Vec a, Vec b) {
  return {a.v - b.v};
}
inline Vec operator*(Vec a, Vec b) {
  return {a.v * b.v};
}
inline Vec operator/(Vec a, Vec b) {
  return {a.v / b.v};
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return {a.v * b.v + c.v};
}
inline Vec fnma(Vec a, Vec b, Vec c) {
  return {c.v - a.v * b.v};
}
inline Vec max(Vec a, Vec b) {
  return {a.v > b.v ? a.v : b.v};
}
inline Vec min(Vec a, Vec b) {
  return {a.v < b.v ? a.v : b.v};
}
inline Vec abs(Vec a) {
  return {reinterpret_cast<Float4>(reinterpret_cast<Int4>(a.v) & 0x7fffffff)};
}
inline Vec round(Vec a) {  // |a| < 2^22
  const Float4 magic = Vec::fill(0x1.8p23f).v;
  return {(a.v + magic) - magic};
}
inline Mask operator<(Vec a, Vec b) {
  return {a.v < b.v};
}
inline Vec select(Mask mask, Vec a, Vec b) {
  return {mask.m ? a.v : b.v};
}
inline Vec swap_pairs(Vec a) {
  return {Float4{a.v[1], a.v[0], a.v[3], a.v[2]}};
}
inline Vec scale_by_power_of_2(Vec a, Vec n) {
  const Int4 whole = __builtin_convertvector(n.v, Int4);
  const Int4 half = whole >> 1;
  return {a.v * reinterpret_cast<Float4>((half + 127) << 23) * reinterpret_cast<Float4>((whole - half + 127) << 23)};
}
inline Vec exponent_from_low_bits(Vec a) {
  return {reinterpret_cast<Float4>(reinterpret_cast<Int4>(a.v) << 23)};
}

#endif
#undef FASTATTN_PARTIAL
#endif

// Must follow the last stream() of a thread.
inline void end_of_streams() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

inline Vec operator-(Vec a) {
  return Vec::fill(-0.f) - a;
}

// e^x = 2^n * e^f with n = round(x / ln 2) and |f| <= ln 2 / 2. The relative error is below 1e-7. 0 below -104, inf
// above 88.8.
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

// term(begin) + ... + term(end - 1). Halves are added to each other, so that the rounding error grows with the
// logarithm of the number of terms; up to 64 terms are added in order.
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
