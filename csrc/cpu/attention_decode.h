#pragma once
// Attention of few queries on a cache. A task is a block of rows and a split of the keys that they see. The rows are
// the queries of all heads that share a key head, so every row of the cache is read only once.
//
//   s = q·Kᵀ,  m' = max(m, s),  alpha = e^(m - m'),  p = e^(s - m'),  l = l * alpha + sum p,  o = o * alpha + p·V
//
// The head dim lies along the vector lanes, as in the cache; with one row or a few, lanes of queries would be mostly
// empty. Each dot product therefore ends in a sum over lanes, which is computed for as many products at once as a
// vector has lanes. Keys and values are found through pointers to their rows, so pages, layouts and cache_batch_idx
// need no code of their own. Each split of a block leaves a partial result; the last split to finish combines them,
// always in the same order.
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

// How a row of T is read: one load covers kCols elements. bf16 is widened to even and odd elements, or multiplied in
// pairs with kPairs. q and the sums of values are stored in the matching order; place() gives the position of a column.
template <typename T, bool kPairs>
struct Row {
  static constexpr bool kHalves = std::is_same_v<T, BF16>;
  static constexpr int kCols = kHalves ? 2 * kVec : kVec;
  static constexpr int kKeyVecs = kPairs ? 1 : kCols / kVec;  // of a load of a key
  static constexpr int kValueVecs = kCols / kVec;             // of a load of a value; with kPairs, of two values

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

  // The last n columns of a row, n < kCols, padded with zeros.
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
      // one key at a time, in memory order: with eight at a time, the hardware prefetcher reached 10 GB/s instead of 14
#pragma GCC unroll 16
      for (int n = 0; n < K; ++n) {
        for (int64_t x = 0; x < whole; ++x) {
          __builtin_prefetch(next[j + n] + x * In::kCols);
          add(n, x, k[j + n] + x * In::kCols);
        }
      }
    } else {  // from the cache: K keys at a time share the loads of q
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
// With kFirst, o is not read. A tail of `rest` columns is one load.
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
  // enough accumulators to hide the latency of a multiplication, while registers remain for the values
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

// A row of a query in the layout that score_rows reads.
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

// Calls body<R, whether these are the first rows>(first row) for all rows, four, two or one at a time.
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

// The position of a task and what its rows see. Row r of a key head is query r / group of head r % group of its group.
struct DecodeTask {
  int64_t batch, kv_head, block, split, group, off, begin, end;
  int64_t from, to;  // the keys of the split: [from, to)
  int first_row, rows;

  DecodeTask(const DecodeArgs& args, int64_t task) : group(args.n_heads / args.n_kv_heads) {
    const int64_t all_rows = group * args.seqlen_q,
                  blocks = (all_rows + fastattn::kDecodeRows - 1) / fastattn::kDecodeRows;
    split = task % args.splits;
    block = task / args.splits % blocks;
    kv_head = task / args.splits / blocks % args.n_kv_heads;
    batch = task / args.splits / blocks / args.n_kv_heads;
    first_row = static_cast<int>(block * fastattn::kDecodeRows);
    rows =
        static_cast<int>(all_rows - first_row < fastattn::kDecodeRows ? all_rows - first_row : fastattn::kDecodeRows);
    const int64_t length = args.cache_seqlens[batch] + args.seqlen_new;
    off = length - args.seqlen_q;
    begin = args.cache_leftpad && args.cache_leftpad[batch] > 0 ? args.cache_leftpad[batch] : 0;
    end = length;
    const int64_t low = query(0) + off - args.window_left, high = query(rows - 1) + off + args.window_right + 1;
    begin = args.window_left >= 0 && low > begin ? low : begin;
    end = args.window_right >= 0 && high < end ? high : end;
    const int64_t tiles = end > begin ? (end - begin + kTileKeys - 1) / kTileKeys : 0;
    const int64_t keys = (tiles + args.splits - 1) / args.splits * kTileKeys;
    from = begin + split * keys;
    to = from + keys < end ? from + keys : end;
  }

  int64_t query(int r) const { return (first_row + r) / group; }
  int64_t head(int r) const { return kv_head * group + (first_row + r) % group; }
  template <typename T>
  T* row(const fastattn::HeadTensor& t, int r) const {
    return static_cast<T*>(t.data) + batch * t.batch + head(r) * t.head + query(r) * t.row;
  }
};

// Pointers to the rows of `keys` keys from j on. The last one is repeated up to a whole vector.
template <typename T>
inline void find_rows(const DecodeArgs& args, const fastattn::HeadTensor& cache, const DecodeTask& task, int64_t j,
                      int keys, const T** rows) {
  for (int n = 0; n < keys;) {
    const int64_t number = (j + n) / args.page_size, in_page = (j + n) % args.page_size;
    const int64_t page = args.block_table       ? args.block_table[task.batch * args.pages + number]
                         : args.cache_batch_idx ? args.cache_batch_idx[task.batch]
                                                : task.batch;
    const T* row =
        static_cast<const T*>(cache.data) + page * cache.batch + task.kv_head * cache.head + in_page * cache.row;
    const int64_t rest = args.page_size - in_page;
    for (const int stop = rest < keys - n ? n + static_cast<int>(rest) : keys; n < stop; ++n, row += cache.row) {
      rows[n] = row;
    }
  }
  for (int n = keys; n < round_up(keys, kVec); ++n) {
    rows[n] = rows[keys - 1];
  }
}

// Turns the scores of row r of a tile into weights p and updates the maximum, total and alpha of the row.
template <bool kPairs>
void softmax_row(const DecodeArgs& args, const DecodeTask& task, int r, int64_t j0, int keys, float* s, float* m,
                 float* l, float* alpha) {
  const int64_t position = task.query(r) + task.off - j0;  // of the query, relative to the first key of the tile
  const auto bound = [](int64_t lane) {
    return static_cast<float>(lane < -1 ? -1 : lane > kTileKeys ? kTileKeys : lane);
  };
  const int64_t high =
      args.window_right >= 0 && position + args.window_right + 1 < keys ? position + args.window_right + 1 : keys;
  const float low = bound(args.window_left >= 0 ? position - args.window_left : -1), last = bound(high - 1);
  const float cap = args.softcap;
  const float slope = args.alibi_slopes ? args.alibi_slopes[task.batch * args.alibi_batch + task.head(r)] : 0.f;
  const Vec multiplier = Vec::fill(cap > 0 ? args.scale / cap : args.scale), hidden = Vec::fill(-kInf);
  Vec most = hidden;
  for (int x = 0; x < keys; x += kVec) {
    Vec score = Vec::load(s + x) * multiplier;
    const Vec lane = lanes_from(static_cast<float>(x));
    if (cap > 0) {
      score = tanh(score) * Vec::fill(cap);
    }
    if (slope != 0.f) {
      score = fnma(Vec::fill(slope), abs(Vec::fill(static_cast<float>(position)) - lane), score);
    }
    score = select(lane < Vec::fill(low), hidden, score);
    score = select(Vec::fill(last) < lane, hidden, score);
    score.store(s + x);
    most = max(score, most);
  }
  const float tile_max = most.max(), now = tile_max > *m ? tile_max : *m;
  const Vec base = Vec::fill(now == -kInf ? 0.f : now);
  alignas(64) float rescale[kVec];
  exp2<false>(exponent_of_2<true>(Vec::fill(*m) - base)).store(rescale);
  Vec sum = Vec::fill(0.f);
  const auto weight = [&](int x) {
    const Vec w = exp2<kPairs>(exponent_of_2<true>(Vec::load(s + x) - base));
    sum = sum + w;
    return w;
  };
  if constexpr (kPairs) {
#if defined(__AVX512BF16__)
    for (int x = 0; x < keys; x += 2 * kVec) {
      const Vec first = weight(x), second = x + kVec < keys ? weight(x + kVec) : Vec::fill(0.f);
      _mm512_storeu_si512(s + x / 2, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second.v, first.v)));
    }
#endif
  } else {
    for (int x = 0; x < keys; x += kVec) {
      weight(x).store(s + x);
    }
  }
  *m = now;
  *l = *l * rescale[0] + sum.sum();
  *alpha = rescale[0];
}

// Combines the partial results of all splits of a block into rows of out and lse. A split has `stride` floats: o, then
// m and l.
template <typename T, bool kPairs>
void finish_rows(const DecodeArgs& args, const DecodeTask& task, const float* partial, int64_t stride, int64_t width,
                 float* sums) {
  for (int r = 0; r < task.rows; ++r) {
    const float* m = partial + task.rows * width + r;
    const float* l = m + task.rows;
    const float sink = args.sink ? args.sink[task.head(r)] : -kInf;
    float most = sink;
    for (int64_t n = 0; n < args.splits; ++n) {
      most = m[n * stride] > most ? m[n * stride] : most;
    }
    const float base = most == -kInf ? 0.f : most;
    float total = std::exp(sink - base);
    zero(sums, width);
    for (int64_t n = 0; n < args.splits; ++n) {
      if (l[n * stride] == 0.f) {  // this split saw no key and may not have written o
        continue;
      }
      const float share = std::exp(m[n * stride] - base);
      total += l[n * stride] * share;
      const float* o = partial + n * stride + r * width;
      for (int64_t x = 0; x < width; x += kVec) {
        fma(Vec::load(o + x), Vec::fill(share), Vec::load(sums + x)).store(sums + x);
      }
    }
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    T* out = task.row<T>(args.out, r);
    for (int64_t c = 0; c < args.head_dim_v; ++c) {
      out[c] = from_float<T>(sums[Row<T, kPairs>::place(c)] * inverse);
    }
    args.lse[(task.batch * args.n_heads + task.head(r)) * args.seqlen_q + task.query(r)] =
        total == 0.f ? -kInf : base + std::log(total);
  }
}

// Computes the rows of a task over the keys of its split: o (rows, width), m and l.
template <typename T, bool kPairs>
void attend(const DecodeArgs& args, const DecodeTask& task, const float* q, int64_t width_q, float* s, float* alpha,
            float* o, int64_t width, float* m, float* l) {
  for (int r = 0; r < task.rows; ++r) {
    m[r] = -kInf;
    l[r] = 0.f;
  }
  const T* found[2][2][kTileKeys];  // [tile][k or v]
  const auto find = [&](int64_t j0, const T*(&rows)[2][kTileKeys]) {
    const int keys = static_cast<int>(task.to - j0 < kTileKeys ? task.to - j0 : kTileKeys);
    find_rows(args, args.k, task, j0, keys, rows[0]);
    find_rows(args, args.v, task, j0, keys, rows[1]);
    return keys;
  };
  int keys = task.from < task.to ? find(task.from, found[0]) : 0;
  for (int64_t j0 = task.from; j0 < task.to; j0 += kTileKeys) {
    const int64_t tile = (j0 - task.from) / kTileKeys % 2;
    const auto& now = found[tile];
    const int keys_next = j0 + kTileKeys < task.to ? find(j0 + kTileKeys, found[1 - tile]) : 0;
    // the prefetched tile must have as many keys as this one; the last tile may be shorter
    const auto& next = found[keys_next == kTileKeys ? 1 - tile : tile];
    for_row_groups(task.rows, [&](auto count, auto first, int r) {
      score_rows<T, kPairs, count.value, first.value>(q + r * width_q, width_q, now[0], next[0], keys, args.head_dim,
                                                      s + r * kTileKeys);
    });
    for (int r = 0; r < task.rows; ++r) {
      softmax_row<kPairs>(args, task, r, j0, keys, s + r * kTileKeys, m + r, l + r, alpha + r);
    }
    for_row_groups(task.rows, [&](auto count, auto first, int r) {
      add_values<T, kPairs, count.value, first.value>(s + r * kTileKeys, now[1], next[1], keys, args.head_dim_v,
                                                      j0 == task.from, alpha + r, o + r * width, width);
    });
    keys = keys_next;
  }
}

template <typename T, bool kPairs>
void decode(const DecodeArgs& args) {
  const int64_t all_rows = args.n_heads / args.n_kv_heads * args.seqlen_q;
  const int64_t rows = all_rows < fastattn::kDecodeRows ? all_rows : fastattn::kDecodeRows;
  const int64_t blocks = (all_rows + fastattn::kDecodeRows - 1) / fastattn::kDecodeRows;
  const int64_t tasks = args.batch * args.n_kv_heads * blocks * args.splits;
  const int64_t width_q = round_up(slots<kPairs>(args.head_dim), 2 * kVec),
                width = Row<T, kPairs>::width(args.head_dim_v);
  const int64_t stride = fastattn::decode_partial(rows, args.head_dim_v);
  Arena arena(rows * (width_q + kTileKeys + 1) + width + stride + 5 * 16);
  if (arena.failed()) {
    *args.failed = true;
    return;
  }
  float* q = arena.take(rows * width_q);
  float* s = arena.take(rows * kTileKeys);
  float* alpha = arena.take(rows);
  float* sums = arena.take(width);
  float* own = arena.take(stride);

  for (int64_t n; (n = next_task(args)) < tasks;) {
    const DecodeTask task(args, n);
    for (int r = 0; r < task.rows; ++r) {
      pack_row<T, kPairs>(q + r * width_q, task.row<const T>(args.q, r), args.head_dim);
    }
    float* o = args.splits > 1 ? args.partial + n * stride : own;
    float* m = o + task.rows * width;
    attend<T, kPairs>(args, task, q, width_q, s, alpha, o, width, m, m + task.rows);
    if (args.splits == 1) {
      finish_rows<T, kPairs>(args, task, own, stride, width, sums);
    } else if (args.remaining[n / args.splits].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      finish_rows<T, kPairs>(args, task, args.partial + (n - task.split) * stride, stride, width, sums);
    }
  }
}

}  // namespace
