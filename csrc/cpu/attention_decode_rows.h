#pragma once
// Rows of a cache: how they are read, multiplied by a few rows of queries, and added up with weights. See
// attention_decode.h.
#include <cmath>
#include <type_traits>

#include "attention_scores.h"

namespace {

using fastattn::DecodeArgs;

constexpr int kTileKeys = fastattn::kDecodeKeys;

// Returns the sums over the lanes of kVec vectors, as one vector.
inline Vec lane_sums(const Vec* a) {
#if defined(__AVX512F__)
  __m512 pairs[8], quads[4], halves[2];
  for (int n = 0; n < 8; ++n) {
    pairs[n] =
        _mm512_add_ps(_mm512_unpacklo_ps(a[2 * n].v, a[2 * n + 1].v), _mm512_unpackhi_ps(a[2 * n].v, a[2 * n + 1].v));
  }
  for (int n = 0; n < 4; ++n) {
    const __m512d x = _mm512_castps_pd(pairs[2 * n]), y = _mm512_castps_pd(pairs[2 * n + 1]);
    quads[n] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const auto fold = [](__m512 x, __m512 y) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  };
  halves[0] = fold(quads[0], quads[1]);
  halves[1] = fold(quads[2], quads[3]);
  return {fold(halves[0], halves[1])};
#elif defined(__AVX2__)
  const auto four = [a](int n) {
    return _mm256_hadd_ps(_mm256_hadd_ps(a[n].v, a[n + 1].v), _mm256_hadd_ps(a[n + 2].v, a[n + 3].v));
  };
  const __m256 x = four(0), y = four(4);
  return {_mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31))};
#else
  return {Float4{a[0].sum(), a[1].sum(), a[2].sum(), a[3].sum()}};
#endif
}

// How a row of T is read. One load covers kCols elements. bf16 is widened to even and odd elements, or multiplied in
// pairs with kPairs. q and the sums of values are stored in the matching order; place() gives the position of a column.
template <typename T, bool kPairs>
struct Row {
  static constexpr bool kHalves = std::is_same_v<T, BF16>;
  static constexpr int kCols = kHalves ? 2 * kVec : kVec;
  static constexpr int kKeyVecs = kPairs ? 1 : kCols / kVec;  // vectors per load of a key
  static constexpr int kValueVecs = kCols / kVec;  // vectors per load of a value; with kPairs, per load of two values

  static constexpr int64_t width(int64_t cols) { return round_up(cols, kCols); }

  // The position of column c in the sums of values. Unpacked pairs are interleaved by 4 lanes, halves by one.
  static constexpr int64_t place(int64_t c) {
    const int64_t in = c % kCols;
    return c - in + (kPairs ? in / 4 % 2 * 16 + in / 8 * 4 + in % 4 : kHalves ? in % 2 * kVec + in / 2 : in);
  }

  static void load_key(const T* p, Vec* v) {
    if constexpr (kPairs) {
      v[0] = Vec::load(reinterpret_cast<const float*>(p));
    } else if constexpr (kHalves) {
      Vec::load_halves(p, v[0], v[1]);
    } else {
      v[0] = Vec::load(p);
    }
  }

  static void load_value(const T* p, [[maybe_unused]] const T* second, Vec* v) {
    if constexpr (kPairs) {
#if defined(__AVX512BF16__)
      const __m512i a = _mm512_loadu_si512(p), b = second ? _mm512_loadu_si512(second) : _mm512_setzero_si512();
      v[0] = {_mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b))};
      v[1] = {_mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b))};
#endif
    } else {
      load_key(p, v);
    }
  }

  // The last n columns of a row, padded with zeros; n < kCols.
  struct Tail {
    alignas(64) T data[kCols] = {};
    Tail(const T* p, int n) { std::memcpy(data, p, n * sizeof(T)); }
  };
};

// s[r][j] = q[r]·k[j] for R rows and all keys of a tile, rounded up to whole vectors. The first rows of a tile (kFirst)
// also prefetch `next`, the rows of the next tile, which the hardware prefetcher does not reach.
template <typename T, bool kPairs, int R, bool kFirst>
void score_rows(const float* q, int64_t width, const T* const* k, const T* const* next, int keys, int64_t cols,
                float* s) {
  using In = Row<T, kPairs>;
  constexpr int K = kVec / R;
  const int64_t whole = cols / In::kCols;
  const int rest = static_cast<int>(cols % In::kCols);
  for (int j = 0; j < keys; j += K) {
    Vec acc[kVec];
#pragma GCC unroll 16
    for (int n = 0; n < kVec; ++n) {
      acc[n] = Vec::fill(0.f);
    }
    const auto add = [&](int n, int64_t x, const T* key) __attribute__((always_inline)) {
      Vec v[In::kKeyVecs];
      In::load_key(key, v);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int y = 0; y < In::kKeyVecs; ++y) {
          const Vec row = Vec::load(q + r * width + (x * In::kKeyVecs + y) * kVec);
          acc[r * K + n] = multiply_add<kPairs>(v[y], row, acc[r * K + n]);
        }
      }
    };
    if constexpr (kFirst) {
      // One key at a time, in memory order. Eight at a time reduced the hardware prefetcher from 14 to 10 GB/s.
#pragma GCC unroll 16
      for (int n = 0; n < K; ++n) {
        for (int64_t x = 0; x < whole; ++x) {
          __builtin_prefetch(next[j + n] + x * In::kCols);
          add(n, x, k[j + n] + x * In::kCols);
        }
      }
    } else {  // The rows are now in the cache, so K keys at a time share the loads of q.
      for (int64_t x = 0; x < whole; ++x) {
#pragma GCC unroll 16
        for (int n = 0; n < K; ++n) {
          add(n, x, k[j + n] + x * In::kCols);
        }
      }
    }
    if (rest) {
#pragma GCC unroll 16
      for (int n = 0; n < K; ++n) {
        const typename In::Tail tail(k[j + n] + whole * In::kCols, rest);
        add(n, whole, tail.data);
      }
    }
    alignas(64) float sums[kVec];
    lane_sums(acc).store(sums);
    for (int r = 0; r < R; ++r) {
      std::memcpy(s + r * kTileKeys + j, sums + r * K, K * sizeof(float));
    }
  }
}

// o[r][..] = o[r][..] * alpha[r] + sum_j p[r][j] * v[j][..] for R rows and U loads of a value from column `col` on.
// With kFirst, o is not read. A tail of `rest` columns takes one load.
template <typename T, bool kPairs, int R, int U, bool kFirst>
void add_values_block(const float* p, const T* const* v, const T* const* next, int keys, int64_t col, int rest,
                      bool start, const float* alpha, float* o, int64_t width) {
  using In = Row<T, kPairs>;
  constexpr int kVecs = U * In::kValueVecs, kStep = kPairs ? 2 : 1;
  Vec acc[R][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int x = 0; x < kVecs; ++x) {
      acc[r][x] = start ? Vec::fill(0.f) : Vec::load(o + r * width + x * kVec) * Vec::fill(alpha[r]);
    }
  }
  const auto add = [&](int j, const T* first, const T* second) __attribute__((always_inline)) {
    Vec value[kVecs];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      In::load_value(first + u * In::kCols, second ? second + u * In::kCols : nullptr, value + u * In::kValueVecs);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec weight = Vec::fill(p[r * kTileKeys + j / kStep]);
#pragma GCC unroll 8
      for (int x = 0; x < kVecs; ++x) {
        acc[r][x] = multiply_add<kPairs>(weight, value[x], acc[r][x]);
      }
    }
  };
  const auto fetch = [&](int j) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int u = 0; u < U && kFirst; ++u) {
      __builtin_prefetch(next[j] + col + u * In::kCols);
    }
  };
  if (rest) {
    for (int j = 0; j < keys; j += kStep) {
      const bool both = kPairs && j + 1 < keys;
      const typename In::Tail first(v[j] + col, rest), second(v[both ? j + 1 : j] + col, rest);
      add(j, first.data, both ? second.data : nullptr);
    }
  } else {
    int j = 0;
    for (; j + kStep <= keys; j += kStep) {
      fetch(j);
      if constexpr (kPairs) {
        fetch(j + 1);
      }
      add(j, v[j] + col, kPairs ? v[j + 1] + col : nullptr);
    }
    if (j < keys) {
      add(j, v[j] + col, nullptr);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int x = 0; x < kVecs; ++x) {
      acc[r][x].store(o + r * width + x * kVec);
    }
  }
}

template <typename T, bool kPairs, int R, bool kFirst>
void add_values(const float* p, const T* const* v, const T* const* next, int keys, int64_t cols, bool start,
                const float* alpha, float* o, int64_t width) {
  // There are enough accumulators to hide the latency of a multiplication, and registers remain for the values.
  using In = Row<T, kPairs>;
  constexpr int kCols = In::kCols, U = (kVec == 16 ? (R == 4 ? 4 : 8) : 8 / R) / In::kValueVecs;
  int64_t col = 0;
  for (; col + U * kCols <= cols; col += U * kCols) {
    add_values_block<T, kPairs, R, U, kFirst>(p, v, next, keys, col, 0, start, alpha, o + col, width);
  }
  for (; col < cols; col += kCols) {
    const int rest = cols - col < kCols ? static_cast<int>(cols - col) : 0;
    add_values_block<T, kPairs, R, 1, kFirst>(p, v, next, keys, col, rest, start, alpha, o + col, width);
  }
}

// A row of queries in the layout that score_rows reads.
template <typename T, bool kPairs>
inline void pack_row(float* dst, const T* src, int64_t cols) {
  using In = Row<T, kPairs>;
  for (int64_t c = 0; c < cols; c += In::kCols, dst += In::kKeyVecs * kVec) {
    const typename In::Tail part(src + c, static_cast<int>(cols - c < In::kCols ? cols - c : In::kCols));
    Vec v[In::kKeyVecs];
    In::load_key(part.data, v);
    for (int x = 0; x < In::kKeyVecs; ++x) {
      v[x].store(dst + x * kVec);
    }
  }
}

// Calls body<R, whether these are the first rows>(first row) for all rows: four, two or one at a time.
template <typename Body>
inline void for_row_groups(int rows, Body body) {
  const auto group = [&](auto count, int r) {
    if (r == 0) {
      body(count, std::true_type{}, r);
    } else {
      body(count, std::false_type{}, r);
    }
  };
  int r = 0;
  for (; r + 4 <= rows; r += 4) {
    group(std::integral_constant<int, 4>{}, r);
  }
  if (r + 2 <= rows) {
    group(std::integral_constant<int, 2>{}, r);
    r += 2;
  }
  if (r < rows) {
    group(std::integral_constant<int, 1>{}, r);
  }
}

}  // namespace
