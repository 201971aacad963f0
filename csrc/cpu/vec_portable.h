#pragma once
// Vec in the 16-byte vector extension of gcc and clang; see vec.h.
#include "halves.h"

namespace {

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

}  // namespace
