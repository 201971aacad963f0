#pragma once
// A register-blocked product of matrices in memory, with vectors or AMX tiles, and the transposes that it needs.
//
// A slot is 32 bits of an operand: one float or, with kPairs, two bf16 that follow each other along the summed
// dimension. One dot-product instruction multiplies the pairs of two slots and adds both products in fp32.
#include "vec.h"

namespace {

constexpr int kVec = Vec::kSize;

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
  // Loading halves saves exchanges of halves and leaves registers free.
  for (int c = 0; c < 8; c += 4) {
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
// Completes the preceding stores. Compilers do not know that AMX instructions read memory, so they might remove or
// delay stores that these instructions need.
inline void complete_stores() {
  asm volatile("" ::: "memory");
}

// While an object exists, its thread may use eight tiles of 16 rows of 16 slots.
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

// product() for 16 rows, C vectors of columns and whole tiles of depth. It needs a Tiles object. Tile numbers must be
// literals.
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

}  // namespace
