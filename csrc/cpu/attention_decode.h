#pragma once
// Attention of a few queries on a cache. A task is a block of rows and a split of the keys that they see. The rows are
// the queries of all heads that share a key head, so every row of the cache is read only once.
//
//   s = q·Kᵀ,  m' = max(m, s),  alpha = e^(m - m'),  p = e^(s - m'),  l = l * alpha + sum p,  o = o * alpha + p·V
//
// The vector lanes hold columns of the head dim, as the cache does. Lanes that hold queries would be mostly empty,
// because there are only a few rows. Each dot product therefore ends in a sum over lanes; as many of these sums as a
// vector has lanes are computed at once. Keys and values are found through pointers to their rows, so pages, layouts
// and cache_batch_idx need no code of their own. Each split of a block leaves a partial result. The last split to
// finish combines them, always in the same order.
#include "attention_decode_rows.h"

namespace {

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

// Finds pointers to the rows of `keys` keys from j on. The last pointer is repeated up to a whole vector.
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

// Combines the partial results of all splits of a block into rows of out and lse. Each split has `stride` floats: o,
// then m, then l.
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
    // The prefetched tile must have as many keys as this one; the last tile may have fewer.
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
