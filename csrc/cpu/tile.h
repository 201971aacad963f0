#pragma once
// Tiles of the attention kernels and of gemm.cpp: a register-blocked product, transposes and packing. Score tiles are
// stored transposed, with keys as rows and queries along the vector lanes: the softmax then needs no horizontal step,
// and K and V are read in place by broadcasts.
//
// A slot is 32 bits of an operand: one float, or, with kPairs, two bf16 that follow each other along the summed
// dimension. One dot-product instruction multiplies these and adds in fp32.
#include <cstdlib>

#include "vec.h"

namespace {

constexpr int kLanes = 64;  // queries of a block
constexpr int kKeys = 64;   // keys of a tile
constexpr int kVec = Vec::kSize;
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

template <bool kPairs>
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
#endif
  static_assert(!kPairs || kVec == 16);
  return fma(a, b, c);
}

// acc[r][x] += sum_k a(r, k) * b[k][x] for R rows and C vectors of columns, in the order of k. a(r, k) is a[r * lda +
// k], or a[k * lda + r] if kTransposed.
template <bool kPairs, bool kTransposed, int R, int C>
[[gnu::always_inline]] inline void accumulate(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                                              Vec (&acc)[R][C]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[C];
#pragma GCC unroll 4
    for (int x = 0; x < C; ++x) {
      row[x] = Vec::load(b + k * ldb + x * kVec);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec value = Vec::fill(kTransposed ? a[k * lda + r] : a[r * lda + k]);
#pragma GCC unroll 4
      for (int x = 0; x < C; ++x) {
        acc[r][x] = multiply_add<kPairs>(value, row[x], acc[r][x]);
      }
    }
  }
}

enum class Start { kZero, kAdd, kScale };  // the initial value of a product: 0, c, or c * factor[column]

// c[r][x] = start + sum_k a(r, k) * b[k][x], with a(r, k) as in accumulate().
template <bool kPairs, bool kTransposed, int R, int C>
inline void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                          int64_t ldc, Start start, const float* factor) {
  Vec acc[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int x = 0; x < C; ++x) {
      acc[r][x] = start == Start::kZero ? Vec::fill(0.f) : Vec::load(c + r * ldc + x * kVec);
    }
  }
  if (start == Start::kScale) {
#pragma GCC unroll 4
    for (int x = 0; x < C; ++x) {
      const Vec f = Vec::load(factor + x * kVec);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        acc[r][x] = acc[r][x] * f;
      }
    }
  }
  accumulate<kPairs, kTransposed>(a, lda, b, ldb, depth, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int x = 0; x < C; ++x) {
      acc[r][x].store(c + r * ldc + x * kVec);
    }
  }
}

template <bool kPairs, bool kTransposed, int R, int C>
inline int64_t product_rows(int64_t r, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                            float* c, int64_t ldc, int64_t rows, Start start, const float* factor) {
  for (; r + R <= rows; r += R) {
    product_block<kPairs, kTransposed, R, C>(a + (kTransposed ? r : r * lda), lda, b, ldb, depth, c + r * ldc, ldc,
                                             start, factor);
  }
  return r;
}

template <bool kPairs, bool kTransposed, int R, int C>
void product_panel(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                   int64_t rows, Start start, const float* factor) {
  int64_t r = product_rows<kPairs, kTransposed, R, C>(0, a, lda, b, ldb, depth, c, ldc, rows, start, factor);
  r = product_rows<kPairs, kTransposed, 4, C>(r, a, lda, b, ldb, depth, c, ldc, rows, start, factor);
  r = product_rows<kPairs, kTransposed, 2, C>(r, a, lda, b, ldb, depth, c, ldc, rows, start, factor);
  product_rows<kPairs, kTransposed, 1, C>(r, a, lda, b, ldb, depth, c, ldc, rows, start, factor);
}

// 2^x for x up to about 128. The result is 0 below -126.5; NaN stays NaN. The relative error is below 1e-7, or 3e-6 if
// kShort.
template <bool kShort>
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec n = round(x);
  const Vec f = x - n;
#else
  // the sum is rounded to an integer, whose lowest bits are then the exponent of 2^n; that of 2^-127 gives 0
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
  // not (x < -126.5), so that NaN passes; masked lanes, including -inf, become 0
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.5f), _CMP_NLT_UQ), p.v, n.v)};
#else
  return p * exponent_from_low_bits(shifted);
#endif
}

// The exponent of 2 for a difference of scores, in natural units or times log2(e).
template <bool kNatural>
inline Vec exponent_of_2(Vec difference) {
  return kNatural ? difference * Vec::fill(kLog2e) : difference;
}

// t[c][r] = t[r][c], in registers
[[gnu::always_inline]] inline void transpose_square(Vec (&t)[kVec]) {
#if defined(__AVX512F__)
  Vec u[16];
  for (int r = 0; r < 16; r += 2) {
    u[r].v = _mm512_unpacklo_ps(t[r].v, t[r + 1].v);
    u[r + 1].v = _mm512_unpackhi_ps(t[r].v, t[r + 1].v);
  }
  for (int r = 0; r < 16; r += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d a = _mm512_castps_pd(u[r + half].v), b = _mm512_castps_pd(u[r + half + 2].v);
      t[r + 2 * half].v = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      t[r + 2 * half + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int c = 0; c < 4; ++c) {  // t[4 * g + c]: column 4 * lane + c of rows 4 * g .. 4 * g + 3
    const __m512 a = _mm512_shuffle_f32x4(t[c].v, t[4 + c].v, 0x88), b = _mm512_shuffle_f32x4(t[c].v, t[4 + c].v, 0xdd);
    const __m512 d = _mm512_shuffle_f32x4(t[8 + c].v, t[12 + c].v, 0x88),
                 e = _mm512_shuffle_f32x4(t[8 + c].v, t[12 + c].v, 0xdd);
    t[c].v = _mm512_shuffle_f32x4(a, d, 0x88);
    t[8 + c].v = _mm512_shuffle_f32x4(a, d, 0xdd);
    t[4 + c].v = _mm512_shuffle_f32x4(b, e, 0x88);
    t[12 + c].v = _mm512_shuffle_f32x4(b, e, 0xdd);
  }
#elif defined(__AVX2__)
  Vec u[8];
  for (int r = 0; r < 8; r += 2) {
    u[r].v = _mm256_unpacklo_ps(t[r].v, t[r + 1].v);
    u[r + 1].v = _mm256_unpackhi_ps(t[r].v, t[r + 1].v);
  }
  for (int r = 0; r < 8; r += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m256d a = _mm256_castps_pd(u[r + half].v), b = _mm256_castps_pd(u[r + half + 2].v);
      t[r + 2 * half].v = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      t[r + 2 * half + 1].v = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
  for (int c = 0; c < 4; ++c) {
    const __m256 low = t[c].v, high = t[4 + c].v;
    t[c].v = _mm256_permute2f128_ps(low, high, 0x20);
    t[4 + c].v = _mm256_permute2f128_ps(low, high, 0x31);
  }
#else
  for (int r = 0; r < kVec; ++r) {
    for (int c = 0; c < r; ++c) {
      const float swapped = t[r].v[c];
      t[r].v[c] = t[c].v[r];
      t[c].v[r] = swapped;
    }
  }
#endif
}

// t[c] = slot c of kVec rows
template <typename T>
[[gnu::always_inline]] inline void load_transposed(Vec (&t)[kVec], const T* src, int64_t stride) {
  const auto row = [&](int r) { return reinterpret_cast<const float*>(src + r * stride); };
#if defined(__AVX2__) && !defined(__AVX512F__)
  for (int c = 0; c < 8; c += 4) {  // loading halves avoids exchanging halves and leaves registers free
    __m256 u[4];
    for (int r = 0; r < 4; ++r) {
      u[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row(r) + c)), _mm_loadu_ps(row(r + 4) + c), 1);
    }
    for (int half = 0; half < 2; ++half) {
      const auto unpack = [&](int r) {
        return _mm256_castps_pd(half ? _mm256_unpackhi_ps(u[r], u[r + 1]) : _mm256_unpacklo_ps(u[r], u[r + 1]));
      };
      const __m256d a = unpack(0), b = unpack(2);
      t[c + 2 * half].v = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      t[c + 2 * half + 1].v = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
#else
#pragma GCC unroll 16
  for (int r = 0; r < kVec; ++r) {
    t[r] = Vec::load(row(r));
  }
  transpose_square(t);
#endif
}

#if defined(__AMX_BF16__)
// Completes the stores before it. Compilers do not know that instructions of AMX read memory, and may drop or delay
// what these are to find there.
inline void complete_stores() {
  asm volatile("" ::: "memory");
}

// While it lives, this thread may use eight tiles of 16 rows of 16 slots.
class Tiles {
 public:
  Tiles() {
    static const Shapes shapes;
    complete_stores();
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    Shapes() {
      for (int i = 0; i < 8; ++i) {
        row_bytes[i] = kVec * sizeof(float);
        rows[i] = kVec;
      }
    }
  };
};

// product() for 16 rows, C vectors of columns and whole tiles of depth. Needs Tiles, whose numbers must be literals.
template <bool kTransposed, int C>
void product_tiles(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                   Start start, const float* factor) {
  const auto bytes = [](int64_t floats) { return static_cast<size_t>(floats * 4); };
  for (int r = 0; start == Start::kScale && r < kVec; ++r) {
    for (int x = 0; x < C * kVec; x += kVec) {
      (Vec::load(c + r * ldc + x) * Vec::load(factor + x)).store(c + r * ldc + x);
    }
  }
  complete_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (start != Start::kZero) {
    _tile_loadd(0, c, bytes(ldc));
    if constexpr (C > 1) _tile_loadd(1, c + kVec, bytes(ldc));
    if constexpr (C > 2) _tile_loadd(2, c + 2 * kVec, bytes(ldc));
    if constexpr (C > 3) _tile_loadd(3, c + 3 * kVec, bytes(ldc));
  }
  alignas(64) float square[kVec * kVec];
  for (int64_t k = 0; k < depth; k += kVec) {
    if constexpr (kTransposed) {
      Vec t[kVec];
      load_transposed(t, a + k * lda, lda);
      for (int x = 0; x < kVec; ++x) {
        t[x].store(square + x * kVec);
      }
      complete_stores();
      _tile_loadd(4, square, bytes(kVec));
    } else {
      _tile_loadd(4, a + k, bytes(lda));
    }
    const float* row = b + k * ldb;
    _tile_loadd(5, row, bytes(ldb));
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (C > 1) {
      _tile_loadd(6, row + kVec, bytes(ldb));
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (C > 2) {
      _tile_loadd(7, row + 2 * kVec, bytes(ldb));
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (C > 3) {
      _tile_loadd(5, row + 3 * kVec, bytes(ldb));
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, c, bytes(ldc));
  if constexpr (C > 1) _tile_stored(1, c + kVec, bytes(ldc));
  if constexpr (C > 2) _tile_stored(2, c + 2 * kVec, bytes(ldc));
  if constexpr (C > 3) _tile_stored(3, c + 3 * kVec, bytes(ldc));
}
#endif

// product() for C vectors of columns, with register blocks of R rows.
template <bool kPairs, bool kTransposed, int R, int C>
void product_columns(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                     int64_t rows, Start start, const float* factor) {
#if defined(__AMX_BF16__)
  const int64_t tiled = depth / kVec * kVec;
  if (kPairs && rows >= kVec && tiled > 0) {
    int64_t r = 0;
    for (; r + kVec <= rows; r += kVec) {
      product_tiles<kTransposed, C>(a + (kTransposed ? r : r * lda), lda, b, ldb, tiled, c + r * ldc, ldc, start,
                                    factor);
    }
    if (tiled < depth) {
      product_panel<kPairs, kTransposed, R, C>(a + (kTransposed ? tiled * lda : tiled), lda, b + tiled * ldb, ldb,
                                               depth - tiled, c, ldc, r, Start::kAdd, nullptr);
    }
    a += kTransposed ? r : r * lda;
    c += r * ldc;
    rows -= r;
  }
#endif
  product_panel<kPairs, kTransposed, R, C>(a, lda, b, ldb, depth, c, ldc, rows, start, factor);
}

// c (rows, cols) = start + a·b over `depth` slots. cols is rounded up to whole vectors; b and c must be that wide.
template <bool kPairs, bool kTransposed>
void product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
             int64_t rows, int64_t cols, Start start, const float* factor = nullptr) {
  constexpr int kPanel = kVec == 16 ? 4 : 2;  // of 32 or 16 registers: accumulators, one row of b, one broadcast
  int64_t vecs = (cols + kVec - 1) / kVec;
  while (vecs > 0) {
    const int width = vecs < kPanel ? static_cast<int>(vecs) : kPanel;
    if constexpr (kVec == 16) {
      if (width == 4) {
        product_columns<kPairs, kTransposed, 6, 4>(a, lda, b, ldb, depth, c, ldc, rows, start, factor);
      } else if (width == 3) {
        product_columns<kPairs, kTransposed, 8, 3>(a, lda, b, ldb, depth, c, ldc, rows, start, factor);
      } else if (width == 2) {
        product_columns<kPairs, kTransposed, 12, 2>(a, lda, b, ldb, depth, c, ldc, rows, start, factor);
      } else {
        product_columns<kPairs, kTransposed, 16, 1>(a, lda, b, ldb, depth, c, ldc, rows, start, factor);
      }
    } else if (width == 2) {
      product_columns<kPairs, kTransposed, 6, 2>(a, lda, b, ldb, depth, c, ldc, rows, start, factor);
    } else {
      product_columns<kPairs, kTransposed, 8, 1>(a, lda, b, ldb, depth, c, ldc, rows, start, factor);
    }
    b += width * kVec;
    c += width * kVec;
    factor = factor ? factor + width * kVec : nullptr;
    vecs -= width;
  }
}

// dst[c][r] = src[r][c]. Both sizes are rounded up to whole vectors; both matrices must be that large.
inline void transpose(float* dst, int64_t ldd, const float* src, int64_t lds, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; r += kVec) {
    for (int64_t c = 0; c < cols; c += kVec) {
      Vec t[kVec];
      load_transposed(t, src + r * lds + c, lds);
      for (int x = 0; x < kVec; ++x) {
        t[x].store(dst + (c + x) * ldd + r);
      }
    }
  }
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

// s[key][lane] = left·right over `depth` slots, for the keys that a panel sees
template <bool kPairs>
void product_into_scores(const float* left, int64_t ld, const float* right, int64_t depth, float* s, int keys, int rows,
                         int64_t diagonal) {
  for (int x = 0; x < rows; x += kPanelLanes) {
    product<kPairs, false>(left, ld, right + x, kLanes, depth, s + x, kLanes, keys_seen(x, diagonal, keys),
                           clamp(rows - x, kPanelLanes), Start::kZero);
  }
}

// c[column][lane] = start + leftᵀ·s, summed over the keys that a panel sees; s is in slots of keys
template <bool kPairs>
void product_over_keys(const float* left, int64_t ld, const float* s, int keys, float* c, int64_t cols, int rows,
                       int64_t diagonal, Start start, const float* factor = nullptr) {
  for (int x = 0; x < rows; x += kPanelLanes) {
    product<kPairs, true>(left, ld, s + x, kLanes, slots<kPairs>(keys_seen(x, diagonal, keys)), c + x, kLanes, cols,
                          clamp(rows - x, kPanelLanes), start, factor ? factor + x : nullptr);
  }
}

// c[key][column] += s·right, summed over the lanes that see one of the keys; s is in slots of lanes
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

// Rows to sum over, as the right operand or the transposed left one: dst[slot][column], where a slot holds one row, or
// two interleaved. Rows that `seen` excludes become zeros: their content, even NaN, must not matter.
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
