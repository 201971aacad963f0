#pragma once
// Tiles of the attention kernels: exponentials, masks and packing. Score tiles are stored transposed, with keys as rows
// and queries along the vector lanes. So the softmax needs no horizontal step, and K and V are read in place by
// broadcasts.
#include <cstdlib>

#include "tile_product.h"

namespace {

constexpr int kLanes = 64;  // the queries of a block
constexpr int kKeys = 64;   // the keys of a tile
constexpr int kLaneVecs = kLanes / kVec;
constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;
constexpr float kInf = __builtin_inff();
constexpr float kFloatMax = 3.40282347e38f;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The left or right operand of a product. Its rows, or columns, are `ld` floats apart.
struct Operand {
  const float* data;
  int64_t ld;
};

// The memory of one thread for one call, divided into 64-byte aligned pieces.
class Arena {
 public:
  explicit Arena(int64_t floats) : base_(static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4, 64) + 64))) {}
  ~Arena() { std::free(base_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  float* take(int64_t floats) {
    float* piece = base_ + used_;
    used_ += round_up(floats, 16);
    return piece;
  }
  bool failed() const { return base_ == nullptr; }

 private:
  float* base_;
  int64_t used_ = 0;
};

// 2^x for x up to about 128. The result is 0 below -126.5; NaN stays NaN. The relative error is below 1e-7, or below
// 3e-6 if kShort.
template <bool kShort>
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec n = round(x);
  const Vec f = x - n;
#else
  // The sum is rounded to an integer, whose lowest bits are then the exponent of 2^n. The exponent of 2^-127 gives 0.
  const Vec y = max(Vec::fill(-127.f), x), magic = Vec::fill(0x1.8p23f + 127);
  const Vec shifted = y + magic;
  const Vec f = y - (shifted - magic);
#endif
  Vec p;
  if constexpr (kShort) {
    p = fma(Vec::fill(0.009570102207362652f), f, Vec::fill(0.05591785907745361f));
    p = fma(p, f, Vec::fill(0.240247443318367f));
    p = fma(p, f, Vec::fill(0.6931217908859253f));
    p = fma(p, f, Vec::fill(0.9999992847442627f));
  } else {
    p = fma(Vec::fill(0.0001534581242594868f), f, Vec::fill(0.0013399930903688073f));
    p = fma(p, f, Vec::fill(0.009618489071726799f));
    p = fma(p, f, Vec::fill(0.05550328642129898f));
    p = fma(p, f, Vec::fill(0.24022646248340607f));
    p = fma(p, f, Vec::fill(0.6931471824645996f));
    p = fma(p, f, Vec::fill(1.f));
  }
#if defined(__AVX512F__)
  // The predicate is not (x < -126.5), so that NaN passes. Masked lanes, including -inf, become 0.
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.5f), _CMP_NLT_UQ), p.v, n.v)};
#else
  return p * exponent_from_low_bits(shifted);
#endif
}

// Returns the exponent of 2 for a difference of scores, which is in natural units or times log2(e).
template <bool kNatural>
inline Vec exponent_of_2(Vec difference) {
  return kNatural ? difference * Vec::fill(kLog2e) : difference;
}

inline void zero(float* dst, int64_t floats) {
  std::memset(dst, 0, floats * sizeof(float));
}

// Writes rows of T as fp32, with zeros up to `width`.
template <typename T>
inline void widen_row(float* dst, const T* src, int64_t cols, int64_t width) {
  int64_t c = 0;
  for (; c + kVec <= cols; c += kVec) {
    Vec::load(src + c).store(dst + c);
  }
  if (c < cols) {
    Vec::load(src + c, static_cast<int>(cols - c)).store(dst + c);
    c += kVec;
  }
  for (; c < width; c += kVec) {
    Vec::fill(0.f).store(dst + c);
  }
}

template <typename T>
inline void narrow_row(T* dst, const float* src, int64_t cols) {
  int64_t c = 0;
  for (; c + kVec <= cols; c += kVec) {
    Vec::load(src + c).store(dst + c);
  }
  if (c < cols) {
    Vec::load(src + c).store(dst + c, static_cast<int>(cols - c));
  }
}

// The number of slots in a row of `cols` elements.
template <bool kPairs>
constexpr int64_t slots(int64_t cols) {
  return kPairs ? (cols + 1) / 2 : cols;
}

// A score tile [key][lane] that the diagonal of a causal mask cuts: lane x sees only the keys up to x + diagonal.
// Panels of lanes, the unit of product(), skip the keys that none of their lanes sees.
constexpr int kPanelLanes = kVec == 16 ? 64 : 2 * kVec;

constexpr int64_t clamp(int64_t n, int64_t most) {
  return n < 0 ? 0 : n < most ? n : most;
}

// The number of keys that the panel of lane x sees, and the first lane of the panels that see key r.
constexpr int keys_seen(int64_t x, int64_t diagonal, int keys) {
  return static_cast<int>(clamp(x / kPanelLanes * kPanelLanes + kPanelLanes + diagonal, keys));
}
constexpr int first_lane(int64_t r, int64_t diagonal) {
  return static_cast<int>(clamp((r - diagonal) / kPanelLanes * kPanelLanes, kLanes));
}

// s[key][lane] = left·right over `depth` slots, for the keys that a panel sees.
template <bool kPairs>
void product_into_scores(const float* left, int64_t ld, const float* right, int64_t depth, float* s, int keys, int rows,
                         int64_t diagonal) {
  for (int x = 0; x < rows; x += kPanelLanes) {
    product<kPairs, false>(left, ld, right + x, kLanes, depth, s + x, kLanes, keys_seen(x, diagonal, keys),
                           clamp(rows - x, kPanelLanes), Start::kZero);
  }
}

// c[column][lane] = start + leftᵀ·s, summed over the keys that a panel sees. s is in slots of keys.
template <bool kPairs>
void product_over_keys(const float* left, int64_t ld, const float* s, int keys, float* c, int64_t cols, int rows,
                       int64_t diagonal, Start start, const float* factor = nullptr) {
  for (int x = 0; x < rows; x += kPanelLanes) {
    product<kPairs, true>(left, ld, s + x, kLanes, slots<kPairs>(keys_seen(x, diagonal, keys)), c + x, kLanes, cols,
                          clamp(rows - x, kPanelLanes), start, factor ? factor + x : nullptr);
  }
}

// c[key][column] += s·right, summed over the lanes that see one of the keys. s is in slots of lanes.
template <bool kPairs>
void product_over_lanes(const float* s, int64_t lds, const float* right, int64_t ld, int rows, float* c, int64_t ldc,
                        int keys, int64_t cols, int64_t diagonal) {
  const int step = diagonal >= keys - 1 ? keys : 12;
  for (int r = 0; r < keys; r += step) {
    const int64_t skip = clamp(r - diagonal, rows) / (kPairs ? 2 : 1);
    product<kPairs, false>(s + r * lds + skip, lds, right + skip * ld, ld, slots<kPairs>(rows) - skip, c + r * ldc, ldc,
                           clamp(keys - r, step), cols, Start::kAdd);
  }
}

template <bool kPairs, typename T>
inline void slot_row(float* dst, const T* src, int64_t cols, int64_t width) {
  if constexpr (kPairs) {
    std::memcpy(dst, src, cols * sizeof(T));
    std::memset(reinterpret_cast<T*>(dst) + cols, 0, width * sizeof(float) - cols * sizeof(T));
  } else {
    widen_row(dst, src, cols, width);
  }
}

// Columns of slots: dst[slot][lane] of `rows` rows of T, with zeros in the lanes up to a whole vector. `stage` holds
// kLanes rows of whole vectors.
template <bool kPairs, typename T>
void pack_lanes(float* dst, const T* src, int64_t stride, int64_t rows, int64_t cols, float* stage) {
  const int64_t width = round_up(slots<kPairs>(cols), kVec);
  for (int64_t r = 0; r < rows; ++r) {
    slot_row<kPairs>(stage + r * width, src + r * stride, cols, width);
  }
  zero(stage + rows * width, (round_up(rows, kVec) - rows) * width);
  transpose(dst, kLanes, stage, width, rows, width);
}

// Rows to sum over, as the right operand or the transposed left one: dst[slot][column]. A slot holds one row, or two
// interleaved rows. Rows that `seen` excludes become zeros, because their content, even NaN, must not matter.
template <bool kPairs, typename T>
void pack_depth(float* dst, int64_t ldd, const T* src, int64_t stride, int64_t rows, int64_t cols,
                const uint8_t* seen) {
  if constexpr (kPairs) {
#if defined(__AVX512BF16__)
    for (int64_t r = 0; r < rows; r += 2) {
      const bool low = !seen || seen[r], high = r + 1 < rows && (!seen || seen[r + 1]);
      float* out = dst + r / 2 * ldd;
      for (int64_t c = 0; c < cols; c += 16) {
        const __mmask16 part = cols - c < 16 ? static_cast<__mmask16>((1u << (cols - c)) - 1) : 0xffff;
        const T* at = src + r * stride + c;
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low ? part : 0, at));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high ? part : 0, high ? at + stride : at));
        _mm512_storeu_si512(out + c, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
    }
#endif
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      if (!seen || seen[r]) {
        widen_row(dst + r * ldd, src + r * stride, cols, ldd);
      } else {
        zero(dst + r * ldd, ldd);
      }
    }
  }
}

#if defined(__AVX512BF16__)
inline __m512i round_pairs(Vec low, Vec high) {  // 16 slots of two rows
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleave, both);
}
#endif

}  // namespace
