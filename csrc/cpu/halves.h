#pragma once
// The 16-bit storage types: their conversions, one number at a time, and a macro that accesses the first elements of a
// vector. Everything has internal linkage, as in vec.h.
#include <cstdint>
#include <cstring>
#include <type_traits>

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
  // The exponent biases differ by 112. The product also normalises subnormals.
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

}  // namespace

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
